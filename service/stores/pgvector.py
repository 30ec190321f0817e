"""Collections in PostgreSQL with pgvector, by URL. Several services may share them.

Source: pgvector (PostgreSQL licence) >= 0.8, psycopg 3 (LGPL). Each collection is a table, and one more table lists
them. The vectors of a table have one length and one index, a search never reads another collection's rows, and to drop
a collection is to drop its table. Tables are numbered, so a caller's name never becomes an identifier.

Vectors are stored as float32. A search sorts all rows of a small table, or the rows that match a filter; an index of
the metadata finds those. Otherwise HNSW over a float16 copy selects `OVERSAMPLING` times as many candidates as hits,
and float32 decides among them.
"""

import json
import logging
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from calmclip.models.errors import (
    BadRequest,
    CalmclipError,
    CollectionDamaged,
    CollectionError,
    CollectionNotFound,
    Overloaded,
    StoreFull,
    StoreUnavailable,
)
from calmclip.models.extras import missing
from calmclip.models.flow import Array
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

try:
    import psycopg
    from psycopg import errors
    from psycopg_pool import ConnectionPool
except ModuleNotFoundError:
    raise missing("the store pgvector", "psycopg", "postgres") from None

OPERATORS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
EXACT_BELOW = 10_000  # rows; to sort fewer takes about as long as HNSW
OVERSAMPLING = 4
MAX_CANDIDATES = 1000  # the limit of hnsw.ef_search; a search that needs more sorts all rows
MIN_CANDIDATES = 200
MAX_INDEXED_DIM = 4000  # HNSW's limit for halfvec
CONNECT_S = 5  # timeout of a new connection,
WAIT_S = 2.0  # and of one from the pool, which has spare ones unless the server does not answer
LOCK_WAIT_MS = 500  # that readers may have to wait when a table is dropped
LOCK = 0x63616C6D  # "calm", an advisory lock: services that start together create one schema

SCHEMA = """
CREATE TABLE IF NOT EXISTS calmclip_collections (
    number bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    name text COLLATE "C" PRIMARY KEY,
    model text NOT NULL,
    digest text NOT NULL,
    dim integer NOT NULL,
    created text NOT NULL,
    originals boolean NOT NULL
)
"""
ENTRIES = "calmclip_collections"
COLUMNS = "model, digest, dim, created, originals"
TYPES = {"id": "text C NOT NULL", "meta": "jsonb NOT NULL", "text": "text", "picture": "bytea"}  # and the vector's
COLUMN_TYPES = """
SELECT attname, regexp_replace(format_type(atttypid, atttypmod), '^.*[.]', '')
    || CASE WHEN attcollation = '"C"'::regcollation THEN ' C' ELSE '' END
    || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped
"""
INDEXES = """
SELECT CASE WHEN indisprimary THEN 'PRIMARY KEY' ELSE relname END, indisvalid AND indisready
FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE indrelid = to_regclass(%s)
"""
DAMAGES = errors.DataCorrupted, errors.IndexCorrupted, errors.UndefinedFile, errors.IoError
CONNECTION: dict[str, Any] = {
    "connect_timeout": CONNECT_S,
    "application_name": "calmclip",
    "tcp_user_timeout": 10_000,  # ms: a vanished peer is an error, not an endless wait
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}

log = logging.getLogger("calmclip")


