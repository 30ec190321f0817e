"""Tiny towers with random weights in the style of BERT, OPT, ViT and CLIP's text tower."""

import numpy as np
import torch
from torch import Tensor, nn

from calmclip.export.gates import GateKind
from calmclip.export.nets import Tower
from calmclip.export.towers import Style
from calmclip.export.towers.attention import AttentionSpec, Softmax, new_gate
from calmclip.export.towers.bert import BertText
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer
from calmclip.models.bundle.manifest import Tensor as Spec
from calmclip.models.flow import Arrays

WIDTH, HEADS, HIDDEN, WORDS, CONTEXT, OUT, LAYERS = 32, 4, 80, 50, 16, 16, 2
PATCHES, SIDE = 16, 16
KINDS = ("bert", "opt", "vit", "clip")
_IDS = Spec(dtype="int64", shape=("B", "T"))
_FEATURES = {"features": Spec(dtype="float32", shape=("B", OUT))}
Shapes = dict[str, tuple[int, ...]]


def drawn(shapes: Shapes) -> dict[str, Tensor]:
    """Random tensors. Norms at 1 or biases at 0 would hide an error in how they are used."""
    return {name: torch.randn(shape) * (1.0 if len(shape) < 2 else shape[-1] ** -0.5) for name, shape in shapes.items()}


def block(gate: GateKind = "none") -> dict[str, Tensor]:
    state = drawn({
        **_norm("norm1"), **_norm("norm2"),
        "attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.qkv.bias": (3 * WIDTH,),
        "attn.out.weight": (WIDTH, WIDTH), "attn.out.bias": (WIDTH,),
        "mlp.up.weight": (HIDDEN, WIDTH), "mlp.up.bias": (HIDDEN,),
        "mlp.down.weight": (WIDTH, HIDDEN), "mlp.down.bias": (WIDTH,),
    })  # fmt: skip
    return state | {f"attn.gate.{name}": tensor for name, tensor in new_gate(gate, HEADS, WIDTH).items()}


def state_of(kind: str, gate: GateKind = "none") -> dict[str, Tensor]:
    """The tensors of a ``kind`` of tower, by our names."""
    shapes: Shapes = {"projection.weight": (OUT, WIDTH)}
    if kind == "vit":
        shapes |= {"patch.weight": (WIDTH, 3, 4, 4), "patch.bias": (WIDTH,), "cls": (WIDTH,)}
        shapes |= {"positions": (1 + PATCHES, WIDTH), **_norm("norm_post")}
    else:
        shapes |= {"tokens.weight": (WORDS, WIDTH), "positions": (CONTEXT, WIDTH)}
        shapes |= {"types": (2, WIDTH), **_norm("norm_pre")} if kind == "bert" else _norm("norm_post")
    state = drawn(shapes)
    for i in range(LAYERS):
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in block(gate).items()}
    return state


def tower_of(kind: str, state: dict[str, Tensor], softmax: Softmax | None = None) -> Tower:
    """bert: post-norm, masked, mean of tokens. opt: causal, ReLU, mean. vit: class token. clip: causal, QuickGELU, end
    token. The last block of vit and clip computes the pooled token alone."""
    attention = AttentionSpec(softmax or Softmax())
    style = {
        "bert": Style(HEADS, pool="mean", attention=attention),
        "opt": Style(HEADS, pool="mean", causal=True, activation="relu", attention=attention),
        "vit": Style(HEADS, pool="cls", attention=attention),
        "clip": Style(HEADS, pool="eot", end=WORDS - 1, causal=True, activation="quick_gelu", attention=attention),
    }[kind]
    module: nn.Module
    if kind == "vit":
        module, inputs = VisionTransformer(state, style), {"pixels": Spec(dtype="float32", shape=("B", 3, SIDE, SIDE))}
    elif kind == "bert":
        module, inputs = BertText(state, style, CONTEXT), {"ids": _IDS, "mask": _IDS}
    else:
        module, inputs = TextTransformer(state, style), {"ids": _IDS}
    module.load_state_dict(state)
    module.requires_grad_(False)
    module.fold()
    return Tower(module.eval(), inputs, _FEATURES, None, "none")


def feeds_of(tower: Tower, count: int, seed: int = 0) -> list[Arrays]:
    """``count`` inputs of one row each; texts have 4 to 16 tokens."""
    random = np.random.default_rng(seed)
    if "pixels" in tower.inputs:
        return [{"pixels": random.standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)} for _ in range(count)]
    feeds: list[Arrays] = []
    for _ in range(count):
        ids = random.integers(0, WORDS - 1, (1, random.integers(4, CONTEXT + 1)))
        ids[0, -1] = WORDS - 1
        feeds.append({name: ids if name == "ids" else np.ones_like(ids) for name in tower.inputs})
    return feeds


def _norm(name: str) -> Shapes:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
