"""The stored numbers of a bundle's graphs, and flipped bits in them.

Source: ProAct (code `hamidmousavi0/reliable-relu-toolbox`), its model of faults: at a rate r a memory of n bits has
int(n r) flipped bits at places drawn without replacement.

A stored number is an element of an initializer. Its kind follows from the input that reads it: the table `SLOTS` for
standard operators, the table of our operators for the others. Numbers that only change shape or type on the way keep
their kind. Not among the kinds: shapes, single numbers of arithmetic (an epsilon, the bounds of a Clip), a constant
mask or residual.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from calmclip.export.graph import constants
from calmclip.export.resilience.forms import HIGH, LOW
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest, BundleInvalid
from calmclip.models.flow import Array
from calmclip.models.ops.spec import DOMAIN
from calmclip.models.ops.table import OPS
from calmclip.models.runtime.session import Memory

Kind = Literal["weight", "bias", "scale", "zero"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Count = Literal["exact", "binomial"]
COUNTS: tuple[Count, ...] = get_args(Count)
MOST = 0.02  # a higher rate needs a permutation of all bits in memory, and no bundle survives it
_STORED = ("float32", "int8", "uint8", "int32")

_PRODUCT: dict[int, Kind] = {0: "weight", 1: "weight", 2: "bias"}
_NORM: dict[int, Kind] = {1: "weight", 2: "bias"}
_TABLE: dict[int, Kind] = {0: "weight"}
_QUANTIZER: dict[int, Kind] = {1: "scale", 2: "zero"}
_INTEGER: dict[int, Kind] = {0: "weight", 1: "weight", 2: "zero", 3: "zero"}
# operator -> input -> kind
SLOTS: dict[str, dict[int, Kind]] = {
    "Conv": _PRODUCT, "ConvTranspose": _PRODUCT, "Gemm": _PRODUCT, "MatMul": _PRODUCT,
    "LayerNormalization": _NORM, "GroupNormalization": _NORM, "InstanceNormalization": _NORM, "RMSNormalization": _NORM,
    "BatchNormalization": {1: "weight", 2: "bias", 3: "bias", 4: "weight"},
    "Gather": _TABLE, "GatherND": _TABLE, "Slice": _TABLE,
    "QuantizeLinear": _QUANTIZER, "DequantizeLinear": _QUANTIZER,
    "ConvInteger": _INTEGER, "MatMulInteger": _INTEGER,
}  # fmt: skip
# The same for a constant of more than one number: a single number is arithmetic, not a parameter.
_SEVERAL: dict[str, dict[int, Kind]] = {
    "Add": {0: "bias", 1: "bias"}, "Sub": {0: "bias", 1: "bias"},
    "Mul": {0: "weight", 1: "weight"}, "Div": {1: "weight"}, "PRelu": {1: "weight"},
}  # fmt: skip
# operator -> the input whose numbers it hands on. Clip and Where(IsNaN(x), y, x) are bounds on stored numbers.
_HAND_ON = {
    **dict.fromkeys(("Cast", "Clip", "DequantizeLinear", "Expand", "Flatten", "Gather", "Identity", "Reshape"), 0),
    **dict.fromkeys(("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"), 0),
    "Where": 2,
}
# the input of an operator of ours -> kind, by name and by ending
_NAMED: dict[str, Kind] = {"weight": "weight", "table": "weight", "bias": "bias"}
_ENDINGS: dict[str, Kind] = {"_scale": "scale", "_zero": "zero"}
_ORDER: tuple[Kind, ...] = ("scale", "zero", "weight", "bias")  # which kind of several a tensor has


def _kind(name: str) -> Kind | None:
    return _NAMED.get(name) or next((kind for end, kind in _ENDINGS.items() if name.endswith(end)), None)


_OURS: dict[str, dict[int, Kind]] = {
    op.name: {place: kind for place, name in enumerate(op.inputs) if (kind := _kind(name))} for op in OPS
}


def kinds(model: onnx.ModelProto) -> dict[str, Kind]:
    """Initializer -> its kind, for those that have one.

    A constant that multiplies integers (of an int8 table that a Gather or MatMul has read) is their scale. The bounds
    of `calibrate` have no kind, so a bundle with bounds has the faults of the bundle without.
    """
    fixed = {name: tensor for name, tensor in constants(model).items() if not name.endswith((LOW, HIGH))}
    integers = {name for name, tensor in fixed.items() if tensor.data_type in (TensorProto.INT8, TensorProto.UINT8)}
    origin = {name: name for name in fixed}  # tensor -> the initializer whose numbers it holds
    checked: dict[str, str] = {}  # the answer of an IsNaN -> what it reads
    read_as: dict[str, set[Kind]] = {}
    for node in model.graph.node:
        ours = node.domain == DOMAIN
        slots = (_OURS if ours else SLOTS).get(node.op_type, {})
        several = {} if ours else _SEVERAL.get(node.op_type, {})
        scales = node.op_type == "Mul" and bool(integers & {*node.input})
        for place, source in enumerate(map(origin.get, node.input)):
            if source is None:
                continue
            kind = slots.get(place)
            if scales:
                kind = None if node.input[place] in integers else "scale"
            elif kind is None and math.prod(fixed[source].dims) > 1:
                kind = several.get(place)
            if kind:
                read_as.setdefault(source, set()).add(kind)
        if node.op_type == "IsNaN":
            checked[node.output[0]] = node.input[0]
        handed = node.input[_HAND_ON[node.op_type]] if node.op_type in _HAND_ON else ""
        if handed in origin and (node.op_type != "Where" or checked.get(node.input[0]) == handed):
            origin |= dict.fromkeys(node.output, origin[handed])
        if node.op_type == "DynamicQuantizeLinear":
            integers.add(node.output[1])  # the scale of integers, which another scale multiplies
        elif node.op_type in (*_HAND_ON, "MatMul") and node.op_type != "DequantizeLinear":
            integers |= {*node.output} if integers & {*node.input} else set()
    return {name: next(kind for kind in _ORDER if kind in several) for name, several in read_as.items()}


@dataclass(frozen=True)
class Tensor:
    """One stored tensor. ``holders``: (role, initializer) of each graph that reads it, because graphs of a bundle share
    weights. ``data``: its numbers as they are stored; not to be changed."""

    kind: Kind
    data: Array
    holders: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return "/".join(self.holders[0])

    @property
    def width(self) -> int:
        """Bits of one number."""
        return self.data.dtype.itemsize * 8


@dataclass(frozen=True)
class Faults:
    """int64 [F] each: the index of a tensor, of a number in it, and of a bit (0 is the lowest). No two are equal."""

    tensor: Array
    place: Array
    bit: Array

    def __len__(self) -> int:
        return len(self.tensor)

    def of(self, tensors: Collection[int]) -> "Faults":
        """Those in some of the tensors."""
        kept = np.isin(self.tensor, [*tensors])
        return Faults(self.tensor[kept], self.place[kept], self.bit[kept])


def number(bits: int, rate: float, how: Count, rng: np.random.Generator) -> int:
    """Of faults in ``bits`` bits. exact: int(bits rate), so a small rate may mean none. binomial: each bit flips with
    the probability ``rate``, so the expectation holds for every rate."""
    # 1e-9: 10,000,000 bits at 3e-7 are 3 faults, although the float product is a little less
    return int(rng.binomial(bits, rate)) if how == "binomial" else math.floor(bits * rate + 1e-9)


def draw(
    tensors: Sequence[Tensor], count: int, rng: np.random.Generator, only: Mapping[int, Sequence[int]] | None = None
) -> Faults:
    """``count`` faults without replacement; every bit is equally likely.

    ``only``: tensor -> the bits of its numbers that may flip; by default all bits of all tensors. Equal lists of sizes
    and widths give equal faults for equal states of ``rng``. Raises `BadRequest` for more faults than bits.
    """
    chosen = {i: range(tensor.width) for i, tensor in enumerate(tensors)} if only is None else only
    owners, widths = np.array([*chosen], np.int64), np.array([len(bits) for bits in chosen.values()], np.int64)
    sizes = np.array([tensors[i].data.size for i in chosen], np.int64) * widths
    if count > sizes.sum():
        raise BadRequest(f"{count} faults were asked for; the chosen tensors have {sizes.sum()} bits")
    ends = np.cumsum(sizes)
    drawn = np.sort(rng.choice(int(ends[-1]), count, replace=False, shuffle=False)) if count else np.empty(0, np.int64)
    which = np.searchsorted(ends, drawn, side="right")
    inside = drawn - (ends - sizes)[which]
    bits = np.zeros((len(chosen), max(widths, default=0)), np.int64)
    for row, allowed in zip(bits, chosen.values(), strict=True):
        row[: len(allowed)] = allowed
    return Faults(owners[which], inside // widths[which], bits[which, inside % widths[which]])


def flipped(data: Array, place: Array, bit: Array) -> Array:
    """A copy of ``data`` with flipped bits: int64 [F] indices of its numbers, and of a bit in each."""
    copy = np.array(data, order="C")
    every = copy.reshape(-1).view(np.uint8)  # little endian, as ONNX stores them
    np.bitwise_xor.at(every, place * copy.itemsize + bit // 8, (1 << bit % 8).astype(np.uint8))
    return copy


class Store:
    """The stored tensors of some graphs of a bundle, and these graphs without them, for sessions in memory.

    ``tensors`` are those of the ``chosen`` kinds, in the order of their names. A tensor in a file that graphs share is
    one tensor with several holders: a fault in it reaches every graph that reads it. ``bounded``: whether `calibrate`
    made one of the graphs. Raises `TaskNotServed` for a graph
    that the bundle lacks, `BadRequest` if no tensor is of one of the kinds.
    """

    def __init__(self, bundle: Bundle, roles: Sequence[str], chosen: Collection[Kind] = KINDS) -> None:
        self.bundle, self.roles = bundle, tuple(roles)
        self._models: dict[str, bytes] = {}
        self._arrays: dict[str, dict[str, Array]] = {}
        holders: dict[tuple[str, str], list[tuple[str, str]]] = {}
        kinds_at: dict[tuple[str, str], set[Kind]] = {}
        self.bounded = False
        for role in roles:
            model = _model(bundle, role)
            kind_of, arrays = kinds(model), self._arrays.setdefault(role, {})
            self.bounded |= any(tensor.name.endswith((LOW, HIGH)) for tensor in model.graph.initializer)
            for tensor in model.graph.initializer:
                place, kind = _place(tensor), kind_of.get(tensor.name)
                if kind is None and place is None:
                    continue
                data = arrays[tensor.name] = _read(tensor, bundle)
                _leave_out(tensor)
                if kind and str(data.dtype) in _STORED and data.size:
                    at = place or (role, tensor.name)
                    holders.setdefault(at, []).append((role, tensor.name))
                    kinds_at.setdefault(at, set()).add(kind)
            self._models[role] = model.SerializeToString()
        self._places = {*holders}
        whole = [
            Tensor(next(kind for kind in _ORDER if kind in kinds_at[at]), self._arrays[by[0][0]][by[0][1]], tuple(by))
            for at, by in holders.items()
        ]
        self.tensors = sorted((tensor for tensor in whole if tensor.kind in chosen), key=lambda tensor: tensor.name)
        if not self.tensors:
            stored = ", ".join(kind for kind in KINDS if kind in {tensor.kind for tensor in whole})
            raise BadRequest(
                f"the graphs {', '.join(roles)} of {bundle.name} store no {' or '.join(chosen)}; they store "
                f"{stored or 'no parameters'}"
            )
        self.bits = sum(tensor.data.size * tensor.width for tensor in self.tensors)

    def changed(self, faults: Faults) -> dict[str, dict[str, Array]]:
        """Role -> initializer -> its numbers with the flipped bits, for the tensors with faults."""
        changes: dict[str, dict[str, Array]] = {}
        for index in np.unique(faults.tensor).tolist():
            tensor, hit = self.tensors[index], faults.tensor == index
            data = flipped(tensor.data, faults.place[hit], faults.bit[hit])
            for role, name in tensor.holders:
                changes.setdefault(role, {})[name] = data
        return changes

    def memory(self, role: str, changed: Mapping[str, Array] = MappingProxyType({})) -> Memory:
        """The graph ``role`` for a session, with ``changed`` initializers."""
        return Memory(self._models[role], {**self._arrays[role], **changed})

    def shared(self) -> dict[str, list[str]]:
        """Other graphs of the bundle that read some of the tensors -> the names of these tensors there."""
        others: dict[str, list[str]] = {}
        for role in self.bundle.manifest.graphs.keys() - {*self.roles}:
            for tensor in _model(self.bundle, role).graph.initializer:
                if _place(tensor) in self._places:
                    others.setdefault(role, []).append(tensor.name)
        return others


def _model(bundle: Bundle, role: str) -> onnx.ModelProto:
    return onnx.load(bundle.directory / bundle.graph(role).file, load_external_data=False)


def _place(tensor: TensorProto) -> tuple[str, str] | None:
    """File and offset of external data."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], entries.get("offset", "0")


def _read(tensor: TensorProto, bundle: Bundle) -> Array:
    place = _place(tensor)
    if place is None:
        return np.array(numpy_helper.to_array(tensor))
    file, offset = place
    if file not in bundle.manifest.files:
        raise BundleInvalid(f"{bundle.name}: {tensor.name} lies in {file!r}, which bundle.json does not list")
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return np.asarray(np.memmap(bundle.directory / file, dtype, "r", int(offset), tuple(tensor.dims)))


def _leave_out(tensor: TensorProto) -> None:
    """Its data comes from elsewhere: name, type and shape stay."""
    name, data_type, dims = tensor.name, tensor.data_type, [*tensor.dims]
    tensor.Clear()
    tensor.name, tensor.data_type, tensor.data_location = name, data_type, TensorProto.EXTERNAL
    tensor.dims.extend(dims)
    tensor.external_data.add(key="location", value="memory")