class PgStore:
    """``url``: postgresql://…, as libpq reads it. Raises `StoreUnavailable`, `BadRequest`, `CollectionError`."""

    shared = True

    def __init__(self, url: str, read_only: bool = False) -> None:
        self._server = _Server(url)
        self._read_only = read_only
        try:
            self._prepare()
        except BaseException:
            self._server.close()
            raise

    def names(self) -> list[str]:
        with self._server.connection() as connection:
            return [name for (name,) in connection.execute("SELECT name FROM calmclip_collections ORDER BY name")]

    def create(self, info: Info) -> Table:
        """If two services create it at the same time, one does, and both get it."""
        refuse_writes(self._read_only)
        with self._server.connection() as connection, connection.transaction():
            number = _entered(connection, info)
            if number is not None:
                for statement in (*_table(number, info.dim), *_indexes(number, info.dim).values()):
                    connection.execute(statement)
        return self.open(info.name) if number is None else PgTable(self._server, number, info)

    def replace(self, info: Info, rows: Iterable[Sequence[Row]]) -> Table:
        """One transaction, which locks the old table against writers from its beginning. A writer that waited for the
        lock finds the table gone, and its write fails. Searches wait for at most `LOCK_WAIT_MS` at the end."""
        refuse_writes(self._read_only)
        with self._server.connection() as connection, _data_errors(), connection.transaction():
            number, old = _entered(connection, info), None
            if number is None:
                (old,) = connection.execute(
                    "SELECT number FROM calmclip_collections WHERE name = %s FOR UPDATE", [info.name]
                ).fetchone()
                if _exists(connection, f"calmclip_c{old}"):
                    connection.execute(f"LOCK TABLE calmclip_c{old} IN SHARE ROW EXCLUSIVE MODE")
                (number,) = connection.execute(
                    f"UPDATE calmclip_collections SET (number, {COLUMNS}) = (DEFAULT, %s, %s, %s, %s, %s) "
                    "WHERE name = %s RETURNING number",
                    [*_values(info), info.name],
                ).fetchone()
            for statement in _table(number, info.dim):
                connection.execute(statement)
            with connection.cursor().copy(
                f"COPY calmclip_c{number} (id, vector, meta, text, picture) FROM STDIN (FORMAT BINARY)"
            ) as copy:
                copy.set_types(["text", "bytea", "bytea", "text", "bytea"])
                for some in rows:
                    for row in some:
                        copy.write_row(_binary(row, info))
            for statement in _indexes(number, info.dim).values():
                connection.execute(statement)
            connection.execute(f"ANALYZE calmclip_c{number}")
            if old is not None:
                _drop(connection, old)
        return PgTable(self._server, number, info)

    def open(self, name: str) -> Table:
        with self._server.connection() as connection:
            entry = connection.execute(
                f"SELECT number, {COLUMNS} FROM calmclip_collections WHERE name = %s", [name]
            ).fetchone()
        if entry is None:
            raise CollectionNotFound(f"there is no collection {name!r}")
        number, *info = entry
        return PgTable(self._server, number, Info(name, *info), self._read_only)

    def drop(self, name: str) -> None:
        refuse_writes(self._read_only)
        with self._server.connection() as connection, connection.transaction():
            deleted = connection.execute("DELETE FROM calmclip_collections WHERE name = %s RETURNING number", [name])
            for (number,) in deleted.fetchall():
                _drop(connection, number)

    def close(self) -> None:
        self._server.close()

    def _prepare(self) -> None:
        with self._server.connection() as connection, connection.transaction():
            if self._read_only:
                if not _exists(connection, ENTRIES):
                    raise CollectionNotFound(f"the database {self._server} has no collections")
                return
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
            self._extension(connection)
            if not _exists(connection, ENTRIES):
                connection.execute(SCHEMA)
            self._count_on(connection)

    def _count_on(self, connection: Any) -> None:
        """Half a restore may leave tables without an entry, or a counter that would give their numbers again."""
        tables = connection.execute(
            "SELECT substr(relname, 11)::bigint FROM pg_class WHERE relname ~ '^calmclip_c[0-9]+$' AND relkind = 'r' "
            "AND pg_table_is_visible(oid)"
        ).fetchall()
        entries = connection.execute("SELECT number FROM calmclip_collections").fetchall()
        for (number,) in sorted({*tables} - {*entries}):
            log.warning("%s: the table calmclip_c%s belongs to no collection; is it half a restore?", self, number)
        connection.execute(
            "SELECT setval(name, %s) FROM (SELECT pg_get_serial_sequence('calmclip_collections', 'number') AS name) "
            "AS counter WHERE coalesce(pg_sequence_last_value(name::regclass), 0) < %s",
            [last := max([number for (number,) in [*tables, *entries]], default=0), last],
        )

    def _extension(self, connection: Any) -> None:
        query = "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
        version = connection.execute(query).fetchone()
        if version is None:
            try:
                with connection.transaction():
                    connection.execute("CREATE EXTENSION vector")
            except errors.InsufficientPrivilege:
                raise CollectionError(
                    f"the database {self._server} has no extension vector, and its user may not create it; "
                    "let a superuser run CREATE EXTENSION vector"
                ) from None
            except psycopg.Error:
                raise CollectionError(
                    f"the server of {self._server} has no pgvector; install it (Debian: postgresql-17-pgvector)"
                ) from None
            version = connection.execute(query).fetchone()
        if [int(part) for part in version[0].split(".")[:2]] < [0, 8]:
            raise CollectionError(
                f"{self._server} has pgvector {version[0]}; expected 0.8 or newer: ALTER EXTENSION vector UPDATE"
            )


