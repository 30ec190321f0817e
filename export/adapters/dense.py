"""A dense map beside the vector of a picture: the graph `dense`, for the vectors of regions.

The tower of the map shares its weights with the image tower; `calmclip.export.towers.dense` has the formulas. It sees
the whole picture: where the image tower crops, the picture is scaled into the same input instead. The net then serves
`detect` over given boxes or windows (`nets.common.region_detector`). It is the last adapter, because others would
change the image tower and not the map.

Source: MaskCLIP, Zhou et al. 2022 (arXiv 2112.01071); vectors of regions: CLOC, Chen et al. 2024 (arXiv 2410.02746).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import nn

from calmclip.export.adapters import ADAPTERS, Adapter, Context, with_note
from calmclip.export.adapters._affinity import Additions, Wanted, additions
from calmclip.export.nets import Net, Tower, attention_promises, float32
from calmclip.export.nets.common.dense_map import summary
from calmclip.export.towers.dense import (
    METHODS,
    ClassToken,
    DenseTransformer,
    DenseTrunk,
    Grid,
    LearnedQuery,
    Method,
    Positions,
    Reader,
)
from calmclip.export.towers.image import MeanPool, Trunk, VisionTransformer
from calmclip.export.towers.queries import QueriedTransformer
from calmclip.export.towers.timm_dense import TimmTransformer, vit_in, why_not
from calmclip.models.bundle.manifest import GUIDE, FrozenModel, ImagePreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.ops.spec import SOFTMAX

Size = tuple[int, int]  # height and width in pixels


class Params(FrozenModel):
    method: Literal["values", "self", "vv", "guided"] = Field(
        description="add the graph dense, a map of vectors, so that embed and detect take boxes: values, self, vv or "
        "guided, which read the last block or blocks another way"
    )
    blocks: int | None = Field(
        default=None, ge=1, description="with --dense self or vv: how many of the last blocks, instead of the paper's"
    )
    size: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})?$",
        description="with --dense: another size of the picture in pixels, SIDE or HEIGHTxWIDTH; positions are resized",
    )
    positions: Literal["bicubic", "bilinear"] = Field(
        default="bicubic", description="with --dense-size: how positions are resized, bicubic or bilinear"
    )
    bare: bool = Field(
        default=False, description="with --dense: without the residual and the feed-forward of the last block"
    )
    dinoiser: Path | None = Field(
        default=None,
        description="with --dense: CLIP-DINOiser's layers over this checkpoint, as its training saves them",
    )
    guide: Path | None = Field(
        default=None, description="with --dense guided: an ONNX graph of another network, such as DINO"
    )
    guide_norm: Literal["imagenet", "openai", "half", "none"] = Field(
        default="imagenet", description="how --guide wants its pixels: imagenet, openai, half or none"
    )

    def wanted(self) -> Wanted:
        return Wanted(self.method == "guided", self.guide, self.guide_norm, self.dinoiser)


@dataclass(frozen=True)
class _Map:
    """``softmaxes``: how many Softmax ops its graph has, by modules of ours."""

    module: nn.Module
    grid: Grid
    softmaxes: int = 0
    additions: Additions = field(default_factory=Additions)


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` for a net without an image tower whose cells have vectors, and for params that do not fit the
    tower."""
    tower = net.towers.get("image")
    if tower is None or net.folded or not isinstance(tower.preprocess, ImagePreprocess):
        raise _unfit(net, "it has no image tower of modules")
    pixels = _whole(tower.preprocess, _size(params))
    dense = _map(net, tower, pixels, params)
    dim = next(iter(tower.outputs.values())).shape[-1]
    more = dense.additions
    extras = {name: float32("B", *dense.grid, *extra.shape) for name, extra in more.extras.items()}
    added = Tower(
        dense.module,
        {pixels.input: float32("B", 3, *pixels.size), **more.inputs},
        {"patches": float32("B", *dense.grid, dim), **extras},
        pixels,
        quantizer=tower.quantizer,
        quantizer_params=tower.quantizer_params,
        summary=summary,
        promises={SOFTMAX.name: dense.softmaxes} if dense.softmaxes else {},
        reads={GUIDE: f"{GUIDE}.patches"} if GUIDE in more.inputs else {},
    )
    files = {name: file for name, file in (("dinoiser", params.dinoiser), ("guide", params.guide)) if file}
    net = with_note(net, f"adapter dense {params.method}", **files) if files else net
    return replace(net, towers={**net.towers, **more.towers, "dense": added})


