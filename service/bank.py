"""A collection as a bank: one npz file of vectors, which numpy reads and any program can write. `write` and `read`.

Arrays, of N items whose vectors have D numbers: ``ids`` unicode [N]; ``vectors`` float32 [N, D]; the scalars ``model``
(unicode), ``dim`` (D) and ``normalized`` (boolean). There may be ``meta`` (unicode [N], JSON objects), ``digest`` (the
embedding digest of the bundle that made the vectors; without it they are another program's), and ``created``.

An npz file is a zip archive of npy files. They are read side by side in batches, so a bank is never in memory as a
whole. Nothing is unpickled.
"""

import json
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array
from calmclip.service import metadata, strict_json
from calmclip.service.errors import InvalidRequest
from calmclip.service.exchange import MAX_ID, UNIT, File, Ids, whole
from calmclip.service.stores import BATCH_ROWS, Info, Row, Table

MAX_DIM = 16_000  # numbers of a vector: PostgreSQL's limit, so that every store answers alike
MAX_SCALAR = 4096  # bytes of an array without dimensions
MAX_META = 1 << 20  # characters of the longest text of ``meta``
MAX_NAME = 200  # characters of ``model``
SUFFIX = ".npy"
DATE = (1980, 1, 1, 0, 0, 0)  # of every array, so that equal collections make equal files
READ_BYTES = 8 << 20  # of one batch of rows, or one row
COPIED = 1 << 20  # bytes at a time
BROKEN = zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError


class Kind(NamedTuple):
    """What an array has to be. ``rank``: number of dimensions."""

    rank: int
    kinds: str  # of its dtype: U unicode, f float, i and u integers, b boolean
    words: str
    required: bool = True


ARRAYS = {
    "ids": Kind(1, "U", "unicode [N]"),
    "vectors": Kind(2, "f", "float32 [N, D]"),
    "model": Kind(0, "U", "a unicode scalar"),
    "dim": Kind(0, "iu", "an integer scalar"),
    "normalized": Kind(0, "b", "a boolean scalar"),
    "meta": Kind(1, "U", "unicode [N] of JSON objects", required=False),
    "digest": Kind(0, "U", "a unicode scalar", required=False),
    "created": Kind(0, "U", "a unicode scalar", required=False),
}


def write(table: Table, path: Path, *, replace: bool = False) -> int:
    """Write every row of one snapshot of ``table``, without originals; -> their number. The file appears whole or not
    at all.

    Raises `BadRequest` if the file exists without ``replace``. Memory: one batch of rows; the disk holds the vectors
    twice meanwhile.
    """
    with whole(path, replace=replace) as file:
        return pack(table, file, lambda: tempfile.TemporaryFile(dir=path.parent))


def pack(table: Table, file: BinaryIO, spool: Callable[[], IO[bytes]] = BytesIO, most: int | None = None) -> int:
    """`write` into an open ``file``. ``spool`` makes a file for the vectors, and one for ids and metadata, while their
    number and widths are unknown. Raises `BadRequest` for more than ``most`` bytes of them."""
    info = table.info
    rows, id_width, meta_width = 0, 1, 1
    _check_size(info, table.count() * 4 * info.dim, most)
    with spool() as vectors, spool() as lines:
        for batch in table.rows(originals=False):
            vectors.write(np.stack([row.vector for row in batch]).astype("<f4", copy=False).tobytes())
            for row in batch:
                meta = json.dumps(row.meta, ensure_ascii=False, separators=(",", ":"))
                id_width, meta_width = max(id_width, len(row.id)), max(meta_width, len(meta))
                lines.write(json.dumps([row.id, meta]).encode() + b"\n")
            rows += len(batch)
            _check_size(info, vectors.tell() + lines.tell(), most)
        with zipfile.ZipFile(file, "w") as archive:
            with _member(archive, "vectors", "<f4", (rows, info.dim), zipfile.ZIP_STORED) as member:
                vectors.seek(0)
                while chunk := vectors.read(COPIED):
                    member.write(chunk)
            for place, (name, width) in enumerate((("ids", id_width), ("meta", meta_width))):
                lines.seek(0)
                with _member(archive, name, f"<U{width}", (rows,), zipfile.ZIP_DEFLATED) as member:
                    for line in lines:
                        member.write(json.loads(line)[place].ljust(width, "\0").encode("utf-32-le", "surrogatepass"))
            scalars: dict[str, Any] = {"model": info.model, "dim": info.dim, "normalized": True}
            scalars |= {"created": info.created, **({} if info.foreign else {"digest": info.digest})}
            for name, value in scalars.items():
                array = np.asarray(value)
                with _member(archive, name, array.dtype.str, (), zipfile.ZIP_STORED) as member:
                    member.write(array.tobytes())
    return rows


