"""Open, check and infer the shapes of a graph without copying or serialising its big weights.

A large model holds a gigabyte or two in its initializers, and protobuf writes no message over 2 GB. To walk a graph or
to run it needs no second copy of them: `lighten` leaves out the data of big initializers, `Session` passes them to ONNX
Runtime apart, and `shapes` and `check` do not read them.
"""

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort

from calmclip.models.flow import Array
from calmclip.models.ops.library import Library
from calmclip.models.runtime.session import DISABLED_OPTIMIZERS

SMALL = 1 << 18  # bytes; a smaller tensor may be a shape, a bias or a scale, which rewrites and inference read
LARGE = 1 << 29  # bytes of weights; a session over larger ones maps a file, and does not prepack a second copy
PAGE = 4096  # bytes; ONNX Runtime maps data that begins on a page, instead of reading it
_ELSEWHERE = "elsewhere"


def lighten(model: onnx.ModelProto, least: int | None = None) -> onnx.ModelProto:
    """-> a copy in which initializers of ``least`` bytes (default `SMALL`) are external: name, type and shape only."""
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
    graph.input.extend(old.input)
    graph.output.extend(old.output)
    graph.value_info.extend(old.value_info)
    for tensor in old.initializer:
        if big(tensor, least):
            graph.initializer.add(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=onnx.TensorProto.EXTERNAL
            ).external_data.add(key="location", value=_ELSEWHERE)
        else:
            graph.initializer.append(tensor)
    return light


def fill(light: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy the data of ``light``'s external initializers from ``model``; -> ``light`` itself."""
    data = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in light.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(data[tensor.name])
    return light


def big(tensor: onnx.TensorProto, least: int | None = None) -> bool:
    """Whether `lighten` leaves out the tensor's data."""
    return tensor.HasField("raw_data") and size(tensor) >= (SMALL if least is None else least)


def size(tensor: onnx.TensorProto) -> int:
    """Bytes of the tensor's data."""
    return int(np.prod(tensor.dims)) * int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)


class Session(ort.InferenceSession):  # type: ignore[misc]
    """An ONNX Runtime session over a graph of any size in memory; our ops run by local functions or by ``library``.

    Weights of more than `LARGE` bytes go into a file for the time of the opening. ONNX Runtime maps it, so they are in
    memory once more. It would copy weights that it is given, and those are a copy already.
    """

    def __init__(self, model: onnx.ModelProto, *, threads: int = 0, library: Library | None = None) -> None:
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3
        settings.enable_cpu_mem_arena = False  # the arena grows by doubling
        if library:
            settings.register_custom_ops_library(str(library.path))
        heavy = [tensor for tensor in model.graph.initializer if big(tensor)]
        with TemporaryDirectory(prefix="calmclip-") if sum(map(size, heavy)) > LARGE else nullcontext("") as folder:
            if folder:
                settings.add_session_config_entry("session.disable_prepacking", "1")
                source: str | bytes = str(_write(model, Path(folder)))
            else:
                self._borrowed = {t.name: ort.OrtValue.ortvalue_from_numpy(_array(t)) for t in heavy}
                settings.add_external_initializers(list(self._borrowed), list(self._borrowed.values()))
                source = lighten(model).SerializeToString()
            super().__init__(
                source,
                settings,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(DISABLED_OPTIMIZERS),
            )


def _write(model: onnx.ModelProto, folder: Path) -> Path:
    """-> a file of the graph in ``folder``, with another one of its big weights."""
    copy, data = lighten(model), {tensor.name: tensor for tensor in model.graph.initializer}
    with (folder / "weights.bin").open("wb") as file:
        for tensor in copy.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                file.write(b"\0" * (-file.tell() % PAGE))
                place, length = file.tell(), file.write(data[tensor.name].raw_data)
                del tensor.external_data[:]
                for key, value in (("location", "weights.bin"), ("offset", place), ("length", length)):
                    tensor.external_data.add(key=key, value=str(value))
    path = folder / "graph.onnx"
    path.write_bytes(copy.SerializeToString())
    return path


def shapes(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Types and shapes of the tensors inside the graph, as far as they can be inferred. Data propagation follows shapes
    that nodes compute from other shapes, as the functions of our ops do."""
    return list(onnx.shape_inference.infer_shapes(lighten(model), data_prop=True).graph.value_info)


def check(model: onnx.ModelProto) -> None:
    """Run ONNX's checker, with big initializers as inputs of their type and shape. Raises its errors."""
    light = lighten(model)
    for tensor in [t for t in light.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]:
        light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        light.graph.initializer.remove(tensor)
    onnx.checker.check_model(light)


def _array(tensor: onnx.TensorProto) -> Array:
    """The tensor's bytes as an array: one copy, which the array keeps alive."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(tensor.raw_data, dtype).reshape(tuple(tensor.dims))
