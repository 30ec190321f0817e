"""Gates of attention, in the names of the paper's code: ``alpha`` beside query, key and value.

    alpha                                  [H]                      per_head
    alpha.weight  alpha.bias               [H, W]  [H]              all_heads
    alpha.{h}.weight|bias                  [1, d]  [1]              linear, a head each
    alpha.{h}.0.weight|bias  .2.weight|bias    [n, d] [n] [1, n] [1]    mlp, a head each

Source: Bondarenko et al. 2023 (arXiv 2306.12929) and its published code. What is there for each head is stacked: see
`calmclip.export.towers.attention`. Which softmax goes with it no tensor tells: configs do.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from calmclip.export.layouts import Misfit, Rule

_HEAD = re.compile(r"(.*\.attn\.gate\.)heads\.(\d+)\.(.*)")
_BLOCK = re.compile(r"(.*\.)(\d+)\.attn\.(gate|qkv)\..*")


def rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    """``theirs`` ends in ``alpha``, ``ours`` is a block's, such as ``text.blocks.{i}``."""
    gate = f"{ours}.attn.gate"
    return (
        Rule(theirs, f"{gate}.logits"),
        Rule(f"{theirs}.{{p}}", f"{gate}.{{p}}"),
        Rule(f"{theirs}.{{e}}.{{p}}", f"{gate}.heads.{{e}}.{{p}}"),
        Rule(f"{theirs}.{{e}}.0.{{p}}", f"{gate}.heads.{{e}}.hidden.{{p}}"),
        Rule(f"{theirs}.{{e}}.2.{{p}}", f"{gate}.heads.{{e}}.out.{{p}}"),
    )


def stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`Layout.finish`: tensors of single heads -> one of all. Raises `Misfit` naming those that do not go together,
    `KeyError` naming one that lacks."""
    _everywhere(state)
    found, heads = {}, {}
    for name, tensor in state.items():
        if match := _HEAD.fullmatch(name):
            gate, head, own = match.groups()
            heads.setdefault(gate + own, {})[int(head)] = (name, tensor)
        else:
            found[name] = tensor
    for stem, parts in heads.items():
        if absent := {*range(max(parts) + 1)} - parts.keys():
            gate, _, own = stem.partition(".gate.")
            raise KeyError(f"{gate}.gate.heads.{min(absent)}.{own}")
        name = stem.replace(".gate.out.", ".gate.")
        names, tensors = zip(*(parts[head] for head in range(len(parts))), strict=True)
        if name in state:
            raise Misfit("a gate is for each head or for all; {} is for all, and there are others", name)
        if name in found:
            raise Misfit("a head's gate is linear or an mlp; {} is of one, and there are others", names[0])
        if len({tensor.shape for tensor in tensors}) > 1:
            odd = next(i for i, tensor in enumerate(tensors) if tensor.shape != tensors[0].shape)
            raise Misfit("heads have gates of one shape; {} and {} differ", names[0], names[odd])
        whole = torch.stack(tensors)
        one_each = ".gate.hidden." not in name  # the last layer answers one number
        if one_each and whole.shape[1:2] != (1,):
            raise Misfit("a head's gate answers one number; {} answers others", names[0])
        found[name] = whole[:, 0] if one_each else whole
    return found


def _everywhere(state: Mapping[str, Tensor]) -> None:
    """A tower whose gates were lost here and there is none that was trained so."""
    towers: dict[str, dict[str, dict[str, str]]] = {}
    for name in state:
        if match := _BLOCK.fullmatch(name):
            tower, block, what = match.groups()
            towers.setdefault(tower, {}).setdefault(what, {}).setdefault(block, name)
    for blocks in towers.values():
        gated, every = blocks.get("gate", {}), blocks.get("qkv", {})
        if gated and (bare := sorted(every.keys() - gated.keys(), key=int)):
            raise Misfit(
                f"every block has a gate or none has; there is {{}}, but none in block {bare[0]}", min(gated.values())
            )


def unstacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round, for a checkpoint that is written: what is one tensor there stays one."""
    found = {}
    for name, tensor in state.items():
        gate, sign, own = name.partition(".attn.gate.")
        stem = f"{gate}{sign}"
        alone = own == "logits" or (own in ("weight", "bias") and _all_heads(state, stem))
        if not sign or alone:
            found[name] = tensor
            continue
        last = "out." * (f"{stem}hidden.weight" in state)
        for head, one in enumerate(tensor):
            if own.startswith("hidden."):
                found[f"{stem}heads.{head}.{own}"] = one
            else:
                found[f"{stem}heads.{head}.{last}{own}"] = one[None]
    return found


def _all_heads(state: Mapping[str, Tensor], stem: str) -> bool:
    width = state[f"{stem.removesuffix('gate.')}qkv.weight"].shape[1]
    return f"{stem}hidden.weight" not in state and state[f"{stem}weight"].shape[-1] == width
