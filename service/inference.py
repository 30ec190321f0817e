"""The Open Inference Protocol over the bundles' graphs, with tensors in JSON or as bytes after it; without HTTP.

Source: https://github.com/kserve/open-inference-protocol (`specification/protocol/inference_rest.md`), and the binary
tensor data extension of https://github.com/triton-inference-server/server (`docs/protocol/extension_binary_data.md`):
if an input has ``binary_data_size``, its elements follow the JSON, little-endian, row-major, in the inputs' order.
"""

import math
from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import orjson
from pydantic import Field, ValidationError, WithJsonSchema

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Graph, Tensor
from calmclip.models.errors import BadRequest, BundleNotFound, Overloaded, suggestion
from calmclip.models.flow import Array, Arrays, Flow
from calmclip.models.tasks.raw import RawRequest, run
from calmclip.service.errors import InvalidRequest, invalid
from calmclip.service.hub import Hub, Loaded
from calmclip.service.schemas import Answer, Body

EXTENSIONS = ["binary_tensor_data"]
PLATFORM = "onnxruntime_onnx"
Datatype = Literal["FP32", "INT64", "INT32", "INT8", "UINT8", "BOOL"]
DATATYPES: dict[str, Datatype] = {
    "float32": "FP32",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}
DTYPES = {datatype: np.dtype(dtype).newbyteorder("<") for dtype, datatype in DATATYPES.items()}
JSON_TYPES: dict[str, tuple[set[type], type[np.generic]]] = {  # kind of a dtype -> types in JSON, dtype that holds them
    "f": ({float, int}, np.float64),
    "i": ({int}, np.int64),
    "u": ({int}, np.int64),
    "b": ({bool}, np.bool_),
}
MAX_RANK = 8

Data = Annotated[
    list[Any], WithJsonSchema({"type": "array", "description": "row-major, flat or nested like the shape"})
]


class InputParameters(Body):
    binary_data_size: int | None = Field(
        default=None, ge=0, description="number of bytes after the JSON, instead of `data`"
    )


class OutputParameters(Body):
    binary_data: bool | None = Field(default=None, description="send it after the JSON; default: `binary_data_output`")


class InferParameters(Body):
    binary_data_output: bool = Field(default=False, description="send all outputs as bytes after the JSON")


class InputTensor(Body):
    name: str
    datatype: Datatype
    shape: list[Annotated[int, Field(ge=0, lt=1 << 31)]] = Field(max_length=MAX_RANK, fail_fast=True)
    parameters: InputParameters = InputParameters()
    data: Data | None = None


class OutputAsked(Body):
    name: str
    parameters: OutputParameters = OutputParameters()


class InferBody(Body):
    id: str | None = Field(None, max_length=1000, description="returned with the answer")
    parameters: InferParameters = InferParameters()
    inputs: list[InputTensor] = Field(max_length=64, fail_fast=True)
    outputs: list[OutputAsked] = Field(
        [], max_length=64, fail_fast=True, description="the outputs to send; default: all"
    )


class TensorMetadata(Answer):
    name: str
    datatype: Datatype
    shape: list[int] = Field(description="-1: any length")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "list[TensorMetadata]":
        return [
            cls(
                name=name,
                datatype=DATATYPES[tensor.dtype],
                shape=[d if isinstance(d, int) else -1 for d in tensor.shape],
            )
            for name, tensor in tensors.items()
        ]


class GraphMetadata(Answer):
    name: str
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(Answer):
    name: str
    version: str
    extensions: list[str]


class LiveAnswer(Answer):
    live: bool


class ServerReady(Answer):
    ready: bool


class GraphReady(Answer):
    name: str
    ready: bool


class OutputTensor(TensorMetadata):
    parameters: dict[str, int] | None = Field(None, description="`binary_data_size`, if the data follows the JSON")
    data: Data | None = None


class InferAnswer(Answer):
    model_name: str
    id: str | None = None
    outputs: list[OutputTensor]


class Reply(NamedTuple):
    """A body. ``json_bytes``: the length of its JSON, None if all of it is JSON."""

    body: bytes
    json_bytes: int | None


def name_of(loaded: Loaded, role: str) -> str:
    return f"{loaded.name}.{role}"


def served(hub: Hub) -> dict[str, tuple[Loaded, str]]:
    """Name -> bundle and role, for each graph that a client may run directly.

    These are the graphs with a preprocess, and all graphs of a bundle that serves ``raw``. Another graph, such as
    soft-NMS, relies on a task to check its inputs.
    """
    return {
        name_of(loaded, role): (loaded, role)
        for loaded in hub.all()
        for role, graph in loaded.bundle.manifest.graphs.items()
        if graph.preprocess or "raw" in loaded.bundle.manifest.tasks
    }


def find(hub: Hub, name: str) -> tuple[Loaded, str]:
    """Raises `BundleNotFound`; `Overloaded` while bundles are still loading."""
    graphs = served(hub)
    if name in graphs:
        return graphs[name]
    if hub.loading:
        raise Overloaded("the bundles are still loading; try again in a second", retry_after=1.0)
    raise BundleNotFound(f"no model named {name!r} is served as BUNDLE.GRAPH; {suggestion(name, graphs)}", known=graphs)


def metadata(name: str, graph: Graph) -> GraphMetadata:
    return GraphMetadata(
        name=name,
        platform=PLATFORM,
        inputs=TensorMetadata.of(graph.inputs),
        outputs=TensorMetadata.of(graph.outputs),
    )