@dataclass
class PgTable:
    """Equal to another `PgTable` of the same table on the same server."""

    _server: "_Server" = field(repr=False)
    _number: int
    info: Info
    _read_only: bool = field(default=False, compare=False)
    _rows: int | None = field(default=None, compare=False)  # at the last count; decides how to search

    def upsert(self, rows: Sequence[Row]) -> None:
        refuse_writes(self._read_only)
        statement = (
            f"INSERT INTO {self._name} (id, vector, meta, text, picture) VALUES (%s, %s, %s, %s, %s) "
            "ON CONFLICT (id) DO UPDATE SET "
            "vector = excluded.vector, meta = excluded.meta, text = excluded.text, picture = excluded.picture"
        )
        ordered = sorted(rows, key=lambda row: row.id)  # all writers lock rows in one order, or they may deadlock
        values = [(row.id, _text(row.vector), _json(row.meta), *_original(row, self.info)) for row in ordered]
        with self._open() as connection, connection.transaction():
            connection.cursor().executemany(statement, values)

    def delete(self, ids: Sequence[str]) -> int:
        refuse_writes(self._read_only)
        with self._open() as connection:
            count: int = connection.execute(f"DELETE FROM {self._name} WHERE id = ANY(%s)", [list(ids)]).rowcount
        return count

    def search(self, vector: Array, top_k: int, where: Where = ()) -> list[Match]:
        query = _text(vector)
        with self._open() as connection, connection.transaction():
            if where or not self._indexed(top_k):
                conditions, values = _where(where)
                rows = connection.execute(
                    f"SELECT id, meta::text, 1 - (vector <=> %s::vector) AS score FROM {self._name}{conditions} "
                    "ORDER BY score DESC LIMIT %s",
                    [query, *values, top_k],
                )
            else:
                candidates = max(MIN_CANDIDATES, OVERSAMPLING * top_k)
                connection.execute(f"SET LOCAL hnsw.ef_search = {candidates}")
                connection.execute("SET LOCAL hnsw.iterative_scan = strict_order")  # past dead rows
                half = f"halfvec({self.info.dim})"
                rows = connection.execute(
                    "SELECT id, meta::text, 1 - (vector <=> %s::vector) AS score FROM (SELECT id, vector, meta "
                    f"FROM {self._name} ORDER BY vector::{half} <=> %s::{half} LIMIT %s) AS proposed "
                    "ORDER BY score DESC LIMIT %s",
                    [query, query, candidates, top_k],
                )
            return [Match(id_, _meta(meta), score) for id_, meta, score in rows]

    def page(self, after: str | None, limit: int, vectors: bool = False) -> list[Match]:
        start, values = ("", []) if after is None else (" WHERE id > %s", [after])
        column = "vector_send(vector)" if vectors else "NULL"
        with self._open() as connection:
            rows = connection.execute(
                f"SELECT id, meta::text, {column} FROM {self._name}{start} ORDER BY id LIMIT %s",
                [*values, limit],
                binary=True,
            )
            return [Match(id_, _meta(meta), 0.0, _vector(data) if vectors else None) for id_, meta, data in rows]

    def get(self, ids: Sequence[str], originals: bool = False) -> list[Row]:
        kept = "text, picture" if originals else "NULL, NULL"
        with self._open() as connection:
            rows = connection.execute(
                f"SELECT id, vector_send(vector), meta::text, {kept} FROM {self._name} WHERE id = ANY(%s)",
                [list(ids)],
                binary=True,
            )
            return [_row(*values) for values in rows]

    def count(self) -> int:
        with self._open() as connection:
            (rows,) = connection.execute(f"SELECT count(*) FROM {self._name}").fetchone()
        self._rows = rows
        return int(rows)

    def compact(self) -> None:
        """Nothing to do: autovacuum compacts tables."""
        refuse_writes(self._read_only)

    def rows(self, originals: bool = True) -> Iterator[list[Row]]:
        """From a read-only transaction of one snapshot, through a cursor of the server."""
        with self._open() as connection, connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            (largest,) = connection.execute(
                f"SELECT coalesce(max(greatest(octet_length(text), octet_length(picture))), 0) FROM {self._name}"
            ).fetchone()  # PostgreSQL knows the lengths without reading the values
            size = max(1, min(BATCH_ROWS, BATCH_BYTES // (largest * originals + 4 * self.info.dim)))
            kept = "text, picture" if originals else "NULL, NULL"
            with connection.cursor(name="calmclip_rows", binary=True) as cursor:
                cursor.execute(f"SELECT id, vector_send(vector), meta::text, {kept} FROM {self._name}")
                while batch := cursor.fetchmany(size):
                    yield [_row(*values) for values in batch]

    def verify(self) -> None:
        """The table, its columns and its primary key are there, and PostgreSQL can count its rows. A missing or invalid
        index is built again, unless the store is read-only: answers do not need it.

        PostgreSQL detects flipped bits in a page that it reads if its cluster has data_checksums.
        """
        with self._open() as connection, connection.transaction():
            self._verify(connection)

    def _verify(self, connection: Any) -> None:
        if not _exists(connection, self._name):
            raise self._damaged("the table is missing, and calmclip_collections has an entry for it")
        columns = dict(connection.execute(COLUMN_TYPES, [self._name]).fetchall())
        for column, expected in {**TYPES, "vector": f"vector({self.info.dim}) NOT NULL"}.items():
            if columns.get(column) != expected:
                raise self._damaged(f"the column {column} is {columns.get(column, 'missing')}; expected {expected}")
        valid = dict(connection.execute(INDEXES, [self._name]).fetchall())
        if not valid.get("PRIMARY KEY"):
            raise self._damaged("it has no valid primary key, which a restore adds last")
        if not self._read_only:
            for name, statement in _indexes(self._number, self.info.dim).items():
                if not valid.get(name):
                    log.warning("collection %s: the index %s is missing or invalid; it is built", self.info.name, name)
                    connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", [LOCK, self._number % 2**31])
                    if not dict(connection.execute(INDEXES, [self._name]).fetchall()).get(name):
                        connection.execute(f"DROP INDEX IF EXISTS {name}")
                        connection.execute(statement)
        connection.execute(f"SELECT count(*) FROM {self._name}")

    def _damaged(self, reason: str) -> CollectionDamaged:
        return CollectionDamaged(f"the table {self._name} of {self.info.name!r} is damaged: {reason}")

    @property
    def _name(self) -> str:
        return f"calmclip_c{self._number}"

    def _indexed(self, top_k: int) -> bool:
        if self.info.dim > MAX_INDEXED_DIM or OVERSAMPLING * top_k > MAX_CANDIDATES:
            return False
        return (self.count() if self._rows is None else self._rows) >= EXACT_BELOW

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with self._server.connection() as connection, _data_errors():
                yield connection
        except errors.UndefinedTable:
            raise self._gone() from None

    def _gone(self) -> CalmclipError:
        """Why there is no table of this number."""
        query = "SELECT number FROM calmclip_collections WHERE name = %s"
        with self._server.connection() as connection:
            entry = connection.execute(query, [self.info.name]).fetchone()
        if entry is None:
            return CollectionNotFound(f"collection {self.info.name!r} was deleted by another service")
        if entry[0] == self._number:
            return self._damaged("the table is missing, and calmclip_collections has an entry for it")
        return Overloaded(f"collection {self.info.name!r} was just replaced; try again in a second", reason="replaced")


@contextmanager
def _data_errors() -> Iterator[None]:
    try:
        yield
    except psycopg.DataError:
        raise BadRequest(
            "PostgreSQL cannot store NUL characters or numbers out of its range; an id, a text, the metadata or the "
            "filter has one"
        ) from None


class _Server:
    """A pool of connections to one database. ``str()`` is its location, without user and password."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("postgresql", "postgres"):
            raise BadRequest(
                "the location of the store pgvector is not a URL; expected pgvector:postgresql://USER@HOST/DATABASE"
            )
        # libpq's error would quote what it cannot parse
        if url.count("@") != parts.netloc.count("@") or parts.netloc.count("@") > 1:
            raise BadRequest(
                "the URL of the database has more than one @; in a password write %40 for @, %2F for /, %3F for ?"
            )
        self._text = f"{parts.path.lstrip('/') or 'default'} at {parts.netloc.rpartition('@')[2] or 'this machine'}"
        try:
            with psycopg.connect(url, **CONNECTION):
                pass
        except psycopg.OperationalError as error:
            raise StoreUnavailable(f"the database {self} does not answer: {_reason(error)}") from None
        except (psycopg.ProgrammingError, ValueError):  # the error may quote the URL, so it is not shown
            raise BadRequest(f"libpq cannot read the URL of the database {self}; check its options") from None
        self._pool: Any = ConnectionPool(
            url,
            kwargs={**CONNECTION, "autocommit": True},
            min_size=1,
            max_size=16,
            timeout=WAIT_S,
            configure=_configure,
            check=ConnectionPool.check_connection,  # replaces a dead connection before it is used
            reconnect_timeout=CONNECT_S,
            open=True,
            name="calmclip",
        )
        logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # else it logs every attempt to reconnect

    def __str__(self) -> str:
        return self._text

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """Raises `StoreUnavailable` and `CollectionDamaged`; an uncommitted transaction is then lost."""
        try:
            with self._pool.connection() as connection:
                yield connection
        except errors.DiskFull as error:
            raise StoreFull(f"no space is left for the database {self}: {_reason(error)}; make room") from None
        except DAMAGES as error:
            raise CollectionDamaged(f"the database {self} is damaged: {_reason(error)}") from None
        except (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction) as error:
            log.warning("the database %s failed: %s", self, _reason(error))
            raise StoreUnavailable(f"the database {self} does not answer; try again in a few seconds") from None

    def close(self) -> None:
        self._pool.close()


def _configure(connection: Any) -> None:
    connection.execute("SET synchronous_commit = on")  # overrides the server: an acknowledged commit is on disk


def _entered(connection: Any, info: Info) -> int | None:
    """The number of a new entry, or None if the name has one."""
    inserted = connection.execute(
        f"INSERT INTO calmclip_collections (name, {COLUMNS}) VALUES (%s, %s, %s, %s, %s, %s) "
        "ON CONFLICT (name) DO NOTHING RETURNING number",
        [info.name, *_values(info)],
    ).fetchone()
    return inserted[0] if inserted else None


def _values(info: Info) -> tuple[Any, ...]:
    return tuple(getattr(info, column) for column in COLUMNS.split(", "))


def _exists(connection: Any, table: str) -> bool:
    (oid,) = connection.execute("SELECT to_regclass(%s)", [table]).fetchone()
    return oid is not None


def _drop(connection: Any, number: int) -> None:
    """Waits until no reader has the table open. New readers would queue behind a waiting DROP, so it waits briefly and
    tries again."""
    while True:
        try:
            with connection.transaction():
                connection.execute(f"SET LOCAL lock_timeout = {LOCK_WAIT_MS}")
                connection.execute(f"DROP TABLE IF EXISTS calmclip_c{number}")
            return
        except errors.LockNotAvailable:
            time.sleep(LOCK_WAIT_MS / 1000)


def _table(number: int, dim: int) -> Iterator[str]:
    """The statements that create a table without the indexes of `_indexes`.

    PLAIN keeps vectors in the table's own pages, which a search of all rows reads. EXTERNAL keeps pictures out of them.
    """
    name = f"calmclip_c{number}"
    yield (
        f'CREATE TABLE {name} (id text COLLATE "C" PRIMARY KEY, vector vector({dim}) NOT NULL, meta jsonb NOT NULL, '
        "text text, picture bytea)"
    )
    yield f"ALTER TABLE {name} ALTER COLUMN vector SET STORAGE {'PLAIN' if dim <= 1536 else 'EXTERNAL'}"
    yield f"ALTER TABLE {name} ALTER COLUMN picture SET STORAGE EXTERNAL"


def _indexes(number: int, dim: int) -> dict[str, str]:
    """Name -> statement. `fastupdate` is off because a filter would otherwise scan the list of recent writes for each
    of its values."""
    name = f"calmclip_c{number}"
    meta, near = f"{name}_meta", f"{name}_near"
    indexes = {meta: f"CREATE INDEX {meta} ON {name} USING gin (meta jsonb_path_ops) WITH (fastupdate = off)"}
    if dim <= MAX_INDEXED_DIM:
        indexes[near] = f"CREATE INDEX {near} ON {name} USING hnsw ((vector::halfvec({dim})) halfvec_cosine_ops)"
    return indexes


def _where(parts: Where) -> tuple[str, list[Any]]:
    """SQL with placeholders, and their values; the SQL contains nothing from the caller.

    Equality is jsonb's: "3" is not 3, but 3.0 is. Strings are ordered by code points.
    """
    text, values = _all(parts)
    return (f" WHERE {text}" if text else ""), values


def _all(parts: Where) -> tuple[str, list[Any]]:
    terms = [_part(part) for part in parts]
    return " AND ".join(text for text, _ in terms), [value for _, values in terms for value in values]


def _part(part: Part) -> tuple[str, list[Any]]:
    if isinstance(part, Condition):
        return CONDITIONS.get(part.op, _ordered)(part)
    terms = [_all(each) for each in part.filters]
    text = f" {part.op.upper()} ".join(f"({text})" for text, _ in terms)
    return f"({text})", [value for _, values in terms for value in values]


def _in(condition: Condition) -> tuple[str, list[Any]]:
    """Containment, which uses the index of the metadata."""
    return "meta @> ANY(%s::jsonb[])", [[_json({condition.field: value}) for value in condition.value]]


def _has(condition: Condition) -> tuple[str, list[Any]]:
    return "meta @> %s::jsonb", [_json({condition.field: [condition.value]})]


def _not_in(condition: Condition) -> tuple[str, list[Any]]:
    kinds = sorted({_kind(value) for value in condition.value})
    values = [_json(value) for value in condition.value]
    text = "(jsonb_typeof(meta -> %s) = ANY(%s) AND meta -> %s <> ALL(%s::jsonb[]))"
    return text, [condition.field, kinds, condition.field, values]


def _ordered(condition: Condition) -> tuple[str, list[Any]]:
    name, value, operator = condition.field, condition.value, OPERATORS[condition.op]
    if isinstance(value, str):
        return (
            f"(jsonb_typeof(meta -> %s) = 'string' AND (meta ->> %s) COLLATE \"C\" {operator} %s)",
            [name, name, value],
        )
    return f"(jsonb_typeof(meta -> %s) = 'number' AND meta -> %s {operator} %s::jsonb)", [name, name, _json(value)]


def _contains(condition: Condition) -> tuple[str, list[Any]]:
    text = "(jsonb_typeof(meta -> %s) = 'string' AND strpos((meta ->> %s) COLLATE \"C\", %s) > 0)"
    return text, [condition.field, condition.field, condition.value]


def _is_there(condition: Condition) -> tuple[str, list[Any]]:
    return f"coalesce(jsonb_typeof(meta -> %s), 'null') {'<>' if condition.value else '='} 'null'", [condition.field]


CONDITIONS = {"in": _in, "not_in": _not_in, "has": _has, "contains": _contains, "exists": _is_there}


def _kind(value: Any) -> str:
    """As `jsonb_typeof` names it."""
    return "string" if isinstance(value, str) else "boolean" if isinstance(value, bool) else "number"


def _json(value: Any) -> str:
    return json.dumps(_exact(value), ensure_ascii=False, allow_nan=False)


def _exact(value: Any) -> Any:
    """``value`` with its whole floats beyond 2^53 as integers: Python writes a float with 17 digits at most, and jsonb
    would pad them with zeros, which is another number."""
    if isinstance(value, dict):
        return {key: _exact(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_exact(inner) for inner in value]
    return int(value) if isinstance(value, float) and abs(value) > 2**53 else value


def _meta(text: str) -> dict[str, Any]:
    """jsonb writes 1e300 with all its digits, so an integer beyond 64 bits was a float."""
    meta: dict[str, Any] = json.loads(text, parse_int=_number)
    return meta


def _number(digits: str) -> int | float:
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(number)


def _text(vector: Array) -> str:
    return "[" + ",".join(map(repr, np.asarray(vector, np.float32).tolist())) + "]"


def _original(row: Row, info: Info) -> tuple[str | None, bytes | None]:
    original = row.original if info.originals else None
    return (original, None) if isinstance(original, str) else (None, original)


def _binary(row: Row, info: Info) -> tuple[Any, ...]:
    """The values of `COPY … (FORMAT BINARY)`: pgvector's and jsonb's own formats as bytes."""
    vector = np.asarray(row.vector, ">f4")
    text, picture = _original(row, info)
    return (
        row.id,
        struct.pack(">hh", len(vector), 0) + vector.tobytes(),
        b"\x01" + _json(row.meta).encode(),
        text,
        picture,
    )


def _row(id_: str, vector: bytes, meta: str, text: str | None, picture: bytes | None) -> Row:
    return Row(id_, _vector(vector), _meta(meta), text if picture is None else bytes(picture))


def _vector(data: bytes) -> Array:
    """pgvector's binary format -> float32 [dim]."""
    return np.frombuffer(data, ">f4", offset=4).astype(np.float32)


def _reason(error: Exception) -> str:
    """The last line of the error, which has libpq's reason; libpq never writes a password."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


STORES.register("pgvector")(PgStore)
