"""Read an ONNX file in parts: its large tensors apart from the rest, without a parser's copy of them.

A file is a protobuf message: fields, each a number, a wire type and a value (protobuf.dev/programming-guides/encoding).
The numbers of the fields are those of onnx.proto (ONNX, Apache-2.0).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

LEAST = 1 << 16  # bytes of a tensor that is worth pages of its own
DEEPEST = 50  # graphs inside graphs; protobuf itself ends at 100 messages
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DTYPES = {
    1: "f4",
    2: "u1",
    3: "i1",
    4: "u2",
    5: "i2",
    6: "i4",
    7: "i8",
    9: "?",
    10: "f2",
    11: "f8",
    12: "u4",
    13: "u8",
}
_EXTERNAL = 1  # TensorProto.DataLocation

# The numbers of fields, by message.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_INPUT, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 4, 5, 7
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 6, 11
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_DATA, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 9, 13, 14
_VALUE_NAME = 1
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


class NotRead(ValueError):
    """The file is damaged, or has what this module does not read; ONNX Runtime may read it, or say what is wrong."""


class Reader(NamedTuple):
    """Who reads an initializer: an operator of the graph, and the place among its inputs; "" for anything else, such as
    a graph inside the graph, or the graph's outputs."""

    domain: str
    op: str
    place: int


@dataclass
class Stored:
    """An initializer of at least `LEAST` bytes: its type, its shape and where its data lies.

    ``head``: its message without data, data_location and external_data. ``external``: it is not in the graph's file.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int
    external: bool
    head: bytes
    readers: list[Reader] = field(default_factory=list)


@dataclass(frozen=True)
class Parts:
    """An ONNX file: its bytes around the large initializers, in their order. ``graph``: those of the graph, which the
    model's bytes ``before`` and ``after`` enclose."""

    before: bytes
    graph: list[bytes | Stored]
    after: bytes

    @property
    def stored(self) -> list[Stored]:
        return [part for part in self.graph if isinstance(part, Stored)]

    def model(self, apart: frozenset[str] | set[str]) -> bytes:
        """The model without the data of the initializers ``apart``: it names their places in the files of this folder.
        With the data of all others, also external ones."""
        graph = b"".join(
            part if isinstance(part, bytes) else _field(_GRAPH_INITIALIZER, _tensor(part, part.name in apart))
            for part in self.graph
        )
        return b"".join((self.before, _field(_MODEL_GRAPH, graph), self.after))


def read(path: Path) -> Parts:
    """Raises `NotRead`, `OSError`."""
    path = path.resolve()
    try:
        with path.open("rb") as file:
            return _model(file, path)
    except NotRead:
        raise
    except (EOFError, ValueError, OverflowError) as error:  # of file names too
        raise NotRead(f"{path}: {error!r}") from None


def data(stored: Stored, into: memoryview) -> None:
    """Read the tensor's data. Raises `NotRead` if there is less, `OSError`."""
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.offset)
        done = 0
        while done < stored.length:
            count = file.readinto(into[done : stored.length])
            if not count:
                raise NotRead(f"{stored.file} ends within the data of {stored.name!r}")
            done += count


def _model(file: BinaryIO, path: Path) -> Parts:
    before, after, graph = bytearray(), bytearray(), None
    for number, wire, length in _fields(file, _end(file)):
        if number == _MODEL_GRAPH and wire == _BYTES:
            if graph is not None:
                raise NotRead(f"{path}: two graphs")
            graph = _graph(file, length, path)
        else:
            (before if graph is None else after).extend(_copy(file, number, wire, length))
    if graph is None:
        raise NotRead(f"{path}: no graph")
    return Parts(bytes(before), graph, bytes(after))