def read(
    source: Path | BinaryIO, name: str, *, normalize: bool = True, meta_bytes: int, most: int | None = None
) -> File:
    """A bank as the collection ``name``. Vectors that are no unit vectors become such, or are an error without
    ``normalize``; a bank that says `normalized` must not have them. ``meta_bytes``: of the metadata of one item.

    Raises `BadRequest` for what is no bank, for more than ``most`` bytes when unpacked, and later, from its rows, for
    what is wrong with one of them: see `File`.
    """
    place = str(source) if isinstance(source, Path) else "the bank"
    bank = _opened(source, place, most)
    try:
        model, dim, digest = (bank.scalar(name) for name in ("model", "dim", "digest"))
        if not 1 <= len(model) <= MAX_NAME or "\0" in model:
            raise BadRequest(f"{place}: model is {model[:80]!r}; expected 1 to {MAX_NAME} characters without NUL")
        if digest and not (len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
            raise BadRequest(
                f"{place}: digest is {digest[:80]!r}; expected the 64 hexadecimal digits of a bundle's "
                "embedding_digest. Leave it out for another program's vectors"
            )
        count, wide = bank.headers["vectors"].shape
        if dim != wide:
            raise BadRequest(f"{place}: dim is {dim}, but the vectors have {wide} numbers; expected the same")
        if not 1 <= wide <= MAX_DIM:
            raise BadRequest(f"{place}: the vectors have {wide} numbers; expected 1 to {MAX_DIM}")
        for array in {"ids", "meta"} & bank.headers.keys():
            if (length := bank.headers[array].shape[0]) != count:
                raise BadRequest(f"{place}: there are {count} vectors and {length} {array}; expected equal numbers")
        _check_width(bank, "ids", MAX_ID)
        _check_width(bank, "meta", MAX_META)
        file = File(Info(name, model, digest or "", wide, _created(bank)), iter(()))
        file.rows = _rows(bank, file, normalize, bank.scalar("normalized"), meta_bytes)
    except BaseException:
        bank.archive.close()
        raise
    return file


def _check_size(info: Info, size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise BadRequest(
            f"the collection {info.name!r} has {size} bytes or more; at most {most} are sent at once. The operator can "
            "write it with 'calmclip collection export'"
        )


@dataclass(frozen=True)
class _Header:
    """Of an npy file: its array, and the number of bytes before it."""

    shape: tuple[int, ...]
    dtype: Any
    start: int


@dataclass
class _Bank:
    archive: zipfile.ZipFile
    place: str  # begins an error
    headers: dict[str, _Header]

    def scalar(self, name: str) -> Any:
        """Its Python value; None if it is absent."""
        if name not in self.headers:
            return None
        with self.values(name) as file:
            array = _block(file, self.headers[name], 1, self, name)
        return _texts(array, f"{self.place}: {name}")[0] if array.dtype.kind == "U" else array.tolist()[0]

    def values(self, name: str) -> IO[bytes]:
        """The npy file, at the first number of its array."""
        file = self.archive.open(name + SUFFIX)
        file.read(self.headers[name].start)
        return file


def _opened(source: Path | BinaryIO, place: str, most: int | None) -> _Bank:
    """Raises `BadRequest` for a file that is no archive of the arrays of a bank."""
    try:
        archive = zipfile.ZipFile(source)
    except BROKEN as error:
        raise BadRequest(f"{place} is no npz file: {error}") from None
    try:
        entries = {entry.filename.removesuffix(SUFFIX): entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise BadRequest(f"{place} has an array twice; expected each once")
        expected = f"expected {', '.join(ARRAYS)}"
        if unknown := sorted(entries.keys() - ARRAYS.keys()):
            raise BadRequest(f"{place} has the array {unknown[0][:80]!r}; {expected}, and nothing else")
        if absent := [name for name, kind in ARRAYS.items() if kind.required and name not in entries]:
            raise BadRequest(f"{place} has no array {absent[0]!r}; {expected}, of which the last three may be absent")
        size = sum(entry.file_size for entry in entries.values())
        if most is not None and size > most:
            raise BadRequest(
                f"{place} has {size} bytes when unpacked; at most {most} are read at once. The operator can read it "
                "with 'calmclip collection import'"
            )
        return _Bank(archive, place, {name: _header(archive, entry, name, place) for name, entry in entries.items()})
    except BaseException:
        archive.close()
        raise


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, place: str) -> _Header:
    """Raises `BadRequest` unless the npy file is whole and has the array that a bank has under this name."""
    wanted = ARRAYS[name]
    where = f"{place}: {name}"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadRequest(f"{where} is compressed by method {entry.compress_type}; expected numpy's, stored or deflated")
    try:
        with archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in readers:
                raise ValueError(f"its format is {version}")
            shape, fortran, dtype = readers[version](file)
            start = file.tell()
    except Exception as error:  # numpy's parser raises errors of many types for what is no header
        raise BadRequest(f"{where} is no npy file: {str(error)[:200]}") from None
    if dtype.hasobject:
        raise BadRequest(f"{where} holds pickled objects, which are never read; expected {wanted.words}")
    fits = dtype.kind in wanted.kinds and len(shape) == wanted.rank
    if not fits or (name == "vectors" and dtype != np.float32):
        raise BadRequest(f"{where} is {dtype} {list(shape)}; expected {wanted.words}")
    if fortran and len(shape) > 1:
        raise BadRequest(f"{where} lies in Fortran's order; expected C's, see numpy.ascontiguousarray")
    bytes_ = dtype.itemsize * int(np.prod([int(side) for side in shape], dtype=object)) if shape else dtype.itemsize
    if min(shape, default=0) < 0 or start + bytes_ != entry.file_size:
        raise BadRequest(f"{where} has {entry.file_size} bytes; expected {start + bytes_} for {dtype} {list(shape)}")
    if not shape and bytes_ > MAX_SCALAR:
        raise BadRequest(f"{where} has {bytes_} bytes; expected at most {MAX_SCALAR}")
    return _Header(shape, dtype, start)


def _created(bank: _Bank) -> str:
    """UTC, ISO 8601: now, if the bank does not say it."""
    created = bank.scalar("created")
    if created is None:
        return datetime.now(UTC).isoformat(timespec="seconds")
    try:
        datetime.fromisoformat(created)
    except ValueError:
        raise BadRequest(f"{bank.place}: created is {created[:80]!r}; expected a date and time of ISO 8601") from None
    return str(created)


def _check_width(bank: _Bank, name: str, most: int) -> None:
    """Raises `BadRequest` for texts that are too long: numpy stores all of an array as wide as the longest."""
    if name in bank.headers and (width := bank.headers[name].dtype.itemsize // 4) > most:
        raise BadRequest(f"{bank.place}: {name} has texts of up to {width} characters; expected at most {most}")


def _rows(bank: _Bank, file: File, normalize: bool, normalized: bool, meta_bytes: int) -> Iterator[list[Row]]:
    names = [name for name in ("ids", "vectors", "meta") if name in bank.headers]
    count, dim = bank.headers["vectors"].shape
    row_bytes = 4 * dim + sum(bank.headers[name].dtype.itemsize for name in names if name != "vectors")
    size = max(1, min(BATCH_ROWS, READ_BYTES // row_bytes))
    ids = Ids(bank.place)
    with bank.archive, ExitStack() as stack:
        members = {name: stack.enter_context(bank.values(name)) for name in names}
        for start in range(0, count, size):
            taken = min(size, count - start)
            blocks = {name: _block(members[name], bank.headers[name], taken, bank, name) for name in names}
            texts = _texts(blocks["ids"], f"{bank.place}: ids")
            for id_ in texts:
                ids.check(id_)
            vectors = _units(blocks["vectors"], texts, bank.place, normalize, normalized, file)
            metas = [{}] * taken if "meta" not in blocks else _metas(blocks["meta"], texts, bank.place, meta_bytes)
            yield [Row(id_, vector, meta) for id_, vector, meta in zip(texts, vectors, metas, strict=True)]


def _block(member: IO[bytes], header: _Header, rows: int, bank: _Bank, name: str) -> Array:
    """The next ``rows`` rows of an array. The last read of a member compares its checksum."""
    inner = header.shape[1:]
    wanted = rows * header.dtype.itemsize * int(np.prod(inner, dtype=np.int64))
    try:
        data = member.read(wanted)
    except BROKEN as error:
        raise BadRequest(f"{bank.place}: {name} is damaged: {error}") from None
    if len(data) != wanted:
        raise BadRequest(f"{bank.place}: {name} is damaged: it ends too early")
    return np.frombuffer(data, header.dtype).reshape(rows, *inner)


def _texts(array: Array, where: str) -> list[str]:
    """Raises `BadRequest` for what is no Unicode text."""
    try:
        texts: list[str] = array.tolist()
        "".join(texts).encode()
    except (SystemError, ValueError):  # beyond Unicode's last character; a lone surrogate
        raise BadRequest(f"{where}: one is no Unicode text") from None
    return texts


def _units(block: Array, ids: list[str], place: str, normalize: bool, normalized: bool, file: File) -> Array:
    """float32 [N, D] unit rows; what is one already stays as it is, bit for bit."""
    lengths = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
    if len(wrong := np.flatnonzero(~np.isfinite(lengths))):
        raise BadRequest(f"{place}: the vector of {ids[wrong[0]]!r} has NaN or infinity; expected finite numbers")
    if len(wrong := np.flatnonzero(lengths == 0)):
        raise BadRequest(f"{place}: the vector of {ids[wrong[0]]!r} is all zeros and has no direction; leave it out")
    others = np.flatnonzero(np.abs(lengths - 1) > UNIT)
    if not len(others):
        return block
    said = f"{place}: the vector of {ids[others[0]]!r} has the length {lengths[others[0]]:.4g}; expected a unit vector"
    if normalized:
        raise BadRequest(f"{said}, because the bank says that it is normalized")
    if not normalize:
        raise BadRequest(f"{said}; let the import normalize them, or write unit vectors")
    file.scaled += len(others)
    units = block.copy()
    units[others] = (block[others] / lengths[others, None]).astype(np.float32)
    return units


def _metas(array: Array, ids: list[str], place: str, meta_bytes: int) -> list[dict[str, Any]]:
    metas = []
    for id_, text in zip(ids, _texts(array, f"{place}: meta"), strict=True):
        try:
            meta = metadata.storable(dict(strict_json.parse(text.encode(), "it")))
        except (InvalidRequest, ValueError) as error:
            raise BadRequest(f"{place}: the meta of {id_!r}: {error}") from None
        metadata.check_size(meta, repr(id_), meta_bytes)
        metas.append(meta)
    return metas


def _member(archive: zipfile.ZipFile, name: str, descr: str, shape: tuple[int, ...], compression: int) -> IO[bytes]:
    """A new npy file in the archive, after its header."""
    entry = zipfile.ZipInfo(name + SUFFIX, DATE)
    entry.compress_type = compression
    member = archive.open(entry, "w", force_zip64=True)
    np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
    return member