def _map(net: Net, tower: Tower, seen: ImagePreprocess, params: Params) -> _Map:
    """``tower``: the image tower; ``seen``: how `dense` sees a picture. Raises `BadRequest`."""
    assert isinstance(tower.preprocess, ImagePreprocess)
    image, before, size = tower.module, tower.preprocess.size, seen.size
    if isinstance(image, VisionTransformer) and image.style.pool in _READERS:
        old = _divided(before, image.patch.kernel_size)
        positions = _positions(old, before, size, params)
        reader: Reader = _READERS[image.style.pool](image, positions)
        more = additions(params.wanted(), image.blocks, reader.gathers, seen, tower)
        return _transformer(reader, image.blocks, positions.new, params, more)
    vit = vit_in(image) if isinstance(image, Trunk) else None
    if vit is not None and isinstance(image, Trunk):
        if reason := why_not(vit):
            raise _unfit(net, reason)
        positions = _positions(vit.patch_embed.grid_size, before, size, params)
        reader = TimmTransformer(image, positions, size)
        more = additions(params.wanted(), vit.blocks, reader.gathers, seen, tower)
        return _transformer(reader, vit.blocks, positions.new, params, more)
    if isinstance(image, Trunk):
        for name, module in image.trunk.named_modules():
            attends = isinstance(module, MeanPool)
            if attends or getattr(module, "pool_type", None) in ("avg", "fast", "fastavg"):
                if params.method != "values" or params.dinoiser:
                    option = "--dinoiser" if params.method == "values" else f"dense {params.method}"
                    raise BadRequest(
                        f"{option} reads the blocks of a transformer, but the image tower of "
                        f"{net.source.model} pools a map of convolutions; take --dense values alone"
                    )
                positions = _positions(_seen(image, module, before), before, size, params)
                softmaxes = attention_promises(image).get(SOFTMAX.name, 0) - int(attends)
                return _Map(DenseTrunk(image, name, positions), positions.new, softmaxes)
    if isinstance(image, QueriedTransformer):
        raise _unfit(net, "queries that see all patches make its vectors, and its graph regions has vectors of parts")
    raise _unfit(net, "its pool is none of these")


def _transformer(reader: Reader, blocks: nn.ModuleList, grid: Grid, params: Params, more: Additions) -> _Map:
    method = METHODS[params.method]
    number = _blocks(params, method, len(blocks))
    if params.bare and params.method != "values" and reader.gathers:
        raise BadRequest(f"--bare: {params.method} never reads the last block's feed-forward; leave it out")
    dense = DenseTransformer(reader, params.method, number, params.bare, grid, more.extras, more.grid)
    ours = attention_promises(blocks).get(SOFTMAX.name, 0)
    if ours:
        ours -= int(reader.gathers or method.share is not None)  # the last block's own attention is not read
        ours += method.attends * number + sum(getattr(extra, "attends", 0) for extra in more.extras.values())
    return _Map(dense, dense.grid, ours, more)


def _blocks(params: Params, method: Method, depth: int) -> int:
    """Raises `BadRequest`."""
    if params.blocks is None:
        return method.blocks(depth)
    if method.share is None:
        raise BadRequest(f"--dense-blocks is {params.blocks}, but {params.method} reads the last block; leave it out")
    if params.blocks > depth:
        raise BadRequest(f"--dense-blocks is {params.blocks}; expected at most {depth}, the blocks of the tower")
    return params.blocks


# `Style.pool` -> how a map reads such a tower
_READERS: Mapping[str, Callable[[VisionTransformer, Positions], Reader]] = {"cls": ClassToken, "map": LearnedQuery}


def _size(params: Params) -> Size | None:
    if params.size is None:
        return None
    rows, _, columns = params.size.partition("x")
    return int(rows), int(columns or rows)


def _positions(old: Grid, before: Size, size: Size, params: Params) -> Positions:
    """Raises `BadRequest` for a size that is no multiple of the stride."""
    stride = before[0] // old[0], before[1] // old[1]
    if rest := [side for side, step in zip(size, stride, strict=True) if side % step]:
        step = stride[size.index(rest[0])]
        near = max(1, rest[0] // step) * step
        raise BadRequest(
            f"--dense-size: {rest[0]} is no multiple of {step}, the pixels of a cell; take {near} or {near + step}"
        )
    return Positions(old, _divided(size, stride), params.positions)


def _divided(size: Size, stride: Sequence[int]) -> Grid:
    return size[0] // stride[0], size[1] // stride[1]


def _seen(image: Trunk, pool: nn.Module, size: Size) -> Grid:
    """Rows and columns of the map that ``pool`` sees."""
    if isinstance(pool, MeanPool):
        side = round((len(pool.positions) - 1) ** 0.5)
        return side, side
    shapes: list[torch.Size] = []
    hook = pool.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    with torch.inference_mode():
        image.trunk.eval()(torch.zeros(1, 3, *size))
    hook.remove()
    rows, columns = shapes[0][-2:]
    return rows, columns


def _whole(pixels: ImagePreprocess, size: Size | None) -> ImagePreprocess:
    """Nothing of the picture is cut off; what a picture does not fill has the mean colour. ``size``: instead of the
    tower's."""
    changes: dict[str, Any] = {"size": size or pixels.size}
    if pixels.resize == "shortest":
        grey = round(255 * sum(pixels.mean) / 3)
        changes |= {"resize": "letterbox", "shortest": None, "keep_square": False, "pad": grey}
    try:
        return ImagePreprocess.model_validate(pixels.model_dump() | changes)
    except ValidationError as error:
        raise BadRequest(f"--dense-size: {error.errors()[0]['msg']}") from None


def _unfit(net: Net, reason: str) -> BadRequest:
    return BadRequest(
        f"dense does not apply to {net.source.model}: {reason}; expected an image tower that is a transformer with a "
        "class token, a mean or SigLIP's pool, or convolutions with a mean or CLIP's attention as their pool"
    )


ADAPTERS.register("dense")(
    Adapter(
        Params,
        adapt,
        {
            "--dense": "method",
            "--dense-blocks": "blocks",
            "--dense-size": "size",
            "--dense-positions": "positions",
            "--bare": "bare",
            "--dinoiser": "dinoiser",
            "--guide": "guide",
            "--guide-norm": "guide_norm",
        },
        last=True,
    )
)
