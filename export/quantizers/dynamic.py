"""Dynamic INT8: int8 weights; activations are quantized at run time, by each tensor's own range. Needs no data.

Source: ONNX Runtime's `quantize_dynamic` with one scale per output channel.

The range is that of a whole batch, so a row's answer depends slightly on the other rows. `smooth` avoids that, and
needs calibration texts. Products of activations stay in float.
"""

import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode

from calmclip.export.graph import Draft, matrices
from calmclip.export.quantizers import QUANTIZERS, Quantizer, Ranges
from calmclip.export.quantizers.packing import pack
from calmclip.models.bundle.manifest import FrozenModel


class Params(FrozenModel):
    reduce_range: bool = False  # 7-bit weights; see `static`


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    draft = Draft(model)
    pack(draft)
    packed = ONNXModel(draft.finish())
    packed.replace_gemm_with_matmul()  # the runtime has a dynamic MatMul, but no dynamic Gemm
    quantizer = ONNXQuantizer(
        onnx.shape_inference.infer_shapes(packed.model),
        per_channel=True,
        reduce_range=params.reduce_range,
        mode=QuantizationMode.IntegerOps,
        static=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        nodes_to_quantize=[node.name for node in matrices(packed.model)],
        nodes_to_exclude=[],
        op_types_to_quantize=["MatMul"],
        extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


QUANTIZERS.register("dynamic")(Quantizer(Params, quantize, activations="uint8 per tensor, at run time"))
