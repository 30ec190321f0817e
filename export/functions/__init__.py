"""Our operators as ONNX local functions of standard ops: how a bundle runs without the compiled library."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper

from calmclip.export.functions.image_to_pixels import image_to_pixels, image_to_quantized_pixels
from calmclip.export.functions.quant_add import quant_add
from calmclip.export.functions.quant_attention import quant_attention
from calmclip.export.functions.quant_depthwise import quant_depthwise
from calmclip.export.functions.quant_layer_norm import quant_layer_norm
from calmclip.export.functions.quant_linear import quant_linear, quant_linear_to_float
from calmclip.export.functions.quant_lookup import quant_lookup
from calmclip.export.functions.quant_patches import quant_patches
from calmclip.export.functions.quant_pointwise import quant_pointwise
from calmclip.export.functions.soft_nms import soft_nms
from calmclip.export.functions.softmax import softmax
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.ops.spec import (
    DOMAIN,
    IMAGE_TO_PIXELS,
    IMAGE_TO_QUANTIZED_PIXELS,
    QUANT_ADD,
    QUANT_ATTENTION,
    QUANT_DEPTHWISE,
    QUANT_LAYER_NORM,
    QUANT_LINEAR,
    QUANT_LINEAR_TO_FLOAT,
    QUANT_LOOKUP,
    QUANT_PATCHES,
    QUANT_POINTWISE,
    SOFT_NMS,
    SOFTMAX,
    VERSION,
    Op,
)

# op -> its body, for a node with these attributes; only of pictures does the text of the body hang on them
BODIES: dict[str, Callable[..., onnx.FunctionProto]] = {
    SOFTMAX.name: lambda **_: softmax(),
    SOFT_NMS.name: lambda **_: soft_nms(),
    IMAGE_TO_PIXELS.name: image_to_pixels,
    IMAGE_TO_QUANTIZED_PIXELS.name: image_to_quantized_pixels,
    QUANT_LINEAR.name: lambda **_: quant_linear(),
    QUANT_LINEAR_TO_FLOAT.name: lambda **_: quant_linear_to_float(),
    QUANT_POINTWISE.name: lambda **_: quant_pointwise(),
    QUANT_ATTENTION.name: lambda **_: quant_attention(),
    QUANT_LAYER_NORM.name: lambda **_: quant_layer_norm(),
    QUANT_PATCHES.name: lambda **_: quant_patches(),
    QUANT_DEPTHWISE.name: lambda **_: quant_depthwise(),
    QUANT_LOOKUP.name: lambda **_: quant_lookup(),
    QUANT_ADD.name: lambda **_: quant_add(),
}


def alone(op: Op, inputs: dict[str, Tensor], outputs: dict[str, Tensor], attributes: dict[str, Any]) -> onnx.ModelProto:
    """A model of one node of ``op``, with every attribute named, and its body."""
    attributes = op.attributes | attributes
    node = helper.make_node(op.name, list(op.inputs), list(op.outputs), domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], "alone", _declare(inputs), _declare(outputs))
    body = BODIES[op.name](**attributes)
    opsets = [*body.opset_import, helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10, producer_name="calmclip")
    onnx.checker.check_model(model)
    return model


def _declare(tensors: dict[str, Tensor]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)), tensor.shape)
        for name, tensor in tensors.items()
    ]
