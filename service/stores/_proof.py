"""The files that a version of a LanceDB table needs, read from its manifest, and the proof that all of them are whole.

Source: the protocol buffers of Lance's table format (protos/table.proto, Apache-2.0), whose field numbers stand below.
A manifest says the size of data and index files. It says nothing of their content, so `Sums` keeps checksums beside the
table: of a small file whole, of a large one at both ends, where its footer is. A flipped bit inside a large data file
stays unseen.
"""

import json
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

LAST = 2**64 - 1  # a manifest's file is named LAST - version
END = 1 << 16  # bytes of a large file's end that a checksum covers
MAGIC = {".lance": b"LANC", ".idx": b"LANC", ".manifest": b"LANC", ".arrow": b"ARROW1"}  # the last bytes of a file
HINT = "_versions/latest_version_hint.json"  # Lance writes it after each commit
SUMS = "_calmclip.json"
# field numbers of messages
FRAGMENTS, INDEX_SECTION = 2, 6  # of Manifest
FRAGMENT_ID, FRAGMENT_FILES, FRAGMENT_DELETION, FRAGMENT_ROWS = 1, 2, 3, 4
FILE_PATH, FILE_SIZE = 1, 6  # of DataFile
DELETION_TYPE, DELETION_VERSION, DELETION_ID, DELETION_ROWS = 1, 2, 3, 4
INDEX_UUID, INDEX_NAME, INDEX_FILES = 1, 3, 10  # of IndexMetadata
INDEX_PATH, INDEX_SIZE = 1, 2  # of IndexFile


class Flaw(Exception):
    """What is wrong with which file."""


@dataclass(frozen=True)
class Part:
    path: str  # below the table's folder
    size: int | None  # in bytes, if the manifest says it
    index: str | None = None


@dataclass(frozen=True)
class Version:
    number: int
    parts: list[Part]
    rows: int


def current(folder: Path) -> Version:
    """The newest version of the table in ``folder``.

    Raises `Flaw` if its manifest cannot be read, or is missing: Lance would open an older version instead.
    """
    try:
        numbers = _numbers(folder)
    except OSError as error:
        raise Flaw(f"{error.strerror}: {folder.name}/_versions") from None
    if not numbers:
        raise Flaw("_versions has no manifest")
    known = max(_hint(folder), Sums(folder).version)
    if known > max(numbers):
        raise Flaw(f"{_manifest(known)} is missing; it belongs to the last write, version {known}")
    return _version(folder, max(numbers))


def cut_off(folder: Path) -> list[Path]:
    """Manifests without their last bytes. An older version's is of no use to a reader, but stops every clean-up."""
    return [path for number in _numbers(folder) if not _ends_well(path := folder / _manifest(number))]


