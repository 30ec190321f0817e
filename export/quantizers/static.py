"""Static U8S8: activation ranges are measured once, over calibration pictures.

Source: Jacob et al. 2017 (arXiv 1712.05877), section 2; per-channel weights: Krishnamoorthi 2018
(arXiv 1806.08342), section 3. This is the plain method; `search` looks for better settings.

A row's answer depends on that row alone. ``percentile`` under 100 leaves out the outermost values of each feed, and the
limits are averaged over feeds; 100 takes the minimum and maximum of all feeds. ``reduce_range``: 7-bit weights, for
machines with AVX2 and without VNNI, whose u8 x s8 instruction adds pairs in 16 bits and saturates.
"""

import numpy as np
import onnx
from pydantic import Field

from calmclip.export.graph import Draft
from calmclip.export.qdq import quantized_tensors, write_pairs
from calmclip.export.quantizers import QUANTIZERS, Feeds, Quantizer, Ranges
from calmclip.export.quantizers.packing import pack
from calmclip.export.quantizers.ranges import collect, reduced, widest
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array


class Params(FrozenModel):
    percentile: float = Field(default=100.0, gt=50.0, le=100.0)
    keep: tuple[str, ...] = ()  # names of nodes that stay in float
    reduce_range: bool = False


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    def limits(name: str, values: Array) -> tuple[float, float]:
        if params.percentile == 100.0:
            return float(values.min()), float(values.max())
        low, high = np.percentile(values, (100.0 - params.percentile, params.percentile))
        return float(low), float(high)

    by_tensor = collect(model, feeds, quantized_tensors(model), limits)
    if params.percentile == 100.0:
        return reduced(by_tensor, widest)
    return reduced(by_tensor, lambda pairs: tuple(np.mean(pairs, axis=0).tolist()))


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    draft = Draft(model)
    pack(draft)
    write_pairs(draft, ranges, params.keep, reduce_range=params.reduce_range)
    return draft.finish()


QUANTIZERS.register("static")(Quantizer(Params, quantize, observe))