def _graph(file: BinaryIO, length: int, path: Path) -> list[bytes | Stored]:
    parts: list[bytes | Stored] = []
    rest = bytearray()
    stored: dict[str, Stored] = {}
    readers: dict[str, list[Reader]] = {}
    for number, wire, size in _fields(file, file.tell() + length):
        if number == _GRAPH_INITIALIZER and wire == _BYTES and size >= 1:
            start = file.tell()
            tensor = _initializer(file, size, path)
            if tensor:
                if tensor.name in stored:
                    raise NotRead(f"{path}: two initializers {tensor.name!r}")
                stored[tensor.name] = tensor
                parts += [bytes(rest), tensor]
                rest.clear()
                continue
            file.seek(start)
        content = _copy(file, number, wire, size)
        if wire == _BYTES:
            message = content[len(content) - size :]
            if number == _GRAPH_NODE:
                _node(message, readers, 0)
            elif number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
                _other(_value_name(message), readers)
        rest += content
    parts.append(bytes(rest))
    for name, tensor in stored.items():
        tensor.readers = readers.get(name, [])
    return parts


def _initializer(file: BinaryIO, length: int, path: Path) -> Stored | None:
    """None for a tensor that is small, or not of plain numbers in one piece."""
    end = file.tell() + length
    name, kind, dims, where, head = "", 0, [], None, bytearray()
    external: dict[str, str] = {}
    for number, wire, size in _fields(file, end):
        if number == _TENSOR_DATA and wire == _BYTES:
            where = file.tell(), size
            file.seek(size, 1)
            continue
        if number == _TENSOR_EXTERNAL and wire == _BYTES:
            key, value = _entry(_exactly(file, size))
            external[key] = value
            continue
        content = _copy(file, number, wire, size)
        if number == _TENSOR_LOCATION:
            continue
        head += content
        if number == _TENSOR_NAME and wire == _BYTES:
            name = content[len(content) - size :].decode()
        elif number == _TENSOR_TYPE and wire == _VARINT:
            kind = size
        elif number == _TENSOR_DIMS and wire == _VARINT:
            dims.append(size)
        elif number == _TENSOR_DIMS and wire == _BYTES:
            dims += _packed(content[len(content) - size :])
    if external and where is None:
        file_of = _beside(path, external.get("location", ""))
        try:
            where = int(external.get("offset", 0)), int(external["length"])
        except (KeyError, ValueError):
            raise NotRead(f"{path}: the place of {name!r} is {external}") from None
    else:
        file_of = path
    if not name or kind not in _DTYPES or where is None:
        if external:
            raise NotRead(f"{path}: {name!r} is external, of type {kind}")
        return None
    dtype = np.dtype(_DTYPES[kind]).newbyteorder("<")
    expected = dtype.itemsize
    for side in dims:
        expected *= side
    if where[1] != expected or where[0] < 0:
        raise NotRead(f"{path}: {name!r} has {where[1]} bytes, not {expected}")
    if expected < LEAST and not external:
        return None
    return Stored(name, dtype, tuple(dims), file_of, *where, bool(external), bytes(head))


def _beside(path: Path, location: str) -> Path:
    """A file in the folder of ``path``. Raises `NotRead` for another place, which ONNX Runtime refuses too."""
    if not location or Path(location).name != location or (beside := path.with_name(location)).resolve() != beside:
        raise NotRead(f"{path}: weights at {location!r}, not beside it")
    return beside


def _node(message: bytes, readers: dict[str, list[Reader]], depth: int) -> None:
    """Note what the node reads, and what graphs in its attributes read."""
    if depth > DEEPEST:
        raise NotRead(f"graphs inside graphs, {depth} deep")
    inputs: list[str] = []
    op = domain = ""
    file = BytesIO(message)
    for number, wire, size in _fields(file, len(message)):
        if wire != _BYTES:
            _skip(file, wire, size)
        elif number == _NODE_INPUT:
            inputs.append(_exactly(file, size).decode())
        elif number == _NODE_OP:
            op = _exactly(file, size).decode()
        elif number == _NODE_DOMAIN:
            domain = _exactly(file, size).decode()
        elif number == _NODE_ATTRIBUTE:
            _attribute(_exactly(file, size), readers, depth)
        else:
            file.seek(size, 1)
    for place, name in enumerate(inputs):
        readers.setdefault(name, []).append(Reader("", "", 0) if depth else Reader(domain, op, place))


