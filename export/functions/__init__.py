"""Our operators as ONNX local functions of standard ops: a bundle runs with them if the compiled library is missing."""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from calmclip.models.bundle.manifest import Tensor
from calmclip.models.flow import Array
from calmclip.models.ops.spec import DOMAIN, VERSION, Op
from calmclip.models.ops.table import OPS

Body = Callable[..., onnx.FunctionProto]


def _bodies() -> dict[str, Body]:
    """Every operator of the table -> the function of its name in a module here, for a node with these attributes.

    Only the bodies of the picture operators depend on the attributes; the other functions take none.
    """
    names = [module.name for module in iter_modules(__path__) if not module.name.startswith("_")]
    functions: dict[str, Body] = {}
    for name in names:
        functions |= vars(import_module(f"{__name__}.{name}"))
    bodies = {}
    for op in OPS:
        body = functions[op.key]
        bodies[op.name] = body if inspect.signature(body).parameters else lambda body=body, **_: body()
    return bodies


BODIES = _bodies()


def alone(
    op: Op,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    attributes: Mapping[str, Any],
    constants: Mapping[str, Array] | None = None,
    elsewhere: Mapping[str, Array] | None = None,
) -> onnx.ModelProto:
    """A model of one node of ``op``, with every attribute named, and its body.

    ``constants``: inputs that are initializers. ``elsewhere``: such whose data is not in the model, see
    `calmclip.models.runtime.session.Memory`.
    """
    attributes = {**op.attributes, **attributes}
    node = helper.make_node(op.name, list(op.inputs), list(op.outputs), domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], "alone", _declare(inputs), _declare(outputs))
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in (constants or {}).items())
    for name, array in (elsewhere or {}).items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.initializer.add(
            name=name, data_type=kind, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL
        ).external_data.add(key="location", value="elsewhere")
    body = BODIES[op.name](**attributes)
    opsets = [*body.opset_import, helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10, producer_name="calmclip")
    if not elsewhere:  # the checker looks for their files
        onnx.checker.check_model(model)
    return model


def _declare(tensors: Mapping[str, Tensor]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)), tensor.shape)
        for name, tensor in tensors.items()
    ]
