"""FAMILY quantizers: a float graph, and what its tensors were seen to hold -> an INT8 graph of standard ops."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import onnx

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array, Arrays
from calmclip.models.registry import Registry

P = TypeVar("P", bound=FrozenModel)
Feeds = Iterable[Mapping[str, Array]]
Ranges = Mapping[str, tuple[Any, Any]]  # tensor -> (min, max): numbers, or one each for every channel


@dataclass(frozen=True)
class Goal:
    """What a graph is to reach, for quantizers that look for their settings.

    ``cosine``: of every output to the float graph's, mean over rows. ``share``: least part of the multiply-accumulates
    in INT8, counted at ``dims`` (a graph's dynamic dimension -> its nominal size). ``summary``: as of a `Tower`.
    """

    cosine: float = 0.99
    share: float = 0.9
    dims: Mapping[str, int] = field(default_factory=dict)
    summary: Callable[[Arrays], Arrays] | None = None


@dataclass(frozen=True)
class Settled:
    """What a search found: ``quantizer`` with ``params`` and ``ranges`` makes the graph, today and when they were
    recorded; ``history`` says for the report what was tried."""

    quantizer: str
    params: FrozenModel
    ranges: Ranges
    history: Mapping[str, Any] = field(default_factory=dict)

    def written(self) -> dict[str, Any]:
        """The params as JSON, without those that are empty or off."""
        params = self.params.model_dump(mode="json")
        return {key: value for key, value in params.items() if value not in ({}, [], False)}


@dataclass(frozen=True)
class Quantizer(Generic[P]):
    """``quantize(model, ranges, params) -> model``. ``observe(model, feeds, params) -> Ranges`` runs the float graph;
    None where no data is needed. Split in two so that ranges can be shipped and used again.

    ``search(model, feeds, params, goal) -> Settled``, where there is one, goes before: it looks for the quantizer (a
    name of this family), the params and the ranges that reach the goal.
    """

    params: type[P]
    quantize: Callable[[onnx.ModelProto, Ranges, P], onnx.ModelProto]
    observe: Callable[[onnx.ModelProto, Feeds, P], Ranges] | None = None
    search: Callable[[onnx.ModelProto, Feeds, P, Goal], Settled] | None = None
    weights: str = "int8 per channel"
    activations: str = "uint8 per tensor"


QUANTIZERS: Registry[Quantizer[Any]] = Registry("quantizers", "calmclip.export.quantizers")
