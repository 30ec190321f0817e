"""The fastest INT8 graph: every product is 8-bit, attention too, in the form that our fused operators take.

Source: Jacob et al. 2017 (arXiv 1712.05877), section 2; one scale per output channel: Krishnamoorthi 2018
(arXiv 1806.08342), section 3; outliers moved into weights: Xiao et al. 2022 (arXiv 2211.10438), eq. 3-4. This is
`smooth` with one ``alpha`` for all tensors, minima and maxima. A division column by column costs our operators nothing,
because they take one scale per column where they quantize.

`python -m tests.bench.quantizers` compares it with the others. It does not search: the report says what it loses, and
`search` finds settings that lose less.
"""

import onnx
from pydantic import Field

from calmclip.export.graph import activation_products
from calmclip.export.quantizers import QUANTIZERS, Feeds, Quantizer, Ranges, smooth
from calmclip.models.bundle.manifest import FrozenModel


class Params(FrozenModel):
    alpha: float | None = Field(default=0.5, ge=0.0, le=1.0, description="how much of outliers moves into weights")
    channels: bool = False  # equalize the channels of the inputs of depthwise convolutions
    keep: tuple[str, ...] = ()  # names of nodes that stay in float


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    return smooth.observe(model, feeds, _settings(model, params))


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    return smooth.quantize(model, ranges, _settings(model, params))


def _settings(model: onnx.ModelProto, params: Params) -> smooth.Params:
    attention = tuple(node.name for node in activation_products(model) if node.name not in params.keep)
    return smooth.Params(alpha=params.alpha, attention=attention, channels=params.channels, keep=params.keep)


QUANTIZERS.register("fast")(Quantizer(Params, quantize, observe))
