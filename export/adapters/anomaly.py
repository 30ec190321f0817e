"""The prompts that AnomalyCLIP learnt over a base CLIP: the graph `anomaly`, pictures -> a map of damage and a score.

The prompts are the same for every thing, so both texts are constants: the text tower runs here, and the graph holds two
vectors. `calmclip.export.towers.anomaly` has the formulas of the picture's side. The base gives both towers, which the
training does not change.

Source: AnomalyCLIP, Zhou et al. 2024 (arXiv 2310.18961), and its code. The checkpoint is a dict whose key
``prompt_learner`` has the learnt tokens ``ctx_pos`` and ``ctx_neg`` [1, 1, n, W], the fixed ones before and behind
them, ``token_prefix_*`` and ``token_suffix_*`` [1, 1, m, W], and ``compound_prompts_text.{i}`` [k, W]: before text
block i + 1 (from 0) they take the place of the k tokens behind the first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from torch.nn import functional as F

from calmclip.export import parity
from calmclip.export.adapters import ADAPTERS, Adapter, Context, with_note
from calmclip.export.adapters._tensors import rows_of, token_ids
from calmclip.export.checkpoints import hub, read
from calmclip.export.nets import Net, Tower, attention_promises, float32
from calmclip.export.towers.anomaly import AnomalyTower
from calmclip.export.towers.dense import Positions
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer, TokenAt
from calmclip.models.bundle.manifest import MAX_SIDE, FrozenModel, ImagePreprocess
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from calmclip.models.flow import Arrays
from calmclip.models.ops.spec import SOFTMAX

LEARNER, DEEP = "prompt_learner.", "compound_prompts_text."
SIDES = ("pos", "neg")  # normal and damaged
_UNUSED = ("tokenized_prompts_", "compound_prompt_projections.")  # beside the tensors of the texts
_NEAR = 1e-2  # relative, of the same embedding in half and in single precision


def _numbers(value: object) -> object:
    """ "6,12" as an option gives it -> its numbers."""
    return tuple(value.split(",")) if isinstance(value, str) else value


class Params(FrozenModel):
    checkpoint: Path = Field(description="prompts that AnomalyCLIP tuned over this checkpoint: adds the graph anomaly")
    size: int = Field(default=518, ge=1, le=MAX_SIDE, description="with --anomalyclip: the side of its pictures, 518")
    layers: Annotated[tuple[int, ...], BeforeValidator(_numbers)] = Field(
        default=(), description="with --anomalyclip: blocks, from 1, that the map is read behind; else the last"
    )
    blocks: int = Field(
        default=19, ge=1, description="with --anomalyclip: how many of the last blocks have v-v attention, 19"
    )


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` for a net that is no CLIP with a class token and causal texts, and for params that do not fit
    it; `UnknownCheckpoint` with the tensor that does not fit."""
    image, text = (net.towers.get(role) for role in ("image", "text"))
    if (
        net.folded
        or not (image and isinstance(image.module, VisionTransformer) and image.module.style.pool == "cls")
        or not (text and isinstance(text.module, TextTransformer))
        or not (text.module.style.pool == "eot" and text.module.style.causal)
    ):
        raise BadRequest(
            f"anomaly does not apply to {net.source.model}: expected a vision transformer with a class token, and a "
            "causal text tower, pooled at the end of a text"
        )
    assert isinstance(image.preprocess, ImagePreprocess)
    positions, layers = _checked(image.module, image.preprocess, params)
    state = read_learnt(params.checkpoint)
    with parity.one_thread(), torch.inference_mode():
        end = text.module.tokens.weight[token_ids(net, ["object"])[0][-1]]
        sides = torch.cat([encoded(text.module, state, end, side, params.checkpoint) for side in SIDES])
    number = len(image.module.blocks)
    module = AnomalyTower(image.module, positions, sides.clone(), min(params.blocks, number), layers)
    softmaxes = attention_promises(image.module).get(SOFTMAX.name, 0)
    added = Tower(
        module,
        {"pixels": float32("B", 3, params.size, params.size)},
        {"map": float32("B", *positions.new), "score": float32("B")},
        ImagePreprocess.model_validate(
            image.preprocess.model_dump()
            | {"size": (params.size, params.size), "resize": "exact", "shortest": None, "keep_square": False}
        ),
        quantizer=image.quantizer,
        quantizer_params=image.quantizer_params,
        summary=summary,
        promises={SOFTMAX.name: softmaxes + min(params.blocks, number)} if softmaxes else {},
    )
    net = replace(net, towers={**net.towers, "anomaly": added}, tasks=(*net.tasks, "anomaly"))
    return with_note(net, f"AnomalyCLIP's prompts {hub.name(params.checkpoint)}", anomaly=params.checkpoint)


def summary(outputs: Arrays) -> Arrays:
    """How two runs are compared: by the logits of the score and of the map's cells, ``damage`` [B, 1 + h w]. All
    probabilities are positive, so their own cosine is near 1 for any two maps."""
    rows = [outputs["score"][:, None], outputs["map"].reshape(len(outputs["map"]), -1)]
    odds = np.clip(np.concatenate(rows, axis=1).astype(np.float64), 1e-6, 1 - 1e-6)
    return {"damage": (np.log(odds) - np.log1p(-odds)).astype(np.float32)}


