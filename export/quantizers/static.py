"""Static U8S8: activation ranges are measured once, over calibration pictures.

Source: Jacob et al. 2017 (arXiv 1712.05877), section 2; per-channel weights: Krishnamoorthi 2018
(arXiv 1806.08342), section 3. The plain method; what looks for better settings is `search`.

A row's answer depends on that row alone. ``percentile`` below 100 leaves out the outermost values of each feed
before the extremes over all feeds are averaged; 100 is the plain minimum and maximum. ``reduce_range``: 7-bit
weights, for machines with AVX2 but without VNNI, whose u8 x s8 instruction adds pairs in 16 bits and saturates.
"""

import numpy as np
import onnx
from pydantic import Field

from calmclip.export.quantizers import QUANTIZERS, Feeds, Quantizer, Ranges, _qdq
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array


class Params(FrozenModel):
    percentile: float = Field(100.0, gt=50.0, le=100.0)
    keep: tuple[str, ...] = ()  # names of nodes that stay in float
    reduce_range: bool = False


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    def see(name: str, values: Array) -> tuple[float, float]:
        if params.percentile == 100.0:
            return float(values.min()), float(values.max())
        low, high = np.percentile(values, (100.0 - params.percentile, params.percentile))
        return float(low), float(high)

    seen = _qdq.watch(model, feeds, _qdq.watched(model), see)
    if params.percentile == 100.0:
        return {name: (min(low for low, _ in all_), max(high for _, high in all_)) for name, all_ in seen.items()}
    return {name: tuple(np.mean(all_, axis=0).tolist()) for name, all_ in seen.items()}


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    draft = _qdq.Draft(model)
    _qdq.pack(draft)
    _qdq.write(draft, ranges, keep=params.keep, reduce_range=params.reduce_range)
    return draft.finish()


QUANTIZERS.register("static")(Quantizer(Params, quantize, observe))
