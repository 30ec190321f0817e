"""The Open Inference Protocol over the bundles' graphs, with tensors in JSON or as bytes after it; without HTTP.

Source: https://github.com/kserve/open-inference-protocol (`specification/protocol/inference_rest.md`), and the binary
tensor data extension of https://github.com/triton-inference-server/server (`docs/protocol/extension_binary_data.md`):
if an input has ``binary_data_size``, its elements follow the JSON, little-endian, row-major, in the inputs' order.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, product
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import orjson
from pydantic import Field, StrictBool, ValidationError, WithJsonSchema

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Graph, ImagePreprocess, Tensor, TextPreprocess
from calmclip.models.errors import BadRequest, BundleNotFound, Overloaded, suggestion
from calmclip.models.flow import Array, Arrays, Flow, Together, Work
from calmclip.models.tasks.features import prepared
from calmclip.models.tasks.raw import RawRequest, run
from calmclip.service.errors import InvalidRequest, invalid
from calmclip.service.hub import Hub, Loaded
from calmclip.service.schemas import Answer, Body
from calmclip.service.settings import Settings
from calmclip.service.statistics import Compute, Spent, Statistics

EXTENSIONS = ["binary_tensor_data", "model_configuration", "statistics"]
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
VERSION = "1"  # of every graph: a bundle that changes takes the place of the old one
Datatype = Literal["FP32", "FP16", "INT64", "INT32", "INT8", "UINT8", "BOOL"]
DATATYPES: dict[str, Datatype] = {
    "float32": "FP32",
    "float16": "FP16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}
DTYPES: dict[str, np.dtype[Any]] = {
    datatype: np.dtype(dtype).newbyteorder("<") for dtype, datatype in DATATYPES.items()
}
JSON_TYPES: dict[str, tuple[set[type], type[np.generic]]] = {  # kind of a dtype -> types in JSON, dtype that holds them
    "f": ({float, int}, np.float64),
    "i": ({int}, np.int64),
    "u": ({int}, np.int64),
    "b": ({bool}, np.bool_),
}
MAX_RANK = 8
LENGTH_BYTES = 4  # before each element of BYTES
# What stands in place of a graph's own inputs, as BYTES: kind of the preprocessing -> name of the input.
GIVEN: dict[type, str] = {TextPreprocess: "text", ImagePreprocess: "picture"}
FILES = "bundles are files that the service watches: add, change or remove one in its folder of bundles"
TRACES = "traces are set by CALMCLIP_OTLP_ENDPOINT and OpenTelemetry's variables when the service starts"
LOGS = "the log is set by CALMCLIP_LOG when the service starts"
MEMORY = "no memory is shared with clients: send tensors in the body, as binary data"
# Parts of Triton's protocol that are not served: method and path -> what to do instead.
UNSUPPORTED = {
    **{("POST", f"/v2/repository/models/{{name}}/{verb}"): FILES for verb in ("load", "unload")},
    **{(verb, f"/v2{of}/trace/setting"): TRACES for verb, of in product(("GET", "POST"), ("", "/models/{name}"))},
    **{(verb, "/v2/logging"): LOGS for verb in ("GET", "POST")},
    **{
        (verb, f"/v2/{kind}sharedmemory{tail}"): MEMORY
        for kind, (verb, tail) in product(
            ("system", "cuda"),
            (
                ("GET", "/status"),
                ("GET", "/region/{region}/status"),
                ("POST", "/region/{region}/register"),
                ("POST", "/region/{region}/unregister"),
                ("POST", "/unregister"),
            ),
        )
    },
}

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
    output_datatype: Literal["FP32", "FP16"] = Field(
        default="FP32", description="of outputs that are FP32 in the graph; FP16 halves their bytes"
    )


class InputTensor(Body):
    name: str
    datatype: Datatype | Literal["BYTES"] = Field(
        description="FP16 is converted for a tensor that is FP32 in the graph. BYTES: texts as `text`, or files of "
        "pictures as `picture`, one of them instead of the graph's own inputs; the service prepares them"
    )
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
    versions: list[str] = Field(description="`1` alone")
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


class TensorConfig(Answer):
    name: str
    data_type: str = Field(description="TYPE_ and the datatype")
    dims: list[int] = Field(description="without the dimension of the batch if `max_batch_size` is over 0")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, batch: bool) -> "list[TensorConfig]":
        return [
            cls(name=each.name, data_type=f"TYPE_{each.datatype}", dims=each.shape[1:] if batch else each.shape)
            for each in TensorMetadata.of(tensors)
        ]


class DynamicBatching(Answer):
    preferred_batch_size: list[int] = Field(description="most rows of one run, CALMCLIP_BATCH__MAX_SIZE")
    max_queue_delay_microseconds: int = Field(description="CALMCLIP_BATCH__MAX_WAIT_MS")


class InstanceGroup(Answer):
    name: str
    kind: Literal["KIND_CPU"] = Field(description="graphs run on the processor")
    count: Literal[1] = Field(description="one session, which all requests share")


class GraphConfig(Answer):
    """What Triton's model configuration says of a graph."""

    name: str
    platform: str
    backend: str = Field(description="what runs the graph")
    max_batch_size: int = Field(description="rows of one request; 0: the first dimension does not count rows")
    input: list[TensorConfig] = Field(description="the tensors that it takes")
    output: list[TensorConfig] = Field(description="the tensors that it gives")
    instance_group: list[InstanceGroup] = Field(description="where it runs")
    default_model_filename: str = Field(description="the graph's file in its bundle")
    dynamic_batching: DynamicBatching | None = Field(None, description="how the calls of several requests are merged")


