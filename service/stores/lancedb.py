"""Collections in embedded LanceDB: in a folder, or at the URI of an object store.

Source: LanceDB (Apache-2.0). Every write is a new, atomically committed version of the table, so a killed process
leaves the last committed version. A search in a small table reads all rows. In a large table an index selects
candidates, and the float32 vectors decide.

LanceDB and pyarrow take 85 MB of memory. They are imported when the first table is opened or created, so a service
without collections has none of it.
"""

import errno
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from calmclip.models.errors import CollectionDamaged, CollectionNotFound, StoreFull
from calmclip.models.extras import missing
from calmclip.models.flow import Array
from calmclip.service.metadata import MAX_DEPTH
from calmclip.service.stores import (
    BATCH_BYTES,
    BATCH_ROWS,
    STORES,
    Condition,
    Info,
    Match,
    Part,
    Row,
    Table,
    Where,
    refuse_writes,
)
from calmclip.service.stores._folder import PIN, SUFFIX, Folder
from calmclip.service.stores._proof import Flaw, Sums, Version, current, cut_off, flawed_indexes

if TYPE_CHECKING:
    import pyarrow as pa

KEY = b"calmclip"  # in the schema's metadata: the `Info` as JSON
OPERATORS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
BESIDE_EMPTY = {"gt": '"_%"', "gte": '"%', "lt": '"', "lte": '""'}  # LIKE patterns of strings that compare so to ""
STRING = r'"(?:[^"\\]|\\.)*"'
CHARACTERS = r'"(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*'  # from the start of a JSON string, whole characters
INSIDE = ""  # what is inside a list or an object, as a regular expression; deeper metadata is never stored
for _ in range(MAX_DEPTH):
    INSIDE = rf'(?:[^"\[\]{{}}]|{STRING}|[\[{{]{INSIDE}[\]}}])*'
CACHE_BYTES = 32 << 20  # of indexes; LanceDB's default is gigabytes
METADATA_BYTES = 4 << 20  # of files and versions; every commit adds some until the cache is full
STABLE = {"new_table_enable_stable_row_ids": "true"}  # a row's number outlives updates and compaction
PLAIN = ["id", "vector", "meta"]  # columns of a row without its original
SCAN_ROWS = 8192  # per batch
INDEXED_FROM = 10_000  # rows
# RaBitQ, arXiv:2405.12497: one bit per component. All partitions are read. One large partition would do, but LanceDB
# 0.40 splits it and loses most of its rows, so there are several, and the index is rebuilt before they grow large.
VECTOR_INDEX = "near"  # its name is this, followed by the number of rows that it was built for
PARTITION = 4096
REBUILD_GROWTH = 2  # the index is rebuilt when the table has so many times these rows
ALL_PARTITIONS = 1 << 20
CANDIDATES_PER_HIT = 50  # from the index; float32 decides among them
VERSION_AGE = timedelta(minutes=2)  # since a version was the latest; compaction then removes it
CLOCK_MARGIN = timedelta(seconds=10)  # between our look at the versions and LanceDB's
NEVER = timedelta(days=36_500)
FULL_S = 30.0  # until a new try may find room
TRIES = 10  # of a compaction beside readers that end

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

log = logging.getLogger("calmclip")


