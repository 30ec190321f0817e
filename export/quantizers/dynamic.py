"""Dynamic INT8: int8 weights, activations quantized while running, by each tensor's own range. Needs no data.

Source: ONNX Runtime's `quantize_dynamic` with one scale an output channel.

The range is that of a whole batch, so a row's answer depends a little on its neighbours; `smooth` does without
that, at the price of calibration texts. Products of activations stay in float.
"""

import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode

from calmclip.export.quantizers import QUANTIZERS, Quantizer, Ranges, _qdq
from calmclip.models.bundle.manifest import FrozenModel


class Params(FrozenModel):
    reduce_range: bool = False  # 7-bit weights; see `static`


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    draft = _qdq.Draft(model)
    _qdq.pack(draft)
    whole = ONNXModel(draft.finish())
    whole.replace_gemm_with_matmul()  # the runtime has a dynamic MatMul, but no dynamic Gemm
    packed = whole.model
    matrices = [node.name for node in _qdq.products(packed) if node.op_type != "Conv"]
    quantizer = ONNXQuantizer(
        onnx.shape_inference.infer_shapes(packed),
        per_channel=True,
        reduce_range=params.reduce_range,
        mode=QuantizationMode.IntegerOps,
        static=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        nodes_to_quantize=matrices,
        nodes_to_exclude=[],
        op_types_to_quantize=["MatMul"],
        extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantizer.model.model


QUANTIZERS.register("dynamic")(Quantizer(Params, quantize, activations="uint8 per tensor, at run time"))