class DurationAnswer(Answer):
    count: int = Field(description="how often")
    ns: int = Field(description="nanoseconds in all")

    @classmethod
    def of(cls, spent: Spent) -> "DurationAnswer":
        return cls(count=spent.count, ns=spent.ns)


class InferenceStats(Answer):
    success: DurationAnswer = Field(description="calls that were answered")
    fail: DurationAnswer = Field(description="calls that ended in an error")
    queue: DurationAnswer = Field(description="their wait")
    compute_input: DurationAnswer = Field(description="per run: joins the rows of several calls")
    compute_infer: DurationAnswer = Field(description="per run: the graph")
    compute_output: DurationAnswer = Field(description="per run: parts the rows")
    cache_hit: DurationAnswer = Field(description="none: cached rows do not reach the graph")


class BatchStats(Answer):
    batch_size: int = Field(description="rows of a run")
    compute_input: DurationAnswer = Field(description="joins the rows of several calls")
    compute_infer: DurationAnswer = Field(description="the graph")
    compute_output: DurationAnswer = Field(description="parts the rows")


class GraphStats(Answer):
    name: str
    version: str
    last_inference: int = Field(description="milliseconds since 1970; 0: none yet")
    inference_count: int = Field(description="rows")
    execution_count: int = Field(description="runs of the graph")
    inference_stats: InferenceStats = Field(description="times of all calls and runs")
    batch_stats: list[BatchStats] = Field(description="times of the runs of each size")

    @classmethod
    def of(cls, name: str, statistics: Statistics) -> "GraphStats":
        compute = _compute(statistics.compute)
        return cls(
            name=name,
            version=VERSION,
            last_inference=statistics.last_ms,
            inference_count=statistics.rows,
            execution_count=statistics.runs,
            inference_stats=InferenceStats(
                success=DurationAnswer.of(statistics.calls),
                fail=DurationAnswer.of(statistics.failed),
                queue=DurationAnswer.of(statistics.queue),
                cache_hit=DurationAnswer(count=0, ns=0),
                **compute,
            ),
            batch_stats=[BatchStats(batch_size=n, **_compute(c)) for n, c in sorted(statistics.sizes.items())],
        )


def _compute(compute: Compute) -> dict[str, DurationAnswer]:
    return {f"compute_{name}": DurationAnswer.of(spent) for name, spent in vars(compute).items()}


class StatsAnswer(Answer):
    model_stats: list[GraphStats] = Field(description="one entry for each graph")


class IndexBody(Body):
    ready: StrictBool = Field(False, description="only those that can be run")


class IndexEntry(Answer):
    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"] = Field(description="whether it can be run")
    reason: str = Field(description="why it cannot be run")


class Reply(NamedTuple):
    """A body. ``json_bytes``: the length of its JSON, None if all of it is JSON."""

    body: bytes
    json_bytes: int | None


@dataclass(frozen=True)
class Given:
    """Texts or files of pictures in place of a graph's inputs, which the caller must check, and what was asked."""

    values: list[bytes]
    kind: str  # a value of `GIVEN`
    request: InferBody
    outputs: dict[str, bool]

    @property
    def texts(self) -> list[str]:
        """Raises `BadRequest`."""
        if self.kind != "text":
            return []
        try:
            return [value.decode() for value in self.values]
        except UnicodeDecodeError as error:
            raise BadRequest(f"input 'text' is not UTF-8: {error.reason}") from None


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
        versions=[VERSION],
        platform=PLATFORM,
        inputs=TensorMetadata.of(graph.inputs),
        outputs=TensorMetadata.of(graph.outputs),
    )