def infer(bundle: Bundle, role: str, body: bytes, json_bytes: str | None, max_rows: int) -> Flow[Reply]:
    """Run one graph: a request's body -> the answer's body. ``json_bytes``: the header Inference-Header-Content-Length.

    Raises `InvalidRequest`, and `BadRequest` that names the tensor.
    """
    graph = bundle.graph(role)
    request, data = _parse(body, json_bytes)
    feeds = _feeds(request, data)
    for name, array in feeds.items():
        if graph.batch and array.ndim and len(array) > max_rows:
            raise BadRequest(f"input {name!r} has {len(array)} rows; at most {max_rows} are read at once")
    requested = _outputs(request, graph)
    arrays = yield from run(bundle, RawRequest(role, feeds))
    outputs = {name: (arrays[name], binary) for name, binary in requested.items()}
    return _reply(f"{bundle.name}.{role}", request.id, outputs)


def _parse(body: bytes, json_bytes: str | None) -> tuple[InferBody, memoryview]:
    """The JSON part, and the bytes after it."""
    view = memoryview(body)
    length = len(view)
    if json_bytes is not None:
        digits = json_bytes.isascii() and json_bytes.isdigit() and len(json_bytes) < 20
        if not digits or int(json_bytes) > length:
            raise BadRequest(
                f"Inference-Header-Content-Length is {json_bytes[:20]!r}; expected the length of the JSON, "
                f"at most the body's {length} bytes"
            )
        length = int(json_bytes)
    try:
        return InferBody.model_validate(orjson.loads(view[:length])), view[length:]
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the first {length} bytes of the body are not JSON: {error}") from None
    except ValidationError as error:
        raise invalid(error) from None


def _feeds(request: InferBody, data: memoryview) -> Arrays:
    feeds: dict[str, Array] = {}
    for tensor in request.inputs:
        if tensor.name in feeds:
            raise BadRequest(f"input {tensor.name!r} is given twice; expected one")
        size = tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise BadRequest(f"input {tensor.name!r} needs `data` or the parameter `binary_data_size`, one of them")
        feeds[tensor.name] = _from_json(tensor) if size is None else _from_bytes(tensor, data[:size])
        data = data[size or 0 :]
    if data:
        raise BadRequest(f"{len(data)} bytes follow the last input; expected none")
    return feeds


def _from_bytes(tensor: InputTensor, data: memoryview) -> Array:
    dtype, size = DTYPES[tensor.datatype], tensor.parameters.binary_data_size
    if not (need := math.prod(tensor.shape) * dtype.itemsize) == size == len(data):
        raise BadRequest(
            f"input {tensor.name!r} is {tensor.datatype} of shape {tensor.shape}, {need} bytes; "
            f"`binary_data_size` is {size}, and the body has {len(data)} of them"
        )
    if dtype.kind == "b" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise BadRequest(f"input {tensor.name!r} is BOOL and has bytes other than 0 and 1")
    return np.frombuffer(data, dtype).reshape(tensor.shape).astype(dtype.newbyteorder("="), copy=False)


def _from_json(tensor: InputTensor) -> Array:
    """Checks types before numpy sees the data: from texts, numpy would make an array as wide as the longest text."""
    dtype = DTYPES[tensor.datatype].newbyteorder("=")
    flat, shape = _flat(tensor.data or [])
    types, wide_dtype = JSON_TYPES[dtype.kind]
    if not set(map(type, flat)) <= types:
        raise BadRequest(f"the data of input {tensor.name!r} must be {tensor.datatype}, in rows of equal length")
    if len(flat) != math.prod(tensor.shape) or (len(shape) > 1 and shape != tensor.shape):
        raise BadRequest(
            f"the data of input {tensor.name!r} has shape {shape[:MAX_RANK]}; its `shape` is {tensor.shape}"
        )
    try:
        wide = np.array(flat, wide_dtype)
        with np.errstate(over="ignore"):
            cast: Array = wide.astype(dtype)
        fits = np.isfinite(cast).all() if dtype.kind == "f" else np.array_equal(cast, wide)
    except OverflowError:
        fits = False
    if not fits:
        raise BadRequest(f"the data of input {tensor.name!r} has numbers out of the range of {tensor.datatype}")
    return cast.reshape(tensor.shape)


def _flat(data: list[Any]) -> tuple[list[Any], list[int]]:
    """Elements and shape. Rows of unequal length count as elements."""
    shape = [len(data)]
    while data and set(map(type, data)) == {list} and len(lengths := set(map(len, data))) == 1:
        shape.append(lengths.pop())
        data = list(chain.from_iterable(data))
    return data, shape


def _outputs(request: InferBody, graph: Graph) -> dict[str, bool]:
    """Requested output -> whether it is sent as bytes after the JSON."""
    default = request.parameters.binary_data_output
    if not request.outputs:
        return dict.fromkeys(graph.outputs, default)
    requested: dict[str, bool] = {}
    for output in request.outputs:
        if output.name not in graph.outputs or output.name in requested:
            raise BadRequest(f"outputs asks for {output.name!r}; expected each once of {list(graph.outputs)}")
        requested[output.name] = default if output.parameters.binary_data is None else output.parameters.binary_data
    return requested


def _reply(name: str, id_: str | None, outputs: Mapping[str, tuple[Array, bool]]) -> Reply:
    tensors: list[dict[str, Any]] = []
    binary_data: list[bytes] = []
    for output, (array, binary) in outputs.items():
        datatype = DATATYPES[array.dtype.name]
        tensor: dict[str, Any] = {"name": output, "datatype": datatype, "shape": array.shape}
        if binary:
            binary_data.append(array.astype(DTYPES[datatype], copy=False).tobytes())
            tensor["parameters"] = {"binary_data_size": len(binary_data[-1])}
        else:
            tensor["data"] = np.ascontiguousarray(array).ravel()
        tensors.append(tensor)
    answer = {"model_name": name, **({} if id_ is None else {"id": id_}), "outputs": tensors}
    head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return Reply(b"".join([head, *binary_data]), len(head) if binary_data else None)