class Sums:
    """Checksums of files of the newest version, by path, and the version's number, in the file `SUMS`.

    It is written after a commit. If the process is killed between the two, files without a checksum are accepted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.version = 0
        self.sums: dict[str, int] = {}
        with suppress(OSError, ValueError, KeyError, TypeError):  # without it, sizes and footers are checked
            content = json.loads((folder / SUMS).read_bytes())
            self.version, self.sums = int(content["version"]), dict(content["sums"])

    def record(self) -> None:
        """Of the files that are new. The caller has just committed the newest version."""
        version = current(self._folder)
        paths = [part.path for part in version.parts]
        self.sums = {path: self.sums.get(path) or checksum(self._folder / path) for path in paths}
        self.version = version.number
        temporary = self._folder / f"{SUMS}.new"
        temporary.write_text(json.dumps({"version": self.version, "sums": self.sums}))
        os.replace(temporary, self._folder / SUMS)


def flawed_indexes(folder: Path, version: Version) -> dict[str, str]:
    """Name of an index -> what is wrong with a file of it. Raises `Flaw` for any other file."""
    sums = Sums(folder).sums
    indexes = {}
    for part in version.parts:
        flaw = _flaw(folder / part.path, part.size, sums.get(part.path))
        if flaw and part.index is None:
            raise Flaw(f"{part.path} {flaw}")
        if flaw and part.index:
            indexes[part.index] = f"{part.path} {flaw}"
    return indexes


def _flaw(path: Path, size: int | None, sum_: int | None) -> str | None:
    try:
        if not path.is_file():
            return "is no file" if os.path.lexists(path) else "is missing"
        if size is not None and path.stat().st_size != size:
            return f"has {path.stat().st_size} bytes; expected {size}"
        if not _ends_well(path):
            return "does not end as such a file does"
        if sum_ is not None and sum_ != checksum(path):
            return "is not the file that was written"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def checksum(path: Path) -> int:
    """CRC-32 of the file, or of its two ends."""
    with path.open("rb") as file:
        start = file.read(END)
        file.seek(max(len(start), path.stat().st_size - END))
        return zlib.crc32(file.read(), zlib.crc32(start))


def _numbers(folder: Path) -> list[int]:
    stems = (name.removesuffix(".manifest") for name in os.listdir(folder / "_versions") if name.endswith(".manifest"))
    return [LAST - int(stem) for stem in stems if stem.isdecimal()]


def _version(folder: Path, number: int) -> Version:
    path = _manifest(number)
    try:
        return Version(number, *_read((folder / path).read_bytes(), path))
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise Flaw(f"{path} cannot be read: {error}") from None


def _read(data: bytes, path: str) -> tuple[list[Part], int]:
    """The parts, the manifest included, and the number of rows."""
    if data[-4:] != b"LANC":
        raise ValueError("its last bytes are missing")
    manifest = _message(data, int.from_bytes(data[-16:-8], "little"))
    parts, rows = [Part(path, None)], 0
    for fragment in map(_fields, manifest.get(FRAGMENTS, [])):
        number = _number(fragment, FRAGMENT_ID)
        rows += _number(fragment, FRAGMENT_ROWS)
        for file in map(_fields, fragment[FRAGMENT_FILES]):
            parts.append(Part(f"data/{_text(file, FILE_PATH)}", _number(file, FILE_SIZE) or None))
        for deletion in map(_fields, fragment.get(FRAGMENT_DELETION, [])):
            rows -= _number(deletion, DELETION_ROWS)
            suffix = ("arrow", "bin")[_number(deletion, DELETION_TYPE)]
            name = f"{number}-{_number(deletion, DELETION_VERSION)}-{_number(deletion, DELETION_ID)}.{suffix}"
            parts.append(Part(f"_deletions/{name}", None))
    if INDEX_SECTION in manifest:
        for index in map(_fields, _message(data, _number(manifest, INDEX_SECTION)).get(1, [])):
            folder = UUID(bytes=_fields(index[INDEX_UUID][0])[1][0])
            for file in map(_fields, index.get(INDEX_FILES, [])):
                file_path = f"_indices/{folder}/{_text(file, INDEX_PATH)}"
                parts.append(Part(file_path, _number(file, INDEX_SIZE), _text(index, INDEX_NAME)))
    return parts, rows


def _message(data: bytes, start: int) -> dict[int, list[Any]]:
    length = int.from_bytes(data[start : start + 4], "little")
    return _fields(data[start + 4 : start + 4 + length])


def _fields(message: bytes) -> dict[int, list[Any]]:
    """Field number -> values: integers, or bytes of a string or an inner message."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(message, at)
        else:
            length, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + length], at + length
            if len(value) != length:
                raise ValueError("it ends too early")
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _number(fields: dict[int, list[Any]], field: int) -> int:
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {field} is no number")
    return value


def _text(fields: dict[int, list[Any]], field: int) -> str:
    return bytes(fields[field][-1]).decode()


def _hint(folder: Path) -> int:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / HINT).read_bytes())["version"])
    return 0


def _manifest(version: int) -> str:
    return f"_versions/{LAST - version:020}.manifest"


def _ends_well(path: Path) -> bool:
    magic = MAGIC.get(path.suffix, b"")
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(magic)))
        return file.read() == magic if magic else True