def config(name: str, graph: Graph, settings: Settings) -> GraphConfig:
    batch = settings.batch
    return GraphConfig(
        name=name,
        platform=PLATFORM,
        backend=BACKEND,
        max_batch_size=settings.limits.texts if graph.batch else 0,
        input=TensorConfig.of(graph.inputs, batch=graph.batch),
        output=TensorConfig.of(graph.outputs, batch=graph.batch),
        instance_group=[InstanceGroup(name=name, kind="KIND_CPU", count=1)],
        default_model_filename=graph.file,
        dynamic_batching=DynamicBatching(
            preferred_batch_size=[batch.max_size], max_queue_delay_microseconds=round(batch.max_wait_ms * 1000)
        )
        if graph.batch
        else None,
    )


def index(hub: Hub, *, ready: bool) -> list[IndexEntry]:
    """The graphs that can be run and, unless only those are wanted, the bundles that did not load."""
    graphs = [IndexEntry(name=name, version=VERSION, state="READY", reason="") for name in served(hub)]
    failed = [] if ready else hub.failed.items()
    return graphs + [
        IndexEntry(name=name, version=VERSION, state="UNAVAILABLE", reason=reason) for name, reason in failed
    ]


def infer(bundle: Bundle, role: str, body: bytes, json_bytes: str | None, max_rows: int) -> Flow[Reply | Given]:
    """Run one graph: a request's body -> the answer's body. ``json_bytes``: the header Inference-Header-Content-Length.

    If the request has texts or pictures in place of tensors, the answer is those, for `infer_given`.

    Raises `InvalidRequest`, and `BadRequest` that names the tensor.
    """
    graph = bundle.graph(role)
    request, data = _parse(body, json_bytes)
    if any(tensor.datatype == "BYTES" for tensor in request.inputs):
        given = _given(request, data, graph)
        _check_rows(given.kind, len(given.values), max_rows)
        return given
    feeds = _feeds(request, data, graph)
    for name, array in feeds.items():
        if graph.batch and array.ndim:
            _check_rows(name, len(array), max_rows)
    requested = _outputs(request, graph)
    return _reply(bundle, role, request, requested, (yield from run(bundle, RawRequest(role, feeds))))


def infer_given(bundle: Bundle, role: str, given: Given) -> Flow[Reply]:
    """Prepare texts or pictures as the bundle's tasks do, and run the graph on them; texts have the bundle's prompt.

    Texts are padded to the longest: time and memory grow with their number times its tokens. Raises the `InputError`s
    of texts and pictures, and `BadRequest` as `run`.
    """
    if given.kind == "text":
        preparer = bundle.text(role)
        words, texts = preparer.spec.prompt_text(None), given.texts
        feeds = yield Work("preprocess", lambda: preparer.prepare(texts, words))
        arrays = yield from run(bundle, RawRequest(role, feeds))
    else:
        answers = yield Together([_picture(bundle, role, picture) for picture in given.values])
        shapes = {name: {answer[name].shape[1:] for answer in answers} for name in given.outputs}
        if ragged := [name for name, kinds in shapes.items() if len(kinds) > 1]:
            raise BadRequest(f"output {ragged[0]!r} has another shape for each picture; send them one by one")
        arrays = {name: np.concatenate([answer[name] for answer in answers]) for name in given.outputs}
    return _reply(bundle, role, given.request, given.outputs, arrays)


def _picture(bundle: Bundle, role: str, picture: bytes) -> Flow[Arrays]:
    feeds, _ = yield from prepared(bundle, picture, role)
    return (yield from run(bundle, RawRequest(role, feeds)))


def _check_rows(name: str, rows: int, most: int) -> None:
    if rows > most:
        raise BadRequest(f"input {name!r} has {rows} rows; at most {most} are read at once")


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


def _feeds(request: InferBody, data: memoryview, graph: Graph) -> Arrays:
    feeds: dict[str, Array] = {}
    for tensor, part in _parts(request, data):
        if tensor.name in feeds:
            raise BadRequest(f"input {tensor.name!r} is given twice; expected one")
        array = _from_json(tensor) if part is None else _from_bytes(tensor, part)
        wanted = graph.inputs.get(tensor.name)
        if array.dtype == np.float16 and wanted and wanted.dtype == "float32":
            array = array.astype(np.float32)
        feeds[tensor.name] = array
    return feeds


