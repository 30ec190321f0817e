"""Run a float graph over calibration feeds and look at its tensors: the ranges that static quantizers need.

A routed expert may get no token of any feed. Then its tensors have no values, and each takes the widest range of the
same tensor of the other experts of its layer: their inputs are rows of one tensor, and experts that were tuned from one
network answer in similar ranges. A value beyond the range is cut, as everywhere.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx

from calmclip.export.graph import module_of, tap
from calmclip.export.quantizers import Feeds
from calmclip.models.errors import BadRequest, ExportError
from calmclip.models.flow import Array

T = TypeVar("T")
_EXPERT = re.compile(r"(?P<layer>.*)\.experts\.(?P<expert>\d+)\.(?P<part>.*)")  # the path of a module in an expert


class Observed(dict[str, T]):
    """By tensor. ``borrowed``: a tensor of a starved expert -> the tensors that lend it their values. ``starved``: the
    modules of these experts."""

    borrowed: Mapping[str, tuple[str, ...]] = {}
    starved: tuple[str, ...] = ()

    def lent(self, values: Mapping[str, Any], merge: Callable[[list[Any]], Any]) -> "Observed[Any]":
        """``values`` of the tensors that have some, and ``merge([values of each lender])`` of the others."""
        lent = {name: merge([values[lender] for lender in lenders]) for name, lenders in self.borrowed.items()}
        observed = Observed[Any]({**values, **lent})
        observed.borrowed, observed.starved = self.borrowed, self.starved
        return observed


def collect(
    model: onnx.ModelProto, feeds: Feeds, names: Sequence[str], summarize: Callable[[str, Array], T]
) -> Observed[list[T]]:
    """Run ``model`` over ``feeds``; -> tensor -> ``summarize(tensor, values)``, one entry per feed. The tensors of
    starved experts are left out and listed (`Observed.borrowed`).

    Raises `BadRequest` if there are no feeds; `ExportError` naming a tensor that holds NaN or infinity, or that is
    empty for every feed and no expert's.
    """
    run = tap(model, names)
    summaries: dict[str, list[T]] = {name: [] for name in names}
    number = 0
    for number, feed in enumerate(feeds, 1):
        for name, values in run(feed).items():
            if not np.isfinite(values).all():
                raise ExportError(
                    f"the float graph's tensor {name!r} holds NaN or infinity on calibration input {number}, so it has "
                    "no range; look at the checkpoint's weights, or at that input"
                )
            if values.size:  # an expert of a mixture may get no token
                summaries[name].append(summarize(name, values))
    if names and not number:
        raise BadRequest("there is nothing to calibrate on; give pictures (--images) or texts (--texts)")
    observed = Observed({name: values for name, values in summaries.items() if values})
    observed.borrowed, observed.starved = _lenders(model, [name for name in names if name not in observed], observed)
    return observed


def reduced(observed: Observed[list[T]], reduce: Callable[[list[T]], tuple[Any, Any]]) -> Observed[tuple[Any, Any]]:
    """``reduce(entries)`` of each tensor; for starved experts the widest range of the lenders."""
    return observed.lent({name: reduce(entries) for name, entries in observed.items()}, widest)


def _lenders(
    model: onnx.ModelProto, empty: Sequence[str], known: Collection[str]
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """-> each tensor of ``empty`` with the ``known`` tensors at its place in the other experts; and the experts without
    tokens. Raises `ExportError` for a tensor that has none."""
    places = _places(model) if empty else {}
    at = {name: place for place, tensors in places.items() for name in tensors.values()}
    borrowed, starved = {}, dict[str, None]()
    for name in empty:
        tensors = places.get(at.get(name, ()), {})
        borrowed[name] = tuple(tensor for tensor in tensors.values() if tensor in known)
        if not borrowed[name]:
            raise ExportError(
                f"no calibration input gives {name} a value, and {len(empty)} tensors in all, so they have no range; "
                "give more pictures or texts, or, if experts are routed, export with --experts dense"
            )
        layer = at[name][0]
        starved |= dict.fromkeys(f"{layer}.experts.{expert}" for expert, of in tensors.items() if of == name)
    return borrowed, tuple(starved)


def _places(model: onnx.ModelProto) -> dict[tuple[Any, ...], dict[int, str]]:
    """A place in the experts of a layer -> expert -> the tensor there. A place is the layer, the module in the expert,
    the index of a node in that module, and the index of one of its inputs or outputs."""
    places: dict[tuple[Any, ...], dict[int, str]] = {}
    nodes: Counter[str] = Counter()
    for node in model.graph.node:
        if match := _EXPERT.fullmatch(module := module_of(node)):
            layer, expert, part = match.groups()
            for side, tensors in enumerate((node.input, node.output)):
                for index, name in enumerate(tensors):
                    places.setdefault((layer, part, nodes[module], side, index), {})[int(expert)] = name
            nodes[module] += 1
    return places


def extremes(values: Array, axis: int | None = None) -> tuple[Array, Array]:
    """Minimum and maximum of ``values``, for each position along ``axis`` if it is given."""
    others = None if axis is None else tuple(i for i in range(values.ndim) if i != axis % values.ndim)
    return values.min(axis=others), values.max(axis=others)


def widest(limits: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """The smallest range that holds all ``limits``: numbers, or lists of numbers."""
    return np.min([low for low, _ in limits], axis=0).tolist(), np.max([high for _, high in limits], axis=0).tolist()