class LanceStore:
    """``location``: a folder, or the URI of an object store, such as s3://bucket/folder.

    A folder is locked while it is open for writing. An object store has no locks: let one process alone write to it.
    Raises `StoreLocked`.
    """

    shared = False

    def __init__(self, location: str, read_only: bool = False) -> None:
        if find_spec("lancedb") is None:
            raise missing("the store lancedb", "lancedb", "service")
        path = location.removeprefix("file://")
        self._folder = None if "://" in path else Folder(Path(path), read_only)
        self.place = str(self._folder.path) if self._folder else "the object store"
        self._location = location
        self._read_only = read_only
        self._replacing: set[str] = set()
        if self._folder is None:
            _ = self._db  # raises for an object store that does not answer

    def names(self) -> list[str]:
        if self._folder:
            return self._folder.names()
        names: list[str] = []
        token = None
        while True:
            page = self._db.list_tables(page_token=token)
            names += page.tables
            token = page.page_token
            if not token:
                return sorted(names)

    def create(self, info: Info) -> Table:
        refuse_writes(self._read_only)
        return self._created(info, [])

    def replace(self, info: Info, rows: Iterable[Sequence[Row]]) -> Table:
        refuse_writes(self._read_only)
        self._replacing.add(info.name)
        try:
            try:
                self._db.open_table(info.name)
            except (ValueError, RuntimeError):  # there is no table, or what is there is none
                table = self._created(info, rows)
            else:
                table = self._filled(self._db, info, rows, mode="overwrite")  # a new version, committed at once
        finally:
            self._replacing.discard(info.name)
        try:
            table.compact()  # builds the indexes
        except Exception:  # the rows are there; the next compaction tries again
            log.exception("compaction of collection %s failed", info.name)
        return table

    def open(self, name: str) -> Table:
        if self._folder and not os.path.lexists(self._folder.table(name)):
            raise CollectionNotFound(f"there is no collection {name!r} in {self._folder.path}")
        try:
            table = LanceTable(self, self._db.open_table(name))
        except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise _damaged(name, self._why(name) or f"it is no table of calmclip: {_first(error)}") from error
        if table.info.name != name:
            raise _damaged(name, f"it holds the collection {table.info.name!r}; rename it to {table.info.name}{SUFFIX}")
        return table

    def drop(self, name: str) -> None:
        refuse_writes(self._read_only)
        if self._folder:
            self._folder.drop(name)
        else:
            self._db.drop_table(name)

    def close(self) -> None:
        if self._folder:
            self._folder.close()

    def _why(self, name: str) -> str | None:
        """What `current` says of a table that does not open."""
        if self._folder:
            try:
                current(self._folder.table(name))
            except Flaw as flaw:
                return str(flaw)
        return None

    def _created(self, info: Info, rows: Iterable[Sequence[Row]]) -> "LanceTable":
        """A new table, which appears with all its rows."""
        if self._folder is None:
            return self._filled(self._db, info, rows)
        with self._folder.built(info.name) as hidden:
            self._filled(self._connect(str(hidden)), info, rows)
        return LanceTable(self, self._db.open_table(info.name))

    def _filled(self, db: Any, info: Info, rows: Iterable[Sequence[Row]], mode: str = "create") -> "LanceTable":
        import pyarrow as pa

        schema = _schema(info)
        errors: list[Exception] = []

        def batches() -> Iterator["pa.RecordBatch"]:
            try:
                for some in rows:
                    yield from _data(some, info, schema).to_batches()
            except Exception as error:  # LanceDB would raise a RuntimeError with a traceback in its message
                errors.append(error)
                raise

        reader = pa.RecordBatchReader.from_batches(schema, batches())
        try:
            with _writing(self.place):
                table = db.create_table(info.name, data=reader, mode=mode, storage_options=STABLE)
        except Exception:
            if errors:
                raise errors[0] from None
            raise
        return LanceTable(self, table)

    @cached_property
    def _db(self) -> Any:
        return self._connect(self._location)

    @cached_property
    def _session(self) -> Any:
        import lancedb

        return lancedb.Session(index_cache_size_bytes=CACHE_BYTES, metadata_cache_size_bytes=METADATA_BYTES)

    def _connect(self, location: str) -> Any:
        import lancedb

        fresh = timedelta(0) if self._read_only else None  # the latest version for each read: another process writes
        return lancedb.connect(location, session=self._session, read_consistency_interval=fresh)