def _parts(request: InferBody, data: memoryview) -> Iterator[tuple[InputTensor, memoryview | None]]:
    """Each input, and its bytes; None if its data is in the JSON."""
    for tensor in request.inputs:
        size = tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise BadRequest(f"input {tensor.name!r} needs `data` or the parameter `binary_data_size`, one of them")
        yield tensor, None if size is None else data[:size]
        data = data[size or 0 :]
    if data:
        raise BadRequest(f"{len(data)} bytes follow the last input; expected none")


def _given(request: InferBody, data: memoryview, graph: Graph) -> Given:
    """The texts or pictures of a request with an input of BYTES."""
    kind = GIVEN.get(type(graph.preprocess))
    names = [tensor.name for tensor in request.inputs]
    if kind is None or names != [kind]:
        takes = f"BYTES as the input {kind!r} alone" if kind else f"no BYTES, only the tensors {list(graph.inputs)}"
        raise BadRequest(f"the graph takes {takes}; the inputs {names} were given")
    ((tensor, part),) = _parts(request, data)
    values, rest = (_strings(tensor), 0) if part is None else _elements(part)
    if part is None and kind == "picture":
        raise BadRequest("the data of input 'picture' is in the JSON; send files as binary data, after it")
    size = tensor.parameters.binary_data_size
    if rest or len(values) != math.prod(tensor.shape) or (part is not None and len(part) != size):
        raise BadRequest(
            f"input {kind!r} has {len(values)} complete elements and {rest} bytes after them; "
            f"its `shape` is {tensor.shape}"
            + ("" if part is None else f", its `binary_data_size` {size}, and the body has {len(part)} of them")
        )
    if not values:
        raise BadRequest(f"input {kind!r} holds nothing; expected at least one element")
    return Given(values, kind, request, _outputs(request, graph))


def _strings(tensor: InputTensor) -> list[bytes]:
    flat, _ = _flat(tensor.data or [])
    if not set(map(type, flat)) <= {str}:
        raise BadRequest(f"the data of input {tensor.name!r} must be BYTES: texts, in rows of equal length")
    return [text.encode("utf-8", "surrogatepass") for text in flat]


def _elements(data: memoryview) -> tuple[list[bytes], int]:
    """The complete elements of BYTES as binary data, each after its length, a little-endian uint32; and the number of
    bytes after them."""
    values: list[bytes] = []
    while len(data) >= LENGTH_BYTES:
        (size,) = struct.unpack_from("<I", data)
        if size > len(data) - LENGTH_BYTES:
            break
        values.append(bytes(data[LENGTH_BYTES : LENGTH_BYTES + size]))
        data = data[LENGTH_BYTES + size :]
    return values, len(data)


def _from_bytes(tensor: InputTensor, data: memoryview) -> Array:
    dtype, size = DTYPES[tensor.datatype], tensor.parameters.binary_data_size  # not BYTES, see `infer`
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


def _reply(
    bundle: Bundle, role: str, request: InferBody, outputs: Mapping[str, bool], arrays: Mapping[str, Array]
) -> Reply:
    """``outputs``: name -> whether it is sent as bytes after the JSON."""
    tensors: list[dict[str, Any]] = []
    binary_data: list[bytes] = []
    for output, binary in outputs.items():
        array = arrays[output]
        if request.parameters.output_datatype == "FP16" and array.dtype == np.float32:
            array = _halved(output, array)
        datatype = DATATYPES[array.dtype.name]
        tensor: dict[str, Any] = {"name": output, "datatype": datatype, "shape": array.shape}
        if binary:
            binary_data.append(array.astype(DTYPES[datatype], copy=False).tobytes())
            tensor["parameters"] = {"binary_data_size": len(binary_data[-1])}
        else:
            tensor["data"] = np.ascontiguousarray(array).ravel()
        tensors.append(tensor)
    named = {} if request.id is None else {"id": request.id}
    answer = {"model_name": f"{bundle.name}.{role}", **named, "outputs": tensors}
    head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return Reply(b"".join([head, *binary_data]), len(head) if binary_data else None)


def _halved(name: str, array: Array) -> Array:
    with np.errstate(over="ignore"):
        half: Array = array.astype(np.float16)
    if np.isinf(half).any() and not np.isinf(array).any():
        raise BadRequest(f"output {name!r} has numbers out of the range of FP16; ask for FP32")
    return half
