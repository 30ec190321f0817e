"""What runs fastest: every product in 8 bits, attention too, in the form that our fused operators take.

Source: Jacob et al. 2017 (arXiv 1712.05877), section 2; one scale an output channel: Krishnamoorthi 2018
(arXiv 1806.08342), section 3; outliers moved into weights: Xiao et al. 2022 (arXiv 2211.10438), eq. 3-4. It is `smooth`
at one ``alpha`` for all, minima and maxima: a division column by column costs our operators nothing, for they take a
scale for each column where they make 8 bits.

`python -m tests.bench.quantizers` compares it with the others. It looks for nothing: what it loses, the report says,
and `search` finds what loses less.
"""

import onnx
from pydantic import Field

from calmclip.export.quantizers import QUANTIZERS, Feeds, Quantizer, Ranges, _qdq, smooth
from calmclip.models.bundle.manifest import FrozenModel


class Params(FrozenModel):
    alpha: float | None = Field(0.5, ge=0.0, le=1.0, description="how much of outliers moves into weights")
    channels: bool = False  # what depthwise convolutions read is made even, channel by channel
    keep: tuple[str, ...] = ()  # names of nodes that stay in float


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    return smooth.observe(model, feeds, _settings(model, params))


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    return smooth.quantize(model, ranges, _settings(model, params))


def _settings(model: onnx.ModelProto, params: Params) -> smooth.Params:
    pairs = tuple(node.name for node in _qdq.pairs(model) if node.name not in params.keep)
    return smooth.Params(alpha=params.alpha, attention=pairs, channels=params.channels, keep=params.keep)


QUANTIZERS.register("fast")(Quantizer(Params, quantize, observe))