class LanceTable:
    def __init__(self, store: LanceStore, table: Any) -> None:
        self._store = store
        self._table = table
        self.info = Info(**json.loads(table.schema.metadata[KEY]))
        self._folder = store._folder.table(self.info.name) if store._folder else None

    def upsert(self, rows: Sequence[Row]) -> None:
        with self._writing():
            data = _data(rows, self.info, _schema(self.info))
            self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(data)

    def delete(self, ids: Sequence[str]) -> int:
        where = _id_in(ids)
        with self._writing():
            count: int = self._table.count_rows(where)
            if count:
                self._table.delete(where)
        return count

    def search(self, vector: Array, top_k: int, where: Where = ()) -> list[Match]:
        query = self._table.search(vector).distance_type("cosine").select(["id", "meta", "_distance"]).limit(top_k)
        query = query.nprobes(ALL_PARTITIONS).refine_factor(CANDIDATES_PER_HIT)  # without effect if there is no index
        if where:
            query = query.where(_all(where), prefilter=True)
        return [
            Match(row["id"], json.loads(row["meta"]), 1.0 - row["_distance"]) for row in query.to_arrow().to_pylist()
        ]

    def page(self, after: str | None, limit: int, vectors: bool = False) -> list[Match]:
        from lancedb.query import ColumnOrdering

        query = self._table.search().select(["id", "meta", *(["vector"] if vectors else [])]).limit(limit)
        query = query.order_by([ColumnOrdering(column_name="id", ascending=True, nulls_first=False)])
        if after is not None:
            query = query.where(f"id > {literal(after)}")
        rows = query.to_arrow()
        column = _vectors(rows["vector"].combine_chunks()) if vectors and len(rows) else [None] * len(rows)
        columns = (rows["id"].to_pylist(), rows["meta"].to_pylist(), column)
        return [Match(id_, json.loads(meta), vector=vector) for id_, meta, vector in zip(*columns, strict=True)]

    def get(self, ids: Sequence[str], originals: bool = False) -> list[Row]:
        query = self._table.search().where(_id_in(ids)).limit(len(ids))
        batches = (query if originals else query.select(PLAIN)).to_batches()
        return [row for batch in batches for row in _rows(batch, originals)]

    def count(self) -> int:
        rows: int = self._table.count_rows()
        return rows

    def row_numbers(self, ids: Sequence[str]) -> dict[str, int]:
        rows = self._table.search().where(_id_in(ids)).with_row_id(True).select(["id"]).limit(len(ids)).to_arrow()
        return dict(zip(rows["id"].to_pylist(), rows["_rowid"].to_pylist(), strict=True))

    def fetch(self, row_numbers: Sequence[int]) -> list[Row]:
        rows = self._table.take_row_ids(list(row_numbers)).select(["id", "vector", "meta"]).to_arrow()
        columns = (rows["id"].to_pylist(), _vectors(rows["vector"].combine_chunks()), rows["meta"].to_pylist())
        return [Row(id_, vector, json.loads(meta)) for id_, vector, meta in zip(*columns, strict=True)]

    def scan(self, limit: int | None = None) -> Iterator[tuple[list[str], list[int], Array]]:
        query = self._table.search().with_row_id(True).select(["id", "vector"]).limit(limit)
        for batch in query.to_batches(batch_size=SCAN_ROWS):
            yield batch["id"].to_pylist(), batch["_rowid"].to_pylist(), _vectors(batch["vector"])

    def rows(self, originals: bool = True) -> Iterator[list[Row]]:
        """A tag holds the version; without permission to write it, clean-up may remove the version after
        `VERSION_AGE`."""
        with self._snapshot() as table:
            stats = table.stats()
            size = int(BATCH_BYTES // max(1, stats["total_bytes"] / max(1, stats["num_rows"])))
            query = table.search() if originals else table.search().select(PLAIN)
            for batch in query.to_batches(batch_size=max(1, min(BATCH_ROWS, size)) if originals else BATCH_ROWS):
                yield _rows(batch, originals)

    def verify(self) -> None:
        """Every file of the latest version is there, has its size, its footer and its checksum, and all ids can be
        read. A damaged index is built again from the rows. For an object store: all ids can be read.

        Not seen: flipped bits inside the vectors of a large file.
        """
        version = self._proved() if self._folder else None
        table = self._store._db.open_table(self.info.name)
        table.checkout(version.number if version else table.version)
        try:
            rows = sum(len(batch) for batch in table.search().select(["id"]).to_batches(batch_size=SCAN_ROWS))
        except (ValueError, RuntimeError, OSError) as error:
            raise _damaged(self.info.name, _first(error)) from error
        if rows != (version.rows if version else table.count_rows()):
            raise _damaged(self.info.name, f"{rows} rows can be read; expected {table.count_rows()}")

    def compact(self) -> None:
        """Also build the indexes of a large table. A search reads rows that are newer than the index as well."""
        with self._writing():
            self._compact()

    def _proved(self) -> Version:
        assert self._folder
        try:
            version = current(self._folder)
            indexes = flawed_indexes(self._folder, version)
        except Flaw as flaw:
            raise _damaged(self.info.name, str(flaw)) from None
        if self._store._read_only:
            for reason in indexes.values():
                raise _damaged(self.info.name, f"{reason}; a service that opens it for writing builds the index again")
            return version
        self._mend(indexes)
        return current(self._folder)

    def _mend(self, indexes: dict[str, str]) -> None:
        """What no row is lost by: build damaged indexes again; delete manifests of older versions that are cut off,
        which would stop every clean-up."""
        assert self._folder
        for path in cut_off(self._folder):
            log.warning("collection %s: %s is cut off; it is of an older version and is deleted", self.info.name, path)
            path.unlink()
        for index, reason in indexes.items():
            log.warning("collection %s: %s; its index is built again", self.info.name, reason)
            self._table.drop_index(index)
        if indexes:
            self.compact()

    def _compact(self) -> None:
        from lancedb.index import BTree, IvfRq

        # files of no version are left by writes that failed or were killed, for this process alone writes
        alone = self._store._folder is not None and self.info.name not in self._store._replacing
        _beside_readers(lambda: self._table.optimize(cleanup_older_than=NEVER))
        # apart, for LanceDB counts the age from the end of the compaction, which may take minutes
        _beside_readers(lambda: self._table.optimize(cleanup_older_than=self._removable(), delete_unverified=alone))
        rows = self.count()
        if rows < INDEXED_FROM or self.info.dim % 8:
            return
        indexes = {index.name for index in self._table.list_indices()}
        if "id" not in indexes:
            self._table.create_index("id", config=BTree(), name="id")
        sizes = (int(name.removeprefix(VECTOR_INDEX)) for name in indexes if name.startswith(VECTOR_INDEX))
        built_for = max(sizes, default=0)
        if rows >= REBUILD_GROWTH * built_for:
            config = IvfRq(distance_type="cosine", num_partitions=-(-rows // PARTITION))
            self._table.create_index("vector", config=config, name=f"{VECTOR_INDEX}{rows}")
            if built_for:
                self._table.drop_index(f"{VECTOR_INDEX}{built_for}")

    def _removable(self) -> timedelta:
        """The age from which versions may be removed. A reader may still use the version that was the latest
        `VERSION_AGE` ago, and pinned versions are in use."""
        pinned = self._pins()
        versions = sorted(self._table.list_versions(), key=lambda version: int(version["version"]))
        kept = now = datetime.now()
        for version in versions:
            if version["timestamp"] <= now - VERSION_AGE or version["version"] in pinned:
                kept = version["timestamp"]
            if version["version"] in pinned:
                break
        return now - kept + CLOCK_MARGIN

    def _pins(self) -> set[int]:
        """Versions that a process reads. Tags of ended processes are removed."""
        versions = set()
        for tag, entry in self._table.tags.list().items():
            if not tag.startswith(PIN):
                continue
            if self._store._folder and self._store._folder.abandoned(tag):
                self._table.tags.delete(tag)
            else:
                versions.add(entry["version"])
        return versions

    @contextmanager
    def _snapshot(self) -> Iterator[Any]:
        """A handle of the latest version, which stays until the end of the block."""
        folder = self._store._folder
        table = self._store._db.open_table(self.info.name)
        if folder and not os.access(folder.path, os.W_OK):
            table.checkout(table.version)
            yield table
            return
        with folder.pinned() if folder else nullcontext(f"{PIN}{uuid4().hex}") as pin:
            table.tags.create(pin, table.version)
            try:
                table.checkout(pin)
                yield table
            finally:
                table.tags.delete(pin)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        refuse_writes(self._store._read_only)
        with _writing(self._store.place):
            yield
        self._record()

    def _record(self) -> None:
        """The checksums of new files. The commit is on disk, so it counts without them."""
        if self._folder:
            with suppress(OSError):
                Sums(self._folder).record()


def sql(part: Part) -> str:
    """The part of a filter in LanceDB's SQL. All values from the caller are inside quoted literals. Where the metadata
    has no value of the right type, the SQL is false or NULL; nothing negates it.
    """
    if isinstance(part, Condition):
        path = f"$.{json.dumps(part.field, ensure_ascii=False)}"
        return CONDITIONS.get(part.op, _ordered)(f"json_extract(meta, {literal(path)})", path, part)
    return f"({f' {part.op.upper()} '.join(f'({_all(each)})' for each in part.filters)})"


def _all(parts: Where) -> str:
    return " AND ".join(map(sql, parts))


def _in(text: str, path: str, condition: Condition) -> str:
    """Equality compares JSON texts, so it respects types: "3" (a string) is not 3. Numbers are cast. ``IN`` looks a
    row's value up once; a chain of OR reads the metadata again for each value."""
    numbers, texts = _split(condition.value)
    return _any([f"{_number(text)} IN ({numbers})" if numbers else "", f"{text} IN ({texts})" if texts else ""])


def _not_in(text: str, path: str, condition: Condition) -> str:
    """A value of the type of one of the values that equals none. That there is one must be said: LanceDB's DataFusion
    makes `x NOT IN (1) OR x NOT IN (2)` true, also where x is NULL."""
    numbers, _ = _split(condition.value)
    strings = ", ".join(_text(value) for value in condition.value if isinstance(value, str))
    flags = {value for value in condition.value if isinstance(value, bool)}
    others = ", ".join(_text(value) for value in {True, False} - flags) if flags else ""
    return _any(
        [
            f"({_number(text)} IS NOT NULL AND {_number(text)} NOT IN ({numbers}))" if numbers else "",
            f"({text} LIKE '\"%' AND {text} NOT IN ({strings}))" if strings else "",
            f"{text} IN ({others})" if others else "",
        ]
    )


def _ordered(text: str, path: str, condition: Condition) -> str:
    """The order of strings uses a JSON path, because quotes and escapes change the order of JSON texts."""
    operator, value = OPERATORS[condition.op], condition.value
    if value == "":  # a JSON path cannot express it
        return f"{text} LIKE {literal(BESIDE_EMPTY[condition.op])}"
    if isinstance(value, str):
        bound = f"{path}?(@ {operator} {json.dumps(value, ensure_ascii=False)})"
        return f"({text} LIKE '\"%' AND json_exists(meta, {literal(bound)}))"  # a path also searches lists
    return f"{_number(text)} {operator} {float(value)!r}"


def _contains(text: str, path: str, condition: Condition) -> str:
    """The escaped part in the escaped string, where a character begins: `n` is not in the JSON text of a line end."""
    part = re.escape(json.dumps(condition.value, ensure_ascii=False)[1:-1])
    return f"regexp_like({text}, {literal(f'^{CHARACTERS}{part}')})"


def _has(text: str, path: str, condition: Condition) -> str:
    """The element's JSON text after `[` or a comma of the list itself. A path would search inner lists as well."""
    value = condition.value
    written = _numerals(value) if _is_number(value) else [json.dumps(value, ensure_ascii=False)]
    element = "|".join(map(re.escape, written))
    pattern = rf"^\[(?:{INSIDE},)?(?:{element})[,\]]"
    return f"regexp_like({text}, {literal(pattern)})"


def _is_there(text: str, path: str, condition: Condition) -> str:
    return f"({text} IS NOT NULL AND {text} != 'null')" if condition.value else f"({text} IS NULL OR {text} = 'null')"


CONDITIONS = {"in": _in, "not_in": _not_in, "contains": _contains, "has": _has, "exists": _is_there}


def _split(values: Sequence[Any]) -> tuple[str, str]:
    """The literals of numbers, and of all others as JSON texts."""
    numbers = [repr(float(value)) for value in values if _is_number(value)]
    return ", ".join(numbers), ", ".join(_text(value) for value in values if not _is_number(value))


def _any(terms: Iterable[str]) -> str:
    return f"({' OR '.join(filter(None, terms)) or 'false'})"


def _text(value: Any) -> str:
    return literal(json.dumps(value, ensure_ascii=False))


def _numerals(value: float) -> list[str]:
    """How LanceDB may write a number that equals ``value``: as an integer, or as a float with or without exponent."""
    exact = Decimal(repr(value))
    written = {f"{exact:f}", repr(value), re.sub(r"e([+-])0+", r"e\1", repr(value))}
    if value == int(value):
        written |= {f"{int(value)}", f"{int(value)}.0"}
    return sorted(written | ({"-0.0"} if not value else set()))


def _schema(info: Info) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), info.dim), nullable=False),
            pa.field("meta", pa.json_(), nullable=False),
            pa.field("text", pa.string()),
            pa.field("picture", pa.binary()),
        ],
        metadata={KEY: json.dumps(asdict(info)).encode()},
    )


