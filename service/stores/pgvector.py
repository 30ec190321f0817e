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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from calmclip.models.errors import BadRequest, CollectionError, CollectionNotFound, StoreUnavailable
from calmclip.models.extras import missing
from calmclip.models.flow import Array
from calmclip.service.stores import STORES, Condition, Info, Match, Row, Table

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
LOCK = 0x63616C6D  # "calm", an advisory lock: services that start together create one schema

SCHEMA = """
CREATE TABLE IF NOT EXISTS calmclip_collections (
    number bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    name text COLLATE "C" PRIMARY KEY,
    model text NOT NULL,
    digest text NOT NULL,
    dim integer NOT NULL,
    created text NOT NULL
)
"""
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

    def __init__(self, url: str) -> None:
        self._server = _Server(url)
        with self._server.connection() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
            self._extension(connection)
            if connection.execute("SELECT to_regclass('calmclip_collections')").fetchone() == (None,):
                connection.execute(SCHEMA)

    def names(self) -> list[str]:
        with self._server.connection() as connection:
            return [name for (name,) in connection.execute("SELECT name FROM calmclip_collections ORDER BY name")]

    def create(self, info: Info) -> Table:
        """If two services create it at the same time, one does, and both get it."""
        with self._server.connection() as connection, connection.transaction():
            inserted = connection.execute(
                "INSERT INTO calmclip_collections (name, model, digest, dim, created) VALUES (%s, %s, %s, %s, %s) "
                "ON CONFLICT DO NOTHING RETURNING number",
                [info.name, info.model, info.digest, info.dim, info.created],
            ).fetchone()
            if inserted:
                for statement in _table(inserted[0], info.dim):
                    connection.execute(statement)
        return PgTable(self._server, inserted[0], info) if inserted else self.open(info.name)

    def open(self, name: str) -> Table:
        with self._server.connection() as connection:
            entry = connection.execute(
                "SELECT number, model, digest, dim, created FROM calmclip_collections WHERE name = %s", [name]
            ).fetchone()
        if entry is None:
            raise CollectionNotFound(f"there is no collection {name!r}")
        number, *info = entry
        return PgTable(self._server, number, Info(name, *info))

    def drop(self, name: str) -> None:
        with self._server.connection() as connection, connection.transaction():
            deleted = connection.execute("DELETE FROM calmclip_collections WHERE name = %s RETURNING number", [name])
            for (number,) in deleted.fetchall():
                connection.execute(f"DROP TABLE calmclip_c{number}")

    def close(self) -> None:
        self._server.close()

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
    _rows: int | None = field(default=None, compare=False)  # at the last count; decides how to search

    def upsert(self, rows: Sequence[Row]) -> None:
        statement = (
            f"INSERT INTO {self._name} (id, vector, meta) VALUES (%s, %s, %s) "
            "ON CONFLICT (id) DO UPDATE SET vector = excluded.vector, meta = excluded.meta"
        )
        ordered = sorted(rows, key=lambda row: row.id)  # all writers lock rows in one order, or they may deadlock
        values = [(row.id, _text(row.vector), _json(row.meta)) for row in ordered]
        with self._open() as connection, connection.transaction():
            connection.cursor().executemany(statement, values)

    def delete(self, ids: Sequence[str]) -> int:
        with self._open() as connection:
            count: int = connection.execute(f"DELETE FROM {self._name} WHERE id = ANY(%s)", [list(ids)]).rowcount
        return count

    def search(self, vector: Array, top_k: int, where: Sequence[Condition] = ()) -> list[Match]:
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
                dim = self.info.dim
                rows = connection.execute(
                    f"SELECT id, meta::text, 1 - (vector <=> %s::vector) AS score FROM (SELECT * FROM {self._name} "
                    f"ORDER BY vector::halfvec({dim}) <=> %s::halfvec({dim}) LIMIT %s) AS proposed "
                    "ORDER BY score DESC LIMIT %s",
                    [query, query, candidates, top_k],
                )
            return [Match(id_, _meta(meta), score) for id_, meta, score in rows]

    def page(self, after: str | None, limit: int) -> list[Match]:
        start, values = ("", []) if after is None else (" WHERE id > %s", [after])
        with self._open() as connection:
            rows = connection.execute(
                f"SELECT id, meta::text FROM {self._name}{start} ORDER BY id LIMIT %s", [*values, limit]
            )
            return [Match(id_, _meta(meta)) for id_, meta in rows]

    def count(self) -> int:
        with self._open() as connection:
            (rows,) = connection.execute(f"SELECT count(*) FROM {self._name}").fetchone()
        self._rows = rows
        return int(rows)

    def compact(self) -> None:
        """Nothing to do: autovacuum compacts tables."""

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
            with self._server.connection() as connection:
                yield connection
        except errors.UndefinedTable:
            raise CollectionNotFound(f"collection {self.info.name!r} was deleted by another service") from None
        except psycopg.DataError:
            raise BadRequest(
                "PostgreSQL cannot store NUL characters or numbers out of its range; an id, the metadata or the filter "
                "has one"
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
        """Raises `StoreUnavailable`; an uncommitted transaction is then lost."""
        try:
            with self._pool.connection() as connection:
                yield connection
        except (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction) as error:
            log.warning("the database %s failed: %s", self, _reason(error))
            raise StoreUnavailable(f"the database {self} does not answer; try again in a few seconds") from None

    def close(self) -> None:
        self._pool.close()


def _configure(connection: Any) -> None:
    connection.execute("SET synchronous_commit = on")  # overrides the server: an acknowledged commit is on disk


def _table(number: int, dim: int) -> Iterator[str]:
    """The statements that create a table.

    PLAIN keeps vectors in the table's own pages, which a search of all rows reads. `fastupdate` is off because a filter
    would otherwise scan the list of recent writes for each of its values.
    """
    name = f"calmclip_c{number}"
    yield f'CREATE TABLE {name} (id text COLLATE "C" PRIMARY KEY, vector vector({dim}) NOT NULL, meta jsonb NOT NULL)'
    yield f"ALTER TABLE {name} ALTER COLUMN vector SET STORAGE {'PLAIN' if dim <= 1536 else 'EXTERNAL'}"
    yield f"CREATE INDEX {name}_meta ON {name} USING gin (meta jsonb_path_ops) WITH (fastupdate = off)"
    if dim <= MAX_INDEXED_DIM:
        yield f"CREATE INDEX ON {name} USING hnsw ((vector::halfvec({dim})) halfvec_cosine_ops)"


def _where(conditions: Sequence[Condition]) -> tuple[str, list[Any]]:
    """SQL with placeholders, and their values; the SQL contains nothing from the caller.

    Equality is jsonb's: "3" is not 3, but 3.0 is. Strings are ordered by code points.
    """
    parts = [_condition(condition) for condition in conditions]
    text = " AND ".join(text for text, _ in parts)
    return (f" WHERE {text}" if text else ""), [value for _, values in parts for value in values]


def _condition(condition: Condition) -> tuple[str, list[Any]]:
    name, value = condition.field, condition.value
    if condition.op == "in":  # containment uses the index of the metadata
        return "meta @> ANY(%s::jsonb[])", [[_json({name: item}) for item in value]]
    operator = OPERATORS[condition.op]
    if isinstance(value, str):
        return (
            f"(jsonb_typeof(meta -> %s) = 'string' AND (meta ->> %s) COLLATE \"C\" {operator} %s)",
            [name, name, value],
        )
    return f"(jsonb_typeof(meta -> %s) = 'number' AND meta -> %s {operator} %s::jsonb)", [name, name, _json(value)]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _meta(text: str) -> dict[str, Any]:
    """jsonb writes 1e300 with all its digits, so an integer beyond 64 bits was a float."""
    meta: dict[str, Any] = json.loads(text, parse_int=_number)
    return meta


def _number(digits: str) -> int | float:
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(number)


def _text(vector: Array) -> str:
    return "[" + ",".join(map(repr, np.asarray(vector, np.float32).tolist())) + "]"


def _reason(error: Exception) -> str:
    """The last line of the error, which has libpq's reason; libpq never writes a password."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


STORES.register("pgvector")(PgStore)
