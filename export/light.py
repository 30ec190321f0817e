"""Graphs without the weight of their weights: opened, checked and given shapes with nothing serialised that is big.

A graph of a large model holds a gigabyte or two in its initializers, and protobuf writes no message over 2 GB. Whoever
only wants to know how nodes are wired, or to run them, needs no second copy of all that: `lighten` leaves the big
initializers out by name, `Session` lends them to ONNX Runtime, `shapes` and `check` do without.
"""

import numpy as np
import onnx
import onnxruntime as ort

from calmclip.models.flow import Array
from calmclip.models.ops.library import Library
from calmclip.models.runtime.session import AS_WRITTEN

SMALL = 1 << 18  # bytes; what is smaller may be a shape, a bias or a scale: who rewrites a graph reckons with it
LARGE = 1 << 29  # bytes of weights; beyond, a session does not pack a second copy of them for speed's sake
_ELSEWHERE = "elsewhere"


def lighten(model: onnx.ModelProto) -> onnx.ModelProto:
    """-> a copy whose big initializers keep name, type and shape, and say that their data lies elsewhere."""
    light = onnx.ModelProto(
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        opset_import=model.opset_import,
        functions=model.functions,
        metadata_props=model.metadata_props,
    )
    graph, old = light.graph, model.graph
    graph.name = old.name
    graph.node.extend(old.node)
    for values, found in ((graph.input, old.input), (graph.output, old.output), (graph.value_info, old.value_info)):
        values.extend(found)
    for tensor in old.initializer:
        if big(tensor):
            graph.initializer.add(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=onnx.TensorProto.EXTERNAL
            ).external_data.add(key="location", value=_ELSEWHERE)
        else:
            graph.initializer.append(tensor)
    return light


def fill(light: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """-> ``light`` itself, with the big initializers it still names as ``model`` holds them."""
    data = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in light.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(data[tensor.name])
    return light


def big(tensor: onnx.TensorProto, least: int | None = None) -> bool:
    """Whether it holds ``least`` bytes; without that: whether `lighten` leaves its data out."""
    return tensor.HasField("raw_data") and size(tensor) >= (SMALL if least is None else least)


def size(tensor: onnx.TensorProto) -> int:
    """Bytes of its data."""
    return int(np.prod(tensor.dims)) * int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)


class Session(ort.InferenceSession):  # type: ignore[misc]
    """A graph in memory, of any size, opened in ONNX Runtime; our ops by their local functions, or by ``library``."""

    def __init__(self, model: onnx.ModelProto, *, threads: int = 0, library: Library | None = None) -> None:
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3
        settings.enable_cpu_mem_arena = False  # which grows by doubling
        if library:
            settings.register_custom_ops_library(str(library.path))
        if sum(size(t) for t in model.graph.initializer if big(t)) > LARGE:
            settings.add_session_config_entry("session.disable_prepacking", "1")
        # ONNX Runtime reads them where they lie, so they have to live as long as it does
        self._lent = {t.name: ort.OrtValue.ortvalue_from_numpy(_array(t)) for t in model.graph.initializer if big(t)}
        if self._lent:
            settings.add_external_initializers(list(self._lent), list(self._lent.values()))
        super().__init__(
            lighten(model).SerializeToString(),
            settings,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(AS_WRITTEN),
        )


def shapes(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Types and shapes of what lies inside the graph, as far as they can be inferred.

    With shapes that nodes read of others and pass on, as the functions of our own ops do.
    """
    return list(onnx.shape_inference.infer_shapes(lighten(model), data_prop=True).graph.value_info)


def check(model: onnx.ModelProto) -> None:
    """ONNX's own checker; a big initializer counts as an input of its type and shape. Raises its errors."""
    light = lighten(model)
    for tensor in [t for t in light.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]:
        light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        light.graph.initializer.remove(tensor)
    onnx.checker.check_model(light)


def _array(tensor: onnx.TensorProto) -> Array:
    """The tensor's bytes as an array: one copy, which its owner keeps alive."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    found: Array = np.frombuffer(tensor.raw_data, kind).reshape(tuple(tensor.dims))
    return found
