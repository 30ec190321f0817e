"""A dense map beside the vector of a picture: the graph `dense`, for the vectors of regions.

The tower of the map shares its weights with the image tower; `calmclip.export.towers.dense` has the formulas. It sees
the whole picture: where the image tower crops, the picture is scaled into the same input instead. The net then serves
`detect` over given boxes or windows (`nets.common.region_detector`). It is the last adapter, because others would
change the image tower and not the map.

Source: MaskCLIP, Zhou et al. 2022 (arXiv 2112.01071); vectors of regions: CLOC, Chen et al. 2024 (arXiv 2410.02746).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from calmclip.export.adapters import ADAPTERS, Adapter, Context
from calmclip.export.nets import Net, Tower, attention_promises, float32
from calmclip.export.nets.common.dense_map import summary
from calmclip.export.towers.dense import DensePooled, DenseTransformer, DenseTrunk, Grid
from calmclip.export.towers.image import MeanPool, Trunk, VisionTransformer
from calmclip.models.bundle.manifest import FrozenModel, ImagePreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.ops.spec import SOFTMAX


class Params(FrozenModel):
    method: Literal["values"] = Field(
        description="add the graph dense, a map of vectors, so that embed and detect take boxes: values"
    )
    bare: bool = Field(
        default=False, description="with --dense: without the residual and the feed-forward of the last block"
    )


@dataclass(frozen=True)
class _Map:
    """``softmaxes``: how many Softmax ops of the image tower the map's tower lacks."""

    module: nn.Module
    grid: Grid
    softmaxes: int = 0


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` for a net without an image tower whose cells have vectors."""
    tower = net.towers.get("image")
    dense = _map(tower, params) if tower and not net.folded else None
    if tower is None or dense is None:
        raise BadRequest(
            f"dense does not apply to {net.source.model}: expected an image tower that is a transformer with a class "
            "token or SigLIP's pool, or convolutions with a mean or CLIP's attention as their pool"
        )
    assert isinstance(tower.preprocess, ImagePreprocess)
    softmaxes = attention_promises(tower.module).get(SOFTMAX.name, 0) - dense.softmaxes
    dim = next(iter(tower.outputs.values())).shape[-1]
    added = Tower(
        dense.module,
        tower.inputs,
        {"patches": float32("B", *dense.grid, dim)},
        _whole(tower.preprocess),
        quantizer=tower.quantizer,
        quantizer_params=tower.quantizer_params,
        summary=summary,
        promises={SOFTMAX.name: softmaxes} if softmaxes else {},
    )
    return replace(net, towers={**net.towers, "dense": added})


def _map(tower: Tower, params: Params) -> _Map | None:
    """None if it is unknown how to make one."""
    image, pixels = tower.module, tower.preprocess
    assert isinstance(pixels, ImagePreprocess)
    if isinstance(image, VisionTransformer) and image.style.pool in ("cls", "map"):
        side = image.patch.kernel_size
        grid = pixels.size[0] // int(side[0]), pixels.size[1] // int(side[1])
        if image.style.pool == "map":
            return _Map(DensePooled(image, params.bare, grid), grid, 1)
        return _Map(DenseTransformer(image, params.method, params.bare, grid), grid, 1)
    if isinstance(image, Trunk):
        for name, module in image.trunk.named_modules():
            attends = isinstance(module, MeanPool)
            if attends or getattr(module, "pool_type", None) in ("avg", "fast", "fastavg"):
                grid = _seen(image, module, pixels)
                return _Map(DenseTrunk(image, name, grid), grid, int(attends))
    return None


def _seen(image: Trunk, pool: nn.Module, pixels: ImagePreprocess) -> Grid:
    """Rows and columns of the map that ``pool`` sees."""
    if isinstance(pool, MeanPool):
        side = round((len(pool.positions) - 1) ** 0.5)
        return side, side
    shapes: list[torch.Size] = []
    hook = pool.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    with torch.inference_mode():
        image.trunk.eval()(torch.zeros(1, 3, *pixels.size))
    hook.remove()
    rows, columns = shapes[0][-2:]
    return rows, columns


def _whole(pixels: ImagePreprocess) -> ImagePreprocess:
    """Nothing of the picture is cut off; what a picture does not fill has the mean colour."""
    if pixels.resize != "shortest":
        return pixels
    grey = round(255 * sum(pixels.mean) / 3)
    return ImagePreprocess.model_validate(
        pixels.model_dump() | {"resize": "letterbox", "shortest": None, "keep_square": False, "pad": grey}
    )


ADAPTERS.register("dense")(Adapter(Params, adapt, {"--dense": "method", "--bare": "bare"}, last=True))