def _attribute(message: bytes, readers: dict[str, list[Reader]], depth: int) -> None:
    file = BytesIO(message)
    for number, wire, size in _fields(file, len(message)):
        if wire == _BYTES and number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            _inner(_exactly(file, size), readers, depth + 1)
        else:
            _skip(file, wire, size)


def _inner(message: bytes, readers: dict[str, list[Reader]], depth: int) -> None:
    file = BytesIO(message)
    for number, wire, size in _fields(file, len(message)):
        if wire == _BYTES and number == _GRAPH_NODE:
            _node(_exactly(file, size), readers, depth)
        elif wire == _BYTES and number == _GRAPH_OUTPUT:
            _other(_value_name(_exactly(file, size)), readers)
        else:
            _skip(file, wire, size)


def _other(name: str, readers: dict[str, list[Reader]]) -> None:
    readers.setdefault(name, []).append(Reader("", "", 0))


def _value_name(message: bytes) -> str:
    return _texts(message, _VALUE_NAME).get(_VALUE_NAME, "")


def _entry(message: bytes) -> tuple[str, str]:
    texts = _texts(message, _ENTRY_KEY, _ENTRY_VALUE)
    return texts.get(_ENTRY_KEY, ""), texts.get(_ENTRY_VALUE, "")


def _texts(message: bytes, *wanted: int) -> Mapping[int, str]:
    file, texts = BytesIO(message), {}
    for number, wire, size in _fields(file, len(message)):
        if wire == _BYTES and number in wanted:
            texts[number] = _exactly(file, size).decode()
        else:
            _skip(file, wire, size)
    return texts


def _fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, wire type, and the value or the length of each field. The caller takes the bytes of a field that has any,
    before the next one."""
    while (at := file.tell()) < end:
        key = _varint(file)
        number, wire = key >> 3, key & 7
        if number < 1 or wire not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise NotRead(f"no field at {at}")
        size = _varint(file) if wire in (_VARINT, _BYTES) else {_FIXED64: 8, _FIXED32: 4}[wire]
        if wire != _VARINT and file.tell() + size > end:
            raise NotRead(f"the field at {at} ends after its message")
        yield number, wire, size
    if at != end:
        raise NotRead(f"a field ends at {at}, after its message at {end}")


def _copy(file: BinaryIO, number: int, wire: int, size: int) -> bytes:
    """The field as it is stored; its content are the last ``size`` bytes, unless it is a number."""
    key = _number(number << 3 | wire)
    if wire == _VARINT:
        return key + _number(size)
    if wire == _BYTES:
        return key + _number(size) + _exactly(file, size)
    return key + _exactly(file, size)


def _skip(file: BinaryIO, wire: int, size: int) -> None:
    if wire != _VARINT:
        file.seek(size, 1)


def _field(number: int, content: bytes) -> bytes:
    return _number(number << 3 | _BYTES) + _number(len(content)) + content


def _tensor(stored: Stored, apart: bool) -> bytes:
    if apart:
        place = {"location": stored.file.name, "offset": stored.offset, "length": stored.length}
        entries = [
            _field(_ENTRY_KEY, key.encode()) + _field(_ENTRY_VALUE, str(value).encode()) for key, value in place.items()
        ]
        external = b"".join(_field(_TENSOR_EXTERNAL, entry) for entry in entries)
        return stored.head + external + _number(_TENSOR_LOCATION << 3) + _number(_EXTERNAL)
    content = bytearray(stored.length)
    data(stored, memoryview(content))
    return stored.head + _field(_TENSOR_DATA, bytes(content))


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    while True:
        (byte,) = _exactly(file, 1)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7
        if shift > 63:
            raise NotRead("a number of more than 64 bits")


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _packed(content: bytes) -> list[int]:
    file, numbers = BytesIO(content), []
    while file.tell() < len(content):
        numbers.append(_varint(file))
    return numbers


def _exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise EOFError("it ends within a field")
    return content


def _end(file: BinaryIO) -> int:
    end = file.seek(0, 2)
    file.seek(0)
    return end
