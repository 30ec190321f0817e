"""FAMILY nets: a checkpoint -> `Net`, from which the pipeline makes a bundle."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import onnx

from calmclip.models.bundle.manifest import (
    DefaultClassifier,
    ExplainDefaults,
    ImagePreprocess,
    SegmentationDefaults,
    Source,
    SuppressionDefaults,
    Tensor,
    TextPreprocess,
    VectorPreprocess,
)
from calmclip.models.flow import Arrays
from calmclip.models.ops.spec import SOFTMAX
from calmclip.models.registry import Registry

if TYPE_CHECKING:
    import torch

    from calmclip.export.layouts import Layout

_ABSENT: Any = None
Reads = TypeVar("Reads", TextPreprocess, VectorPreprocess, TextPreprocess | VectorPreprocess)


@dataclass(frozen=True)
class Tower:
    """One torch module that becomes one graph, or such a graph.

    ``module(*inputs)`` takes tensors in the order of ``inputs`` and returns one tensor, or a tuple in the order
    of ``outputs``. String dimensions of the specs ("B", "T") are dynamic in the graph. ``quantizer``: the
    plug-in that keeps this tower's accuracy, used unless the recipe names another. ``prefix``: of its tensors among
    those by our names, for adapters and for a written checkpoint. ``summary``: outputs -> the arrays by which two
    graphs are compared, for outputs whose rows may change their order by a rounding error. ``promises``: op of ours ->
    the number of nodes that the rewrites must replace by it, from the checkpoint's own config. ``feeds``: pictures ->
    the inputs of a graph that has no preprocessing. ``batch``: as in the manifest's `Graph`. ``graph``: the float
    graph, if the net ships it; then there is no module, and no adapter fits. ``reads``: input -> the role of the tower
    that has an output of this name, or "role.output"; that tower stands before it in the net. With preprocessing these
    are inputs beside its feeds.
    An input that the other tower has too is the same in both: the tokens of a text.
    ``borrows``: the role of a tower before it that has all weights of this one. Then its INT8 graph computes in float,
    with the INT8 weights of that tower's graph (`calmclip.export.borrow`), so that they are stored once.
    ``cut_from``: the role of a tower before it whose graph has all outputs of this one. Then its graph is cut from that
    graph, so that they share every weight, in INT8 too.
    """

    module: "torch.nn.Module"
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    preprocess: ImagePreprocess | TextPreprocess | VectorPreprocess | None
    quantizer: str
    quantizer_params: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    summary: Callable[[Arrays], Arrays] | None = None
    promises: Mapping[str, int] = field(default_factory=dict)
    graph: onnx.ModelProto | None = None
    reads: Mapping[str, str] = field(default_factory=dict)
    cut_from: str = ""
    borrows: str = ""
    feeds: Callable[[Sequence[Path]], Iterator[Arrays]] | None = None
    batch: bool = True

    @classmethod
    def drawn(cls, graph: onnx.ModelProto | None, *arguments: Any, **settings: Any) -> "Tower":
        """A tower without a module."""
        return replace(cls(_ABSENT, *arguments, **settings), graph=graph)


@dataclass(frozen=True)
class Built:
    """A graph of standard ops that is built without torch (for example `detect`). It is never quantized.

    ``attach``: rewrites that append an op of ours; the result has the inputs and outputs that the bundle promises.
    ``examples``: feeds on which the graphs before and after the rewrites are compared. ``promises``: as in `Tower`.
    """

    model: onnx.ModelProto
    batch: bool = False
    attach: tuple[str, ...] = ()
    examples: tuple[Arrays, ...] = ()
    promises: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Net:
    """A loaded checkpoint.

    ``files``: other files of the bundle by name (tokenizer.json, labels.json). ``ranges``: role -> a JSON file of
    activation ranges that ship with the net, used when no calibration pictures are given. ``offers``: adapter ->
    what it does to this net instead: it adds a tower whose graph ships with the net.
    """

    name: str
    source: Source
    tasks: tuple[str, ...]
    towers: Mapping[str, Tower]
    files: Mapping[str, bytes]
    classifier: DefaultClassifier | None = None
    built: Mapping[str, Built] = field(default_factory=dict)
    ranges: Mapping[str, Path] = field(default_factory=dict)
    offers: Mapping[str, Callable[["Net"], "Net"]] = field(default_factory=dict)
    keep_float: bool = False  # export seals NAME-float beside NAME-int8 unless told otherwise
    bars: Mapping[str, float] = field(default_factory=dict)  # defaults of the recipe's bars for this net
    layout: "Layout | None" = None  # the table of names, if a checkpoint of it can be written
    folded: bool = True  # its modules are ready to be traced; see `ready`
    adapters: tuple[str, ...] = ()  # the adapters that were applied, in order
    suppression: SuppressionDefaults | None = None  # of a detect request, if calmclip's do not suit its scores
    segmentation: SegmentationDefaults | None = None  # of a segment request, likewise
    explain: ExplainDefaults | None = None  # of an explain request, if something was fitted to the net
    variant: str = ""  # the default name of its bundles ends in it
    languages: tuple[str, ...] = ()  # BCP 47 tags, as in the manifest
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # adapter -> what it measured, for the report
    times: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the same of this run alone, not sealed


@dataclass(frozen=True)
class NetPlugin:
    """``recognise(checkpoint)``: is this directory, file or built-in name of this kind? ``load(checkpoint, weights)``.

    ``weights``: facts from the recipe, by default none. ``unfolded(checkpoint, weights)``: the same net before its
    modules are folded, for adapters and for training; None if the kind has no such form. `ready` turns it into the
    result of ``load``. ``complete(net)``: adds graphs that are made for the net after all adapters.
    """

    recognise: Callable[[str], bool]
    load: Callable[..., Net]
    unfolded: Callable[..., Net] | None = None
    complete: Callable[[Net], Net] = lambda net: net


def ready(net: Net) -> Net:
    """``net`` with folded modules, ready to be traced. They are copies that share all tensors that folding does not
    change. A folded net is returned as it is."""
    if net.folded:
        return net
    towers = {
        role: tower if tower.graph else replace(tower, module=_folded(tower.module))
        for role, tower in net.towers.items()
    }
    return replace(net, towers=towers, folded=True)


def _folded(module: "torch.nn.Module") -> "torch.nn.Module":
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copy: torch.nn.Module = deepcopy(module, shared)
    _fold(copy)
    return copy.eval()


def _fold(module: Any) -> None:
    """Folds the outermost modules that can fold: an adapter may have wrapped them in a module of its own."""
    if hasattr(module, "fold"):
        module.fold()
    else:
        for child in module.children():
            _fold(child)


def attention_promises(module: "torch.nn.Module") -> dict[str, int]:
    """`Tower.promises`: one Softmax for each attention module of ours. Modules of libraries promise nothing."""
    number = sum(getattr(inner, "attends", 0) for inner in module.modules())
    return {SOFTMAX.name: number} if number else {}


def float32(*shape: int | str) -> Tensor:
    return Tensor(dtype="float32", shape=shape)


def text_inputs(tokens: TextPreprocess | VectorPreprocess) -> dict[str, Tensor]:
    """The inputs of a text graph."""
    return {name: Tensor(dtype=dtype, shape=shape) for name, (dtype, shape) in tokens.feeds().items()}  # type: ignore[arg-type]


def bucketed(tokens: Reads) -> Reads:
    """Texts that are padded to the longest of their call are padded to a multiple of 4: more calls then have the same
    length and share a run. Multiples of 8 and 16 add more tokens than they save runs."""
    short = isinstance(tokens, TextPreprocess) and tokens.pad == "longest"
    return tokens.model_copy(update={"multiple": 4}) if short else tokens


NETS: Registry[NetPlugin] = Registry("nets", "calmclip.export.nets")
