"""The Open Inference Protocol: graphs under its names, tensors in and behind its JSON. Knows no HTTP.

https://github.com/kserve/open-inference-protocol (`specification/protocol/inference_rest.md`), and the binary tensor
data extension of https://github.com/triton-inference-server/server (`docs/protocol/extension_binary_data.md`): where an
input has ``binary_data_size``, its elements follow the JSON, little-endian, row by row, in the order of the inputs.
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
from calmclip.service.hub import Hub, Loaded
from calmclip.service.problems import InvalidRequest, invalid
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
JSON_TYPES: dict[str, tuple[set[type], type[np.generic]]] = {  # kind of a dtype -> what JSON may hold, what holds that
    "f": ({float, int}, np.float64),
    "i": ({int}, np.int64),
    "u": ({int}, np.int64),
    "b": ({bool}, np.bool_),
}
MAX_RANK = 8

Data = Annotated[
    list[Any], WithJsonSchema({"type": "array", "description": "row by row, flat or nested as the shape is"})
]


class InputParameters(Body):
    binary_data_size: int | None = Field(default=None, ge=0, description="bytes behind the JSON, instead of `data`")


class OutputParameters(Body):
    binary_data: bool | None = Field(default=None, description="behind the JSON; else as `binary_data_output` says")


class InferParameters(Body):
    binary_data_output: bool = Field(default=False, description="outputs follow the JSON as bytes")


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
    id: str | None = Field(None, max_length=1000, description="comes back with the answer")
    parameters: InferParameters = InferParameters()
    inputs: list[InputTensor] = Field(max_length=64, fail_fast=True)
    outputs: list[OutputAsked] = Field([], max_length=64, fail_fast=True, description="which to answer; all by default")


class TensorMetadata(Answer):
    name: str
    datatype: Datatype
    shape: list[int] = Field(description="-1: any length")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "list[TensorMetadata]":
        return [
            cls(name=name, datatype=DATATYPES[one.dtype], shape=[d if isinstance(d, int) else -1 for d in one.shape])
            for name, one in tensors.items()
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
    parameters: dict[str, int] | None = Field(None, description="`binary_data_size`, where the data follows the JSON")
    data: Data | None = None


class InferAnswer(Answer):
    model_name: str
    id: str | None = None
    outputs: list[OutputTensor]


class Reply(NamedTuple):
    """A body, and how many of its bytes are JSON, where not all are."""

    body: bytes
    json_bytes: int | None


def name_of(loaded: Loaded, role: str) -> str:
    return f"{loaded.name}.{role}"


def served(hub: Hub) -> dict[str, tuple[Loaded, str]]:
    """Name -> bundle and role of each graph that may be run as it is.

    They are those that pictures or texts are prepared for, and in a bundle that serves ``raw`` all: another graph, such
    as soft-NMS, counts on a task to check its settings.
    """
    return {
        name_of(loaded, role): (loaded, role)
        for loaded in hub.all()
        for role, graph in loaded.bundle.manifest.graphs.items()
        if graph.preprocess or "raw" in loaded.bundle.manifest.tasks
    }


def find(hub: Hub, name: str) -> tuple[Loaded, str]:
    """Raises `BundleNotFound`; `Overloaded` while bundles are still loading."""
    known = served(hub)
    if name in known:
        return known[name]
    if hub.loading:
        raise Overloaded("the bundles are still loading; try again in a second", retry_after=1.0)
    raise BundleNotFound(f"no model named {name!r} is served as BUNDLE.GRAPH; {suggestion(name, known)}", known=known)


def metadata(name: str, graph: Graph) -> GraphMetadata:
    return GraphMetadata(
        name=name,
        platform=PLATFORM,
        inputs=TensorMetadata.of(graph.inputs),
        outputs=TensorMetadata.of(graph.outputs),
    )


def infer(bundle: Bundle, role: str, body: bytes, json_bytes: str | None, most_rows: int) -> Flow[Reply]:
    """One graph, from a request's body to its answer's. ``json_bytes``: the header Inference-Header-Content-Length.

    Raises `InvalidRequest` and `BadRequest`, naming the tensor.
    """
    graph = bundle.graph(role)
    asked, rest = _parse(body, json_bytes)
    feeds = _feeds(asked, rest)
    for name, array in feeds.items():
        if graph.batch and array.ndim and len(array) > most_rows:
            raise BadRequest(f"input {name!r} has {len(array)} rows; at most {most_rows} are read at once")
    wanted = _wanted(asked, graph)
    found = yield from run(bundle, RawRequest(role, feeds))
    return _reply(f"{bundle.name}.{role}", asked.id, {name: (found[name], binary) for name, binary in wanted.items()})


def _parse(body: bytes, json_bytes: str | None) -> tuple[InferBody, memoryview]:
    """The JSON, and what follows it."""
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
        raise invalid(error, "the request does not fit") from None


def _feeds(asked: InferBody, rest: memoryview) -> Arrays:
    feeds: dict[str, Array] = {}
    for one in asked.inputs:
        if one.name in feeds:
            raise BadRequest(f"input {one.name!r} is given twice; expected one")
        size = one.parameters.binary_data_size
        if (size is None) == (one.data is None):
            raise BadRequest(f"input {one.name!r} needs `data` or the parameter `binary_data_size`, one of them")
        feeds[one.name] = _from_json(one) if size is None else _from_bytes(one, rest[:size])
        rest = rest[size or 0 :]
    if rest:
        raise BadRequest(f"{len(rest)} bytes are left behind the last input; expected none")
    return feeds


def _from_bytes(one: InputTensor, data: memoryview) -> Array:
    dtype, size = DTYPES[one.datatype], one.parameters.binary_data_size
    if not (need := math.prod(one.shape) * dtype.itemsize) == size == len(data):
        raise BadRequest(
            f"input {one.name!r} is {one.datatype} of shape {one.shape}, {need} bytes; "
            f"`binary_data_size` is {size}, and {len(data)} bytes are there"
        )
    if dtype.kind == "b" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise BadRequest(f"input {one.name!r} is BOOL and holds bytes other than 0 and 1")
    return np.frombuffer(data, dtype).reshape(one.shape).astype(dtype.newbyteorder("="), copy=False)


def _from_json(one: InputTensor) -> Array:
    """Types are looked at before numpy is: of a list of texts it would make a table as wide as the longest."""
    dtype = DTYPES[one.datatype].newbyteorder("=")
    flat, shape = _flat(one.data or [])
    types, wide = JSON_TYPES[dtype.kind]
    if not set(map(type, flat)) <= types:
        raise BadRequest(f"the data of input {one.name!r} holds what is not {one.datatype}, or rows of unequal length")
    if len(flat) != math.prod(one.shape) or (len(shape) > 1 and shape != one.shape):
        raise BadRequest(f"the data of input {one.name!r} has shape {shape[:MAX_RANK]}; its `shape` is {one.shape}")
    try:
        given = np.array(flat, wide)
        with np.errstate(over="ignore"):
            cast: Array = given.astype(dtype)
        fits = np.isfinite(cast).all() if dtype.kind == "f" else np.array_equal(cast, given)
    except OverflowError:
        fits = False
    if not fits:
        raise BadRequest(f"the data of input {one.name!r} holds numbers too large for {one.datatype}")
    return cast.reshape(one.shape)


def _flat(data: list[Any]) -> tuple[list[Any], list[int]]:
    """Elements and shape; where rows are of unequal length, rows are elements."""
    shape = [len(data)]
    while data and set(map(type, data)) == {list} and len(lengths := set(map(len, data))) == 1:
        shape.append(lengths.pop())
        data = list(chain.from_iterable(data))
    return data, shape


def _wanted(asked: InferBody, graph: Graph) -> dict[str, bool]:
    """Outputs to answer -> whether as bytes behind the JSON."""
    default = asked.parameters.binary_data_output
    if not asked.outputs:
        return dict.fromkeys(graph.outputs, default)
    wanted: dict[str, bool] = {}
    for one in asked.outputs:
        if one.name not in graph.outputs or one.name in wanted:
            raise BadRequest(f"outputs asks for {one.name!r}; expected each once of {list(graph.outputs)}")
        wanted[one.name] = default if one.parameters.binary_data is None else one.parameters.binary_data
    return wanted


def _reply(name: str, id_: str | None, outputs: Mapping[str, tuple[Array, bool]]) -> Reply:
    tensors: list[dict[str, Any]] = []
    behind: list[bytes] = []
    for output, (array, binary) in outputs.items():
        datatype = DATATYPES[array.dtype.name]
        tensor: dict[str, Any] = {"name": output, "datatype": datatype, "shape": array.shape}
        if binary:
            behind.append(array.astype(DTYPES[datatype], copy=False).tobytes())
            tensor["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            tensor["data"] = np.ascontiguousarray(array).ravel()
        tensors.append(tensor)
    answer = {"model_name": name, **({} if id_ is None else {"id": id_}), "outputs": tensors}
    head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return Reply(b"".join([head, *behind]), len(head) if behind else None)