def _data(rows: Sequence[Row], info: Info, schema: "pa.Schema") -> "pa.Table":
    import pyarrow as pa

    originals = [row.original if info.originals else None for row in rows]
    metas = pa.array([json.dumps(row.meta, ensure_ascii=False, allow_nan=False) for row in rows], pa.string())
    columns = [
        pa.array([row.id for row in rows], pa.string()),
        pa.array([row.vector for row in rows], pa.list_(pa.float32(), info.dim)),
        pa.ExtensionArray.from_storage(pa.json_(), metas),
        pa.array([original if isinstance(original, str) else None for original in originals], pa.string()),
        pa.array([original if isinstance(original, bytes) else None for original in originals], pa.binary()),
    ]
    return pa.table(columns, schema=schema)


@contextmanager
def _writing(place: str) -> Iterator[None]:
    """Raises `StoreFull` instead of LanceDB's error. What was committed before stays whole."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        for code in NO_ROOM:  # LanceDB's errors have no number
            if f"(os error {code})" in str(error) or getattr(error, "errno", None) == code:
                reason = f"{os.strerror(code)}: the collections in {place} have no room; make some and try again"
                raise StoreFull(reason, retry_after=FULL_S) from error
        raise


def _beside_readers(work: Callable[[], object]) -> None:
    """LanceDB lists all tags and then reads each, and fails if a reader ends in between and removes its tag. Raises the
    last error if this happens with every try."""
    for remaining in reversed(range(TRIES)):
        try:
            work()
            return
        except RuntimeError as error:
            if PIN not in str(error) or not remaining:
                raise


def _damaged(name: str, reason: str) -> CollectionDamaged:
    return CollectionDamaged(f"{name}{SUFFIX} is damaged: {reason}")


def _first(error: Exception) -> str:
    """The first line, without the place in LanceDB's source."""
    return re.sub(r", \S+\.rs:\d+.*", "", (str(error).strip().splitlines() or [type(error).__name__])[0])


def _rows(batch: "pa.RecordBatch", originals: bool) -> list[Row]:
    ids, metas = batch["id"].to_pylist(), batch["meta"].to_pylist()
    kept = [batch[name].to_pylist() if originals else [None] * len(ids) for name in ("text", "picture")]
    return [
        Row(id_, vector, json.loads(meta), picture if text is None else text)
        for id_, vector, meta, text, picture in zip(ids, _vectors(batch["vector"]), metas, *kept, strict=True)
    ]


def _id_in(ids: Sequence[str]) -> str:
    return f"id IN ({', '.join(map(literal, ids))})"


def _vectors(column: Any) -> Array:
    """A column of fixed-size lists -> float32 [N, dim]."""
    vectors: Array = column.flatten().to_numpy().reshape(len(column), -1)
    return vectors


def literal(text: str) -> str:
    """A string literal of standard SQL: only quotes are special, and are doubled."""
    return "'" + text.replace("'", "''") + "'"


def _number(text: str) -> str:
    return f"try_cast({text} AS double)"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


STORES.register("lancedb")(LanceStore)
