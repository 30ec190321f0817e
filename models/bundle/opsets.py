"""The operator sets of an ONNX file, read without the package onnx, which a service does not have.

Source: ModelProto in ONNX's onnx.proto; the encoding: https://protobuf.dev/programming-guides/encoding
"""

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from calmclip.models.errors import BundleInvalid

_OPSET_IMPORT, _FUNCTIONS = 8, 25  # fields of ModelProto
_DOMAIN, _VERSION = 1, 2  # fields of OperatorSetIdProto
_VARINT, _BYTES = 0, 2  # wire types
_FIXED = {1: 8, 5: 4}  # other wire types -> bytes
_READ = 1 << 12  # bytes; an operator set is shorter, so the value of a longer field is left out


def opsets(file: Path) -> tuple[dict[str, int], int]:
    """-> domain -> version ("" is ai.onnx), and the number of local functions. Weights are not read.

    Raises `BundleInvalid` if the file is not in the encoding.
    """
    versions: dict[str, int] = {}
    functions = 0
    with file.open("rb") as stream:
        try:
            for field, value in _fields(stream):
                functions += field == _FUNCTIONS
                if field == _OPSET_IMPORT:
                    entry = dict(_fields(BytesIO(_bytes(value))))
                    versions[_bytes(entry.get(_DOMAIN, b"")).decode()] = int(entry.get(_VERSION, 0))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise BundleInvalid(f"{file} is no ONNX file ({error!r}); export the checkpoint again") from None
    return versions, functions


def _fields(stream: BinaryIO) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of the message; b"" for a value that is long or of a fixed size."""
    while head := stream.read(1):
        key = _varint(stream, head)
        field, kind = key >> 3, key & 7
        if kind == _VARINT:
            yield field, _varint(stream, stream.read(1))
            continue
        length = _varint(stream, stream.read(1)) if kind == _BYTES else _FIXED[kind]
        if kind == _BYTES and length <= _READ:
            yield field, stream.read(length)
        else:
            stream.seek(length, os.SEEK_CUR)
            yield field, b""


def _varint(stream: BinaryIO, byte: bytes) -> int:
    """The number whose first byte was read: seven bits a byte, lowest first."""
    number, shift = byte[0] & 127, 7
    while byte[0] & 128:
        byte = stream.read(1)
        number |= (byte[0] & 127) << shift
        shift += 7
    return number


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number, expected bytes")
    return value
