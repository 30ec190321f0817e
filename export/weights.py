"""Graphs -> ONNX files of a bundle, where what several graphs hold is stored once.

Initializers with equal bytes in two or more graphs go to one external-data file, listed in the manifest like
every other; what only one graph holds stays inside it.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data

SHARED = "weights.bin"
_MIN_BYTES = 4096  # smaller ones are not worth an entry
_ALIGN = 4096  # a page: ONNX Runtime maps aligned data instead of reading it


def save(graphs: Mapping[str, onnx.ModelProto], directory: Path) -> None:
    """Write ROLE.onnx per graph and, where there is something to share, ``weights.bin``."""
    raw = {
        role: [(i, i.raw_data) for i in m.graph.initializer if len(i.raw_data) >= _MIN_BYTES]
        for role, m in graphs.items()
    }
    digests = Counter(d for found in raw.values() for d in {hashlib.sha256(data).digest() for _, data in found})
    places: dict[bytes, int] = {}
    shared = bytearray()
    for found in raw.values():
        for initializer, data in found:
            digest = hashlib.sha256(data).digest()
            if digests[digest] < 2:
                continue
            if digest not in places:
                shared.extend(b"\0" * (-len(shared) % _ALIGN))
                places[digest] = len(shared)
                shared.extend(data)
            set_external_data(initializer, SHARED, places[digest], len(data))
            initializer.ClearField("raw_data")
    for role, model in graphs.items():
        (directory / f"{role}.onnx").write_bytes(model.SerializeToString())
    if shared:
        (directory / SHARED).write_bytes(shared)
