"""Lend a graph's weights to ONNX Runtime, and give the memory back once our operators have packed them.

An operator of the library packs its constant weight when its node is created, and reads the original no more. So the
original is read into pages of its own, which ONNX Runtime borrows. Once the session is created, the pages return to the
system. The file is not mapped, because a cut in place would crash the process.

A wrong guess would change answers, so nothing is guessed. A weight is given back only if every reader in the graph is
an operator that packs it, and if as many living nodes have packed from its address: the library counts them. A node
that ONNX Runtime runs by its function packs nothing, and a node that is given a copy packs from elsewhere; then the
pages stay. Pages that were given back cannot be read any more: a read would end the process.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from calmclip.models.flow import Array
from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import DOMAIN
from calmclip.models.ops.table import OPS
from calmclip.models.runtime import onnx_file
from calmclip.models.runtime.onnx_file import NotRead, Parts, Reader, Stored

PACKING = {
    Reader(DOMAIN, op.name, place)
    for op in OPS
    for place, (name, tensor) in enumerate(op.inputs.items())
    if name == "weight" and tensor.dtype == "int8"
}
GATHER = Reader("", "Gather", 0)  # ONNX Runtime reads its rows where they lie, and makes no other copy
MOST = 1 << 30  # bytes of external tensors that a model holds in itself: half of protobuf's limit


class Pages:
    """``size`` bytes of this process in whole pages, aligned to one, which can return to the system in parts."""

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        self._memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)  # a part of a huge page would not return
        self.address = self.array(np.dtype(np.uint8), (0,), 0).ctypes.data

    def array(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> Array:
        return np.ndarray(shape, dtype, self._memory, offset)

    def give_back(self, offset: int, size: int) -> None:
        """Whole pages from ``offset``. Nothing may read them any more."""
        size = whole(size)
        self._memory.madvise(mmap.MADV_DONTNEED, offset, size)
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(size), 0)


class Lent:
    """Weights of a graph in ``folder``, apart from its ``model``. ``tensors``: for ONNX Runtime, which copies none."""

    def __init__(self, folder: Path, parts: Parts, apart: list[Stored]) -> None:
        self.folder = folder
        self.model = parts.model({stored.name for stored in apart})
        self._offsets: dict[str, int] = {}
        size = 0
        for stored in apart:
            self._offsets[stored.name] = size
            size += whole(stored.length)
        self._stored = {stored.name: stored for stored in apart}
        self.pages = Pages(size)
        self.tensors: dict[str, Array] = {}
        for name, stored in self._stored.items():
            array = self.tensors[name] = self.pages.array(stored.dtype, stored.shape, self._offsets[name])
            onnx_file.data(stored, array.reshape(-1).view(np.uint8).data)

    def give_back(self, packed: Callable[[int], int]) -> None:
        """Give back the weights that all readers have packed. ``packed``: address -> nodes that packed from it."""
        for name, stored in self._stored.items():
            offset = self._offsets[name]
            if PACKING.issuperset(stored.readers) and packed(self.pages.address + offset) == len(stored.readers):
                del self.tensors[name]
                self.pages.give_back(offset, stored.length)


def lend(path: Path, library: Library | None, left: Collection[str] = ()) -> Lent | None:
    """None if the graph has nothing to lend, or cannot be read in parts: ONNX Runtime reads the file itself then.

    ``left``: names of operators that the session leaves to their functions. They pack nothing, and ONNX Runtime frees a
    weight that it packs itself only if it is its own.
    """
    if sys.platform != "linux":
        return None
    try:
        parts = onnx_file.read(path)
        apart = _apart(parts, {reader for reader in PACKING if library and reader.op not in left})
        some = apart or any(stored.external for stored in parts.stored)
        return Lent(path.resolve().parent, parts, apart) if some else None
    except (NotRead, OSError):
        return None


@contextmanager
def counted(library: Library | None, pages: Pages) -> Iterator[Callable[[int], int]]:
    """While nodes are created: the library counts those that pack weights from ``pages``."""
    if library is None:
        yield lambda address: 0
        return
    handle = library.handle
    handle.calmclip_packed.restype = ctypes.c_size_t
    handle.calmclip_lend(ctypes.c_void_p(pages.address), ctypes.c_size_t(pages.size))
    try:
        yield lambda address: int(handle.calmclip_packed(ctypes.c_void_p(address)))
    finally:
        handle.calmclip_unlend(ctypes.c_void_p(pages.address))


def whole(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _apart(parts: Parts, packing: set[Reader]) -> list[Stored]:
    """Weights of operators that pack them, and what is read in place beside them. The model holds the other tensors:
    ONNX Runtime may replace them by a packed copy of its own, and then frees them."""
    large = [stored for stored in parts.stored if stored.length >= onnx_file.LEAST and stored.readers]
    apart = [stored for stored in large if packing.issuperset(stored.readers)]
    if apart:
        apart += [stored for stored in large if {*stored.readers} == {GATHER}]
    names = {stored.name for stored in apart}
    rest = [stored for stored in parts.stored if stored.external and stored.name not in names]
    return apart + rest if sum(stored.length for stored in rest) > MOST else apart
