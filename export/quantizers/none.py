"""Leave a graph in float: for a tower that loses too much, or to separate quantization errors from other errors.

Source: none needed; the identity.
"""

import onnx

from calmclip.export.quantizers import QUANTIZERS, Quantizer, Ranges
from calmclip.models.bundle.manifest import FrozenModel


class Params(FrozenModel):
    pass


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    return model


QUANTIZERS.register("none")(Quantizer(Params, quantize, weights="float32", activations="float32"))
