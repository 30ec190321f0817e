"""Samples: the answers of one bundle on one data set, as a value and as a file.

The file is a zip of header.json and one .npy per array, without pickles; `numpy.load` reads it too.
"""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from calmclip.models.bundle.manifest import FrozenModel, explain
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays

_KIND, _FORMAT, _HEADER = "calmclip samples", 1, "header.json"


class Origin(FrozenModel):
    """``digest``: the bundle's; ``data``: the data set's `fingerprint`; ``params``: the eval's."""

    eval: str
    bundle: str
    digest: str
    data: str
    params: dict[str, Any]


class Header(FrozenModel):
    """``arrays``: name -> dtype and shape."""

    kind: str
    format: int
    origin: Origin
    counts: dict[str, int] = Field(min_length=1)
    words: dict[str, tuple[str, ...]]
    arrays: dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Samples:
    """``arrays``: numbers by name, of any shape. ``words``: texts by name, such as the labels.
    ``counts``: the sizes of the data set by unit; the bootstrap resamples the first unit.
    ``origin``: set by `measure.predict`."""

    counts: Mapping[str, int]
    arrays: Arrays
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    origin: Origin | None = None

    @property
    def count(self) -> int:
        return next(iter(self.counts.values()))

    @property
    def made(self) -> Origin:
        """The origin. Raises ValueError for samples that `measure.predict` did not make."""
        if self.origin is None:
            raise ValueError("these samples have no origin; use calmclip.models.evals.measure.predict")
        return self.origin

    def save(self, path: Path) -> None:
        """Write the file atomically. Raises OSError."""
        named = {name: (str(array.dtype), array.shape) for name, array in self.arrays.items()}
        header = Header(
            kind=_KIND, format=_FORMAT, origin=self.made, counts=dict(self.counts), arrays=named,
            words={name: tuple(texts) for name, texts in self.words.items()},
        )  # fmt: skip
        write(path, lambda file: self._write(file, header))

    def _write(self, file: BinaryIO, header: Header) -> None:
        with zipfile.ZipFile(file, "w") as archive:  # all entries have the date 1980, so equal samples give equal files
            archive.writestr(zipfile.ZipInfo(_HEADER), header.model_dump_json(indent=1))
            for name, array in self.arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asarray(array, order="C"), allow_pickle=False)  # keeps []

    @staticmethod
    def load(path: Path, eval: str | None = None) -> "Samples":
        """Raises `BadRequest` for a file without samples, a damaged file, or samples of another eval than ``eval``."""
        try:
            with zipfile.ZipFile(path) as archive:
                content = json.loads(archive.read(_HEADER))
                header = Header.model_validate(content)
                if (header.kind, header.format) != (_KIND, _FORMAT):
                    raise ValueError(f"it is {header.kind!r} of format {header.format}, not {_KIND!r} of {_FORMAT}")
                arrays = {name: _array(archive, name) for name in header.arrays}
            for name, array in arrays.items():
                if (str(array.dtype), array.shape) != header.arrays[name]:
                    raise ValueError(
                        f"{name} is {array.dtype}{list(array.shape)}; the header says {header.arrays[name]}"
                    )
        except ValidationError as error:
            raise BadRequest(f"{path} holds no samples: its header: {explain(error)}") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise BadRequest(
                f"{path} holds no samples that can be read ({error}); expected a file of 'calmclip eval --save'"
            ) from None
        if eval not in (None, header.origin.eval):
            raise BadRequest(f"{path} holds samples of {header.origin.eval!r}; expected samples of {eval!r}")
        return Samples(header.counts, arrays, header.words, header.origin)


def _array(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(f"{name}.npy") as entry:
        return np.lib.format.read_array(entry, allow_pickle=False)


def write(path: Path, content: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            content(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def fingerprint(value: object) -> str:
    """SHA-256 of a data set's texts, numbers, arrays and pictures. A file counts by its name and bytes, so the same
    pictures in another folder have the same fingerprint. A text in the field ``pictures`` is a path. Raises
    `BadRequest` naming a file that cannot be read."""
    digest = hashlib.sha256()
    _feed(digest.update, value)
    return digest.hexdigest()


def _feed(update: Callable[[bytes], object], value: object) -> None:
    """Each value has its kind and length in front, so different data sets feed different bytes."""

    def keep(kind: str, content: bytes) -> None:
        update(f"{kind} {len(content)}\n".encode())
        update(content)

    match value:
        case None | bool() | int() | float() | str() | np.generic():
            keep(type(value).__name__, str(value).encode("utf-8", "surrogatepass"))
        case bytes():
            keep("bytes", value)
        case Path():
            keep("name", value.name.encode("utf-8", "surrogateescape"))
            try:
                keep("file", value.read_bytes())
            except OSError as error:
                raise BadRequest(f"{value} cannot be read: {error.strerror}") from None
        case np.ndarray():
            keep(f"array {value.dtype.str} {value.shape}", value.tobytes())
        case Image.Image():
            keep(f"picture {value.mode} {value.size}", value.tobytes())
        case BaseModel():
            keep("model", value.model_dump_json().encode())
        case Mapping():
            keep("mapping", str(len(value)).encode())
            for pair in value.items():
                _feed(update, pair)
        case Sequence():
            keep("sequence", str(len(value)).encode())
            for item in value:
                _feed(update, item)
        case _ if is_dataclass(value):
            keep("data", type(value).__name__.encode())
            for item in fields(value):
                content = getattr(value, item.name)
                if item.name == "pictures":
                    content = [Path(each) if isinstance(each, str) else each for each in content]
                _feed(update, content)
        case _:
            raise TypeError(f"a data set has a {type(value).__name__}; expected texts, numbers, arrays, pictures")
