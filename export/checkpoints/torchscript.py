"""Tensors from a TorchScript archive (OpenAI's CLIP .pt), without loading the program in it.

An archive is a zip: ``NAME/data.pkl`` pickles the module tree, ``NAME/data/0`` and so on hold the numbers,
``NAME/code/`` the program. `torch.jit.load` would compile that program. Here an unpickler reads data.pkl that knows
three kinds: tensors, ordered dictionaries, and module objects, which become plain dictionaries. The file is
memory-mapped: only the numbers that are used come into memory.
"""

import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmclip.models.errors import UnknownCheckpoint

_LOCAL = 30  # bytes of a zip's local header; it ends with the lengths of the name and of the extra field
_STORAGES = {
    f"{kind}Storage": dtype
    for kind, dtype in {
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Double": torch.float64,
        "Long": torch.int64,
        "Int": torch.int32,
        "Bool": torch.bool,
    }.items()
}


def is_archive(file: Path) -> bool:
    """Whether a zip contains a TorchScript program."""
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read(file: Path) -> dict[str, Tensor]:
    """Tensors by the path of their module, such as ``visual.conv1.weight``."""
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(names) != 1:
            raise UnknownCheckpoint(f"{file} is a TorchScript archive with {len(names)} parts data.pkl; expected one")
        (name,) = names
        tree = _Unpickler(archive, name.removesuffix("data.pkl"), file).load()
    return dict(_tensors(tree, ""))


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))


class _Module(dict[str, Any]):
    """Any object of the program, reduced to its attributes."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str, file: Path) -> None:
        super().__init__(archive.open(f"{root}data.pkl"))
        self.archive, self.root, self.file = archive, root, file
        with file.open("rb") as stream:
            self.mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        match module, name:
            case "torch._utils", "_rebuild_tensor_v2":
                return _tensor
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch", storage if storage in _STORAGES:
                return storage
            case "torch.jit._pickle", _:
                return lambda values, *_: values  # build_intlist, restore_type_tag and similar functions
        raise UnknownCheckpoint(f"{self.file} is a TorchScript archive that asks for {module}.{name}, which is not run")

    def persistent_load(self, reference: Any) -> Tensor:
        _, kind, key, _, number = reference
        if kind not in _STORAGES:
            raise UnknownCheckpoint(f"{self.file}: data/{key} is of {kind}; expected one of {', '.join(_STORAGES)}")
        part, dtype = self.archive.getinfo(f"{self.root}data/{key}"), _STORAGES[kind]
        start = part.header_offset + _LOCAL
        start += sum(struct.unpack("<HH", self.mapped[start - 4 : start]))
        if (stored := part.file_size // dtype.itemsize) < number:
            raise UnknownCheckpoint(f"{self.file}: data/{key} holds {stored} numbers; expected {number}")
        if not stored:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.mapped, dtype=dtype, count=stored, offset=start)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)