def _checked(image: VisionTransformer, pixels: ImagePreprocess, params: Params) -> tuple[Positions, tuple[int, ...]]:
    """How positions change, and the map's layers."""
    patch, number = int(image.patch.kernel_size[0]), len(image.blocks)
    if params.size % patch:
        raise BadRequest(f"anomaly: size is {params.size}; expected a multiple of {patch}, the side of a patch")
    layers = params.layers or (number,)
    if len({*layers}) < len(layers) or not all(1 <= layer <= number for layer in layers):
        raise BadRequest(f"anomaly: layers are {[*layers]}; expected distinct numbers from 1 to {number}, its blocks")
    side = params.size // patch
    return Positions((pixels.size[0] // patch, pixels.size[1] // patch), (side, side), "bilinear"), layers


def read_learnt(path: Path) -> dict[str, Tensor]:
    """The tensors of the prompt learner. Raises `UnknownCheckpoint`."""
    tensors = {name.removeprefix(LEARNER): tensor.float() for name, tensor in read(path).tensors.items()}
    wanted = [f"{part}_{side}" for side in SIDES for part in ("token_prefix", "ctx", "token_suffix")]
    if absent := [name for name in wanted if name not in tensors]:
        raise UnknownCheckpoint(f"{path} lacks {LEARNER}{absent[0]} of an AnomalyCLIP checkpoint")
    if extra := [name for name in tensors if name not in wanted and not name.startswith((DEEP, *_UNUSED))]:
        raise UnknownCheckpoint(f"{path} holds {extra[0]}, which is no tensor of AnomalyCLIP")
    number = sum(name.startswith(DEEP) for name in tensors)
    if gap := [name for name in (f"{DEEP}{i}" for i in range(number)) if name not in tensors]:
        raise UnknownCheckpoint(f"{path} lacks {LEARNER}{gap[0]}, and has {number} deep prompts")
    return {name: tensors[name] for name in (*wanted, *(f"{DEEP}{i}" for i in range(number)))}


def encoded(text: TextTransformer, state: Mapping[str, Tensor], end: Tensor, side: str, path: Path) -> Tensor:
    """[1, D], the unit vector of one side. ``end`` [W]: the embedding of the token that ends a text. Raises
    `UnknownCheckpoint` for tensors that do not fit the text tower."""
    width, context = text.positions.shape[1], len(text.positions)
    rows = {name: rows_of(tensor, f"{path}: {LEARNER}{name}", width) for name, tensor in state.items()}
    parts, suffix = [rows[f"{part}_{side}"] for part in ("token_prefix", "ctx")], rows[f"token_suffix_{side}"]
    deep = [tensor for name, tensor in rows.items() if name.startswith(DEEP)]
    same = torch.isclose(suffix, end, rtol=_NEAR, atol=_NEAR * float(end.std())).all(-1)
    if not same.any():
        raise UnknownCheckpoint(
            f"{path}: {LEARNER}token_suffix_{side} has no token that ends a text of this base; give the CLIP that the "
            "prompts were tuned over"
        )
    last = len(parts[0]) + len(parts[1]) + int(same.int().argmax())
    prompt = torch.cat([*parts, suffix])[None, : last + 1]
    if last >= context or len(deep) >= len(text.blocks) or any(1 + len(rows) > last for rows in deep):
        raise UnknownCheckpoint(
            f"{path}: a prompt of {last + 1} tokens and {len(deep)} deep prompts do not fit a text tower of {context} "
            f"tokens and {len(text.blocks)} blocks; is it of another base?"
        )
    return F.normalize(text.projection(text.norm_post(run(text, prompt, deep)).flatten(1)), dim=-1)


def run(text: TextTransformer, prompt: Tensor, deep: Sequence[Tensor]) -> Tensor:
    """``prompt`` [1, T, W] -> [1, 1, W], the last token behind the last block. Before block i + 1 ``deep[i]`` takes the
    place of the tokens behind the first."""
    x = prompt + text.positions[: prompt.shape[1]]
    mask = text.mask(prompt.shape[1])
    *others, last = text.blocks
    for number, block in enumerate(others):
        x = block(replaced(x, deep, number), mask)
    pick = TokenAt(torch.tensor([prompt.shape[1] - 1]))
    answer: Tensor = last(replaced(x, deep, len(others)), mask, pick)
    return answer


def replaced(x: Tensor, deep: Sequence[Tensor], number: int) -> Tensor:
    if not 1 <= number <= len(deep):
        return x
    rows = deep[number - 1]
    return torch.cat([x[:, :1], rows[None], x[:, 1 + len(rows) :]], dim=1)


ADAPTERS.register("anomaly")(
    Adapter(
        Params,
        adapt,
        {"--anomalyclip": "checkpoint", "--anomaly-size": "size", "--anomaly-layers": "layers"},
        last=True,
    )
)
