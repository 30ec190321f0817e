"""FAMILY nets: a checkpoint -> `Net`: what the pipeline needs to know to make a bundle of it."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from calmclip.export.layouts import Layout
from calmclip.models.bundle.manifest import (
    DefaultClassifier,
    ImagePreprocess,
    Source,
    SuppressionDefaults,
    Tensor,
    TextPreprocess,
)
from calmclip.models.flow import Arrays
from calmclip.models.registry import Registry


@dataclass(frozen=True)
class Tower:
    """One torch module that becomes one graph.

    ``module(*inputs)`` takes tensors in the order of ``inputs`` and returns one tensor, or a tuple in the order
    of ``outputs``. String dimensions of the specs ("B", "T") are dynamic in the graph. ``quantizer``: the
    plug-in that keeps this tower's accuracy, used unless the recipe names another. ``summary``: for outputs whose rows
    may come in another order for a difference of rounding: outputs -> what two graphs are compared by. ``promises``:
    op of ours -> how many of it the rewrites must find a place for, by the checkpoint's own config.
    """

    module: torch.nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    preprocess: ImagePreprocess | TextPreprocess | None
    quantizer: str
    quantizer_params: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""  # of its tensors among those by our names, for adapters and for a checkpoint that is written
    summary: Callable[[Arrays], Arrays] | None = None
    promises: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """A graph of standard ops made without torch (for example `detect`); never quantized.

    ``attach``: rewrites that put an op of ours at its end, after which it takes and answers what the bundle promises.
    ``examples``: feeds on which it is compared before and after it is rewritten. ``promises``: as of a `Tower`.
    """

    model: onnx.ModelProto
    batch: bool = False
    attach: tuple[str, ...] = ()
    examples: tuple[Arrays, ...] = ()
    promises: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Net:
    """A loaded checkpoint.

    ``files``: what else goes into the bundle by name (tokenizer.json, labels.json). ``ranges``: role -> a JSON
    file of activation ranges that ship with the net, used when no calibration pictures are given.
    """

    name: str
    source: Source
    tasks: tuple[str, ...]
    towers: Mapping[str, Tower]
    files: Mapping[str, bytes]
    classifier: DefaultClassifier | None = None
    built: Mapping[str, Built] = field(default_factory=dict)
    ranges: Mapping[str, Path] = field(default_factory=dict)
    keep_float: bool = False  # export seals NAME-float beside NAME-int8 unless told otherwise
    bars: Mapping[str, float] = field(default_factory=dict)  # defaults of the recipe's bars for this net
    layout: Layout | None = None  # by which its tensors are named, where they may be written again
    folded: bool = True  # its modules are as they are traced; see `ready`
    adapters: tuple[str, ...] = ()  # those that were done, in order
    suppression: SuppressionDefaults | None = None  # of a detect request, where calmclip's do not suit its scores


@dataclass(frozen=True)
class NetPlugin:
    """``recognise(checkpoint)``: is this directory, file or built-in name one of ours? ``load(checkpoint, weights)``.

    ``weights``: what the recipe says of them; the default says nothing. ``unfolded(checkpoint, weights)``: the same net
    before its modules are folded, for adapters and for training; None where the kind has no such form. `ready` makes of
    it what ``load`` answers.
    """

    recognise: Callable[[str], bool]
    load: Callable[..., Net]
    unfolded: Callable[..., Net] | None = None


def ready(net: Net) -> Net:
    """``net`` with modules as they are traced: folded, as copies that share with its own the tensors that folding
    leaves as they are. A net that is folded already, as it is."""
    if net.folded:
        return net
    towers = {role: replace(tower, module=_folded(tower.module)) for role, tower in net.towers.items()}
    return replace(net, towers=towers, folded=True)


def _folded(module: torch.nn.Module) -> torch.nn.Module:
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copy: torch.nn.Module = deepcopy(module, shared)
    _fold(copy)
    return copy.eval()


def _fold(module: Any) -> None:
    """The outermost modules that know how: an adapter may have put one of its own around them."""
    if hasattr(module, "fold"):
        module.fold()
    else:
        for child in module.children():
            _fold(child)


def reads(tokens: TextPreprocess) -> dict[str, Tensor]:
    """The inputs of a graph of texts."""
    return {name: Tensor(dtype=dtype, shape=shape) for name, (dtype, shape) in tokens.feeds().items()}  # type: ignore[arg-type]


def bucketed(tokens: TextPreprocess) -> TextPreprocess:
    """Where texts are as long as the longest of their call: made up to a multiple of 4, so that more of them are of one
    length and share a run. 8 and 16 cost more tokens than they merge calls."""
    return tokens if tokens.pad == "context" else tokens.model_copy(update={"multiple": 4})


NETS: Registry[NetPlugin] = Registry("nets", "calmclip.export.nets")
