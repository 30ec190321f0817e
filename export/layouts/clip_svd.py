"""CLIP-SVD: OpenAI's names, each matrix of a block as U diag(s) V^T, q, k and v apart; merged as it is read.

Source: Koleilat et al. 2025, CLIP-SVD (arXiv 2509.03740): ``fc_V.weight`` [r, in], ``vector_S`` [1, r], ``fc_U.weight``
[out, r], and the bias on fc_U. What was not factored keeps its plain name. Merged in float64.
"""

import torch
from torch import Tensor

from calmclip.export.layouts import LAYOUTS, Layout, Misfit, Rule, _openai, long_clip

_MATRICES = {  # of a block; theirs -> ours
    "attn.q_proj": "attn.q",
    "attn.k_proj": "attn.k",
    "attn.v_proj": "attn.v",
    "attn.proj": "attn.out",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


def blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    rules = [
        Rule(f"{theirs}.{{i}}.ln_1.{{p}}", f"{ours}.blocks.{{i}}.norm1.{{p}}"),
        Rule(f"{theirs}.{{i}}.ln_2.{{p}}", f"{ours}.blocks.{{i}}.norm2.{{p}}"),
    ]
    for one, other in _MATRICES.items():
        their, our = f"{theirs}.{{i}}.{one}", f"{ours}.blocks.{{i}}.{other}"
        rules += [
            Rule(f"{their}.fc_V.weight", f"{our}.V"),
            Rule(f"{their}.vector_S", f"{our}.S", torch.Tensor.flatten),
            Rule(f"{their}.fc_U.weight", f"{our}.U"),
            Rule(f"{their}.fc_U.bias", f"{our}.bias_U"),
            Rule(f"{their}.{{p}}", f"{our}.{{p}}"),
        ]
    return tuple(rules)


def merge(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """W = U diag(s) V; then q, k and v one above the other, as `torch.nn.MultiheadAttention` has them."""
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
        names = [f"{block}{one}.{kind}" for one in "qkv"]
        parts = [merged.pop(one) for one in names]
        if len({part.shape for part in parts}) > 1:
            inner = [f"{block}{one}.V" if f"{block}{one}.V" in state else f"{block}{one}.weight" for one in "qkv"]
            raise Misfit("the shapes of {}, {} and {} do not go together", *inner)
        merged[f"{block}qkv.{kind}"] = torch.cat(parts)
    return merged


def _product(state: dict[str, Tensor], layer: str) -> Tensor:
    names = [f"{layer}.{one}" for one in "USV"]
    u, s, v = (state[name] for name in names)
    if not (u.ndim == v.ndim == 2 and u.shape[1] == len(s) == v.shape[0]):
        raise Misfit("the shapes of {}, {} and {} do not go together", *names)
    return ((u.double() * s.double()) @ v.double()).float()


_SHARED = tuple(rule for rule in (*_openai.IMAGE, *_openai.text()) if ".blocks." not in rule.ours)

LAYOUTS.register("clip_svd")(
    Layout(
        title="CLIP-SVD on OpenAI's CLIP, merged",
        keys=("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight", "{rest}.fc_V.weight"),
        rules=(
            *_SHARED,
            *_openai.SCALARS,
            *blocks("visual.transformer.resblocks", "image"),
            *blocks("transformer.resblocks", "text"),
        ),
        needs=_openai.NEEDS,
        finish=merge,
        asks=("activation",),
        settings=long_clip.settings,
    )
)
