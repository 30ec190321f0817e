"""FAMILY quantizers: a float graph and the observed ranges of its tensors -> an INT8 graph of standard ops."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import onnx

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array, Arrays
from calmclip.models.registry import Registry

P = TypeVar("P", bound=FrozenModel)
Feeds = Iterable[Mapping[str, Array]]
Ranges = Mapping[str, tuple[Any, Any]]  # tensor -> (min, max): two numbers, or two lists with one number per channel


@dataclass(frozen=True)
class Goal:
    """What a search for settings must reach.

    ``cosine``: of every output to the float graph's, mean over rows; ``worst``: of every row. ``coverage``: least INT8
    coverage, counted at ``dims`` (a graph's dynamic dimension -> its nominal size). ``summary``: as of a `Tower`.
    """

    cosine: float = 0.99
    worst: float = -1.0
    coverage: float = 0.9
    dims: Mapping[str, int] = field(default_factory=dict)
    summary: Callable[[Arrays], Arrays] | None = None


@dataclass(frozen=True)
class Settled:
    """The result of a search: ``quantizer`` with ``params`` and ``ranges`` repeats the graph. ``history``: the tried
    settings, for the report. ``starved``: the experts that no calibration input reached; see `quantizers.ranges`."""

    quantizer: str
    params: FrozenModel
    ranges: Ranges
    history: Mapping[str, Any] = field(default_factory=dict)
    starved: tuple[str, ...] = ()

    def written(self) -> dict[str, Any]:
        """The params as JSON, without those that are empty or off."""
        params = self.params.model_dump(mode="json")
        return {key: value for key, value in params.items() if value not in ({}, [], False)}


@dataclass(frozen=True)
class Quantizer(Generic[P]):
    """``quantize(model, ranges, params) -> model``. ``observe(model, feeds, params) -> Ranges`` runs the float graph;
    None if the quantizer needs no data. The two are separate, so that ranges can be shipped and used again.

    ``search(model, feeds, held, params, goal) -> Settled`` is optional and runs first: it finds the quantizer (a name
    of this family), the params and the ranges that reach the goal. It observes ``feeds`` and measures on ``held``,
    which are other inputs.
    """

    params: type[P]
    quantize: Callable[[onnx.ModelProto, Ranges, P], onnx.ModelProto]
    observe: Callable[[onnx.ModelProto, Feeds, P], Ranges] | None = None
    search: Callable[[onnx.ModelProto, Feeds, Feeds, P, Goal], Settled] | None = None
    weights: str = "int8 per channel"
    activations: str = "uint8 per tensor"


QUANTIZERS: Registry[Quantizer[Any]] = Registry("quantizers", "calmclip.export.quantizers")
