"""Graphs -> ONNX files of a bundle; weights that several graphs hold are stored once.

Initializers with equal bytes in two or more graphs go to one external-data file, which the manifest lists like every
other file. Weights of one graph stay inside its ONNX file if they fit: protobuf, the format of ONNX files, ends at
2 GB. A larger graph has a separate file for its weights.
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
LARGEST = 1 << 30  # bytes of weights inside a graph's ONNX file: half of protobuf's limit, and in memory twice
_LEAST = 4096  # bytes; a smaller tensor is stored in its graph, even if other graphs hold the same


def save(graphs: Mapping[str, onnx.ModelProto], directory: Path) -> None:
    """Write ROLE.onnx per graph, ``weights.bin`` if graphs have equal weights, and ROLE.bin for a graph with more than
    `LARGEST` bytes of unshared weights. The graphs do not change."""
    digests = {role: _digests(model) for role, model in graphs.items()}
    holders = Counter(digest for by_name in digests.values() for digest in set(by_name.values()))
    with closing(_External(directory / SHARED)) as shared:
        for role, model in graphs.items():
            unshared = sum(
                light.size(t) for t in model.graph.initializer if holders[digests[role].get(t.name, b"")] == 1
            )
            with closing(_External(directory / f"{role}.bin")) as separate:
                file = light.lighten(model)
                tensors = {tensor.name: tensor for tensor in model.graph.initializer}
                for tensor in file.graph.initializer:
                    if digest := digests[role].get(tensor.name):
                        if holders[digest] > 1 or unshared > LARGEST:
                            external = shared if holders[digest] > 1 else separate
                            external.put(tensor, tensors[tensor.name].raw_data, digest)
                        else:
                            tensor.CopyFrom(tensors[tensor.name])
            (directory / f"{role}.onnx").write_bytes(file.SerializeToString())


def _digests(model: onnx.ModelProto) -> dict[str, bytes]:
    return {t.name: hashlib.sha256(t.raw_data).digest() for t in model.graph.initializer if light.big(t, _LEAST)}


class _External:
    """A file of tensors, each once and on a new page; the file is created with the first tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._places: dict[bytes, int] = {}

    def put(self, tensor: onnx.TensorProto, data: bytes, digest: bytes) -> None:
        """Write ``data`` unless the file holds it, and let ``tensor`` refer to it."""
        file = self._file = self._file or self.path.open("wb")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        if digest not in self._places:
            file.write(b"\0" * (-file.tell() % light.PAGE))
            self._places[digest] = file.tell()
            file.write(data)
        del tensor.external_data[:]
        for key, value in (("location", self.path.name), ("offset", self._places[digest]), ("length", len(data))):
            tensor.external_data.add(key=key, value=str(value))

    def close(self) -> None:
        if self._file:
            self._file.close()
