"""`QuantLayerNorm` as a local function of Add, LayerNormalization and QuantizeLinear."""

import onnx

from calmclip.export.functions.template import local_function
from calmclip.models.ops.spec import QUANT_LAYER_NORM

_NODES = """
    sum = Add (x, residual)
    normed = LayerNormalization <axis = -1, epsilon: float = @epsilon> (sum, weight, bias)
    y = QuantizeLinear <axis = -1> (normed, y_scale, y_zero)
"""


def quant_layer_norm() -> onnx.FunctionProto:
    """The body of `calmclip.models.ops.spec.QUANT_LAYER_NORM`."""
    return local_function(QUANT_LAYER_NORM, _NODES)
