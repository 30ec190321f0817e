"""CLIP-SVD: OpenAI's names, each matrix of a block as U diag(s) V^T, q, k and v apart. Reading merges the factors.

Source: Koleilat et al. 2025, CLIP-SVD (arXiv 2509.03740): ``fc_V.weight`` [r, in], ``vector_S`` [1, r], ``fc_U.weight``
[out, r], and the bias on fc_U. A matrix without factors keeps its plain name. Factors are merged in float64.
"""

import torch
from torch import Tensor

from calmclip.export.layouts import LAYOUTS, Layout, Misfit, Rule, rename
from calmclip.export.layouts.common import openai_clip

_MATRICES = {  # of a block
    "attn.q_proj": "attn.q",
    "attn.k_proj": "attn.k",
    "attn.v_proj": "attn.v",
    "attn.proj": "attn.out",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


def blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    rules = [*rename(theirs, ours, {"ln_1.{p}": "norm1.{p}", "ln_2.{p}": "norm2.{p}"})]
    for name, our_name in _MATRICES.items():
        matrix, merged = f"{theirs}.{name}", f"{ours}.{our_name}"
        rules.append(Rule(f"{matrix}.vector_S", f"{merged}.S", torch.Tensor.flatten))
        rules += rename(matrix, merged, {"fc_V.weight": "V", "fc_U.weight": "U", "fc_U.bias": "bias_U", "{p}": "{p}"})
    return tuple(rules)


def merge(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """W = U diag(s) V; then q, k and v concatenated, as in `torch.nn.MultiheadAttention`."""
    merged = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if kind == "U":
            merged[f"{layer}.weight"] = _product(state, layer)
            merged[f"{layer}.bias"] = state[f"{layer}.bias_U"]
        elif kind not in ("S", "V", "bias_U"):
            merged[name] = tensor
        elif f"{layer}.U" not in state:
            raise KeyError(f"{layer}.U")
    for name in [name for name in merged if name.rpartition(".")[0].endswith(".attn.q")]:
        block, _, kind = name.rpartition("q.")
        parts = [merged.pop(f"{block}{letter}.{kind}") for letter in "qkv"]
        if len({part.shape for part in parts}) > 1:
            layers = [f"{block}{letter}" for letter in "qkv"]
            names = [f"{layer}.V" if f"{layer}.V" in state else f"{layer}.weight" for layer in layers]
            raise Misfit("the shapes of {}, {} and {} do not go together", *names)
        merged[f"{block}qkv.{kind}"] = torch.cat(parts)
    return merged


def _product(state: dict[str, Tensor], layer: str) -> Tensor:
    names = [f"{layer}.{factor}" for factor in "USV"]
    u, s, v = (state[name] for name in names)
    if not (u.ndim == v.ndim == 2 and u.shape[1] == len(s) == v.shape[0]):
        raise Misfit("the shapes of {}, {} and {} do not go together", *names)
    return ((u.double() * s.double()) @ v.double()).float()


_SHARED = tuple(rule for rule in (*openai_clip.IMAGE, *openai_clip.text()) if ".blocks." not in rule.ours)

LAYOUTS.register("clip_svd")(
    Layout(
        title="CLIP-SVD on OpenAI's CLIP, merged",
        keys=("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight", "{rest}.fc_V.weight"),
        rules=(
            *_SHARED,
            *openai_clip.SCALARS,
            *blocks("visual.transformer.resblocks.{i}", "image.blocks.{i}"),
            *blocks("transformer.resblocks.{i}", "text.blocks.{i}"),
        ),
        required=openai_clip.REQUIRED,
        after_read=merge,
        facts=("activation",),
        settings=openai_clip.quick_gelu_settings,
    )
)
