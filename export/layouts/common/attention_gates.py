"""Gates of attention, in the names of the paper's code: ``alpha`` beside query, key and value.

    alpha                                  [H]                      per_head
    alpha.weight  alpha.bias               [H, W]  [H]              all_heads
    alpha.{h}.weight|bias                  [1, d]  [1]              linear, one for each head
    alpha.{h}.0.weight|bias  .2.weight|bias    [n, d] [n] [1, n] [1]    mlp, one for each head

Source: Bondarenko et al. 2023 (arXiv 2306.12929) and its published code. Tensors of single heads are stacked: see
`calmclip.export.towers.attention`. The softmax is in the configs; no tensor tells it.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from calmclip.export.layouts import Misfit, Rule, rename

_HEAD = re.compile(r"(.*\.attn\.gate\.)heads\.(\d+)\.(.*)")
_BLOCK = re.compile(r"(.*\.)(\d+)\.attn\.(gate|qkv)\..*")


def rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    """``theirs`` ends in ``alpha``. ``ours`` is the name of a block, such as ``text.blocks.{i}``."""
    gate = f"{ours}.attn.gate"
    names = {"{p}": "{p}", "{e}.{p}": "heads.{e}.{p}", "{e}.0.{p}": "heads.{e}.hidden.{p}"}
    return (Rule(theirs, f"{gate}.logits"), *rename(theirs, gate, {**names, "{e}.2.{p}": "heads.{e}.out.{p}"}))


def stack_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`Layout.after_read`: tensors of single heads -> one tensor of all heads. Raises `Misfit` with those that do not
    go together, `KeyError` with the name of a missing tensor."""
    _check_all_blocks(state)
    stacked: dict[str, Tensor] = {}
    heads: dict[str, dict[int, tuple[str, Tensor]]] = {}
    for name, tensor in state.items():
        if match := _HEAD.fullmatch(name):
            gate, head, end = match.groups()
            heads.setdefault(gate + end, {})[int(head)] = (name, tensor)
        else:
            stacked[name] = tensor
    for stem, parts in heads.items():
        if absent := {*range(max(parts) + 1)} - parts.keys():
            gate, _, end = stem.partition(".gate.")
            raise KeyError(f"{gate}.gate.heads.{min(absent)}.{end}")
        name = stem.replace(".gate.out.", ".gate.")
        names, tensors = zip(*(parts[head] for head in range(len(parts))), strict=True)
        if name in state:
            raise Misfit("a gate is for each head or for all heads; {} is for all, other tensors are not", name)
        if name in stacked:
            raise Misfit("the gate of a head is linear or an mlp; {} is of one kind, other tensors are not", names[0])
        if odd := next((i for i, tensor in enumerate(tensors) if tensor.shape != tensors[0].shape), None):
            raise Misfit("the gates of all heads have one shape; {} and {} differ", names[0], names[odd])
        gates = torch.stack(tensors)
        one_number = ".gate.hidden." not in name  # the last layer of a gate
        if one_number and gates.shape[1:2] != (1,):
            raise Misfit("the gate of a head answers one number; {} answers more", names[0])
        stacked[name] = gates[:, 0] if one_number else gates
    return stacked


def _check_all_blocks(state: Mapping[str, Tensor]) -> None:
    """Raises `Misfit` if some blocks of a tower have gates and others do not: no tower was trained so."""
    towers: dict[str, dict[str, dict[str, str]]] = {}
    for name in state:
        if match := _BLOCK.fullmatch(name):
            tower, block, kind = match.groups()
            towers.setdefault(tower, {}).setdefault(kind, {}).setdefault(block, name)
    for blocks in towers.values():
        gated, attending = blocks.get("gate", {}), blocks.get("qkv", {})
        if gated and (bare := sorted(attending.keys() - gated.keys(), key=int)):
            raise Misfit(
                f"all blocks have a gate, or none; the checkpoint has {{}}, but no gate in block {bare[0]}",
                min(gated.values()),
            )


def unstack_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `stack_heads`. A gate that is one tensor in a checkpoint stays one tensor."""
    tensors = {}
    for name, tensor in state.items():
        block, gate, end = name.partition(".attn.gate.")
        stem = f"{block}{gate}"
        all_heads = end == "logits" or (end in ("weight", "bias") and _reads_all_heads(state, stem))
        if not gate or all_heads:
            tensors[name] = tensor
            continue
        last = "out." * (f"{stem}hidden.weight" in state)
        for head, weights in enumerate(tensor):
            if end.startswith("hidden."):
                tensors[f"{stem}heads.{head}.{end}"] = weights
            else:
                tensors[f"{stem}heads.{head}.{last}{end}"] = weights[None]
    return tensors


def _reads_all_heads(state: Mapping[str, Tensor], stem: str) -> bool:
    width = state[f"{stem.removesuffix('gate.')}qkv.weight"].shape[1]
    return f"{stem}hidden.weight" not in state and state[f"{stem}weight"].shape[-1] == width
