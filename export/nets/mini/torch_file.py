"""A state dict in torch's first file format -> numpy arrays, without torch.

The file is a chain of pickles: a magic number, a protocol version, facts about the machine, the state dict, and the
keys of its storages; then, in the order of the keys, each storage as its number of elements (int64) and its bytes. A
tensor of the state dict names a storage, an offset, a shape and strides. Format: `torch/serialization.py`,
`_legacy_save`.
"""

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from calmclip.models.errors import WeightsMissing
from calmclip.models.flow import Array

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES: dict[str, np.dtype[Any]] = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


@dataclass(frozen=True)
class _View:
    """A tensor before its storage is read; ``strides`` count elements."""

    key: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, storage: Array) -> Array:
        """Raises `ValueError` if it reaches out of the storage."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        if min(self.offset, *self.shape, *self.strides, 0) < 0 or last >= len(storage):
            raise ValueError(f"a tensor {list(self.shape)} reaches out of its storage of {len(storage)} numbers")
        strides = tuple(step * self.dtype.itemsize for step in self.strides)
        return np.lib.stride_tricks.as_strided(storage[self.offset :], self.shape, strides).copy()


def read(path: Path) -> dict[str, Array]:
    """Raises `WeightsMissing` if the file is in another format, or asks for anything but tensors."""
    with path.open("rb") as file:
        try:
            magic, _, _ = (_Reader(file).load() for _ in range(3))
            if magic != _MAGIC:
                raise ValueError(f"its magic number is {magic!r}")
            views, keys = _Reader(file).load(), _Reader(file).load()
            dtypes = {view.key: view.dtype for view in views.values()}
            storages = {key: _storage(file, dtypes[key]) for key in keys}
            return {name: view.of(storages[view.key]) for name, view in views.items()}
        except (pickle.UnpicklingError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
            raise WeightsMissing(f"{path} is no state dict of torch's first format: {error}") from None


def _storage(file: BinaryIO, dtype: np.dtype[Any]) -> Array:
    size = int.from_bytes(file.read(8), "little") * dtype.itemsize
    rest = os.fstat(file.fileno()).st_size - file.tell()
    if size > rest:
        raise ValueError(f"a storage has {size} bytes, and the file {rest} more")
    return np.frombuffer(file.read(size), dtype)


class _Reader(pickle.Unpickler):
    """Knows what a state dict needs, and runs nothing else."""

    def persistent_load(self, pid: Any) -> tuple[str, np.dtype[Any]]:
        _, kind, key, *_ = pid
        return str(key), _DTYPES[kind]

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any] | str] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _view,
            **{("torch", storage): storage for storage in _DTYPES},
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")
        return known[module, name]


def _view(storage: tuple[str, np.dtype[Any]], offset: int, shape: Any, strides: Any, *_: Any) -> _View:
    key, dtype = storage
    return _View(key, dtype, offset, tuple(shape), tuple(strides))
