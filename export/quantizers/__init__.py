"""FAMILY quantizers: a float graph, and what its tensors were seen to hold -> an INT8 graph of standard ops."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import onnx

from models.bundle.manifest import FrozenModel
from models.flow import Array
from models.registry import Registry

P = TypeVar("P", bound=FrozenModel)
Feeds = Iterable[Mapping[str, Array]]
Ranges = Mapping[str, tuple[Any, Any]]  # tensor -> (min, max): numbers, or one each for every channel


@dataclass(frozen=True)
class Quantizer(Generic[P]):
    """``observe(model, feeds, params) -> Ranges`` runs the float graph; None where no data is needed.

    ``quantize(model, ranges, params) -> model``. Split in two so that ranges can be shipped and used again.
    """

    params: type[P]
    quantize: Callable[[onnx.ModelProto, Ranges, P], onnx.ModelProto]
    observe: Callable[[onnx.ModelProto, Feeds, P], Ranges] | None = None
    weights: str = "int8 per channel"
    activations: str = "uint8 per tensor"


QUANTIZERS: Registry[Quantizer[Any]] = Registry("quantizers", "export.quantizers")
