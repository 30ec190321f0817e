"""Graphs -> ONNX files of a bundle, where what several graphs hold is stored once.

Initializers with equal bytes in two or more graphs go to one external-data file, listed in the manifest like
every other; what only one graph holds stays inside it, unless that is more than fits: protobuf, in which an ONNX
file is written, ends at 2 GB. Such a graph has a file of its own for its weights.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import onnx

from calmclip.export import light

SHARED = "weights.bin"
LARGEST = 1 << 30  # bytes of weights inside a graph's own file: half of what protobuf writes, and held twice meanwhile
_WORTH = 4096  # bytes; what is smaller is stored with its graph, even where another has the same
_ALIGN = 4096  # a page: ONNX Runtime maps aligned data instead of reading it


def save(graphs: Mapping[str, onnx.ModelProto], directory: Path) -> None:
    """Write ROLE.onnx per graph, ``weights.bin`` where there is something to share, and ROLE.bin for a graph with
    more than `LARGEST` bytes of its own. The graphs stay as they are."""
    digests = {role: _digests(model) for role, model in graphs.items()}
    seen = Counter(digest for found in digests.values() for digest in set(found.values()))
    with closing(_External(directory / SHARED)) as shared:
        for role, model in graphs.items():
            own = sum(light.size(t) for t in model.graph.initializer if seen[digests[role].get(t.name, b"")] == 1)
            with closing(_External(directory / f"{role}.bin")) as apart:
                file = light.lighten(model)
                held = {tensor.name: tensor for tensor in model.graph.initializer}
                for tensor in file.graph.initializer:
                    if digest := digests[role].get(tensor.name):
                        if seen[digest] > 1 or own > LARGEST:
                            (shared if seen[digest] > 1 else apart).put(tensor, held[tensor.name].raw_data, digest)
                        else:
                            tensor.CopyFrom(held[tensor.name])
            (directory / f"{role}.onnx").write_bytes(file.SerializeToString())


def _digests(model: onnx.ModelProto) -> dict[str, bytes]:
    return {t.name: hashlib.sha256(t.raw_data).digest() for t in model.graph.initializer if light.big(t, _WORTH)}


class _External:
    """A file of tensors, each on a page of its own and there once; made when the first comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._places: dict[bytes, int] = {}

    def put(self, tensor: onnx.TensorProto, data: bytes, digest: bytes) -> None:
        """Write ``data``, unless it is there, and let ``tensor`` say where."""
        file = self._file = self._file or self.path.open("wb")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        if digest not in self._places:
            file.write(b"\0" * (-file.tell() % _ALIGN))
            self._places[digest] = file.tell()
            file.write(data)
        del tensor.external_data[:]
        for key, value in (("location", self.path.name), ("offset", self._places[digest]), ("length", len(data))):
            tensor.external_data.add(key=key, value=str(value))

    def close(self) -> None:
        if self._file:
            self._file.close()
