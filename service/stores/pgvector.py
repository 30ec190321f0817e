"""Collections in PostgreSQL with pgvector, by URL: several services may share them.

Source: pgvector (PostgreSQL licence) >= 0.8, psycopg 3 (LGPL). A collection is a table of its own, beside one table
that lists them: the vectors of a table have one length and one index, a search never meets another collection's rows,
and to drop one is to drop a table. Tables are numbered, so no name of a caller becomes an identifier.

Vectors lie there as float32. A search sorts them all as long as they are few, or those that a filter leaves, found by
an index of the metadata where it asks for values; otherwise HNSW over a copy in float16 proposes `OVERSAMPLED` times as
many as are wanted, and float32 decides among them.
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
from calmclip.service.stores import STORES, Condition, Found, Info, Row, Store, Table

try:
    import psycopg
    from psycopg import errors
    from psycopg_pool import ConnectionPool
except ModuleNotFoundError:
    raise missing("the store pgvector", "psycopg", "postgres") from None

OPERATORS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
EXACT_BELOW = 10_000  # rows that are sorted in about the time HNSW takes
OVERSAMPLED = 4
MOST_PROPOSED = 1000  # the largest hnsw.ef_search; a search that needs more sorts
LEAST_PROPOSED = 200
MOST_INDEXED = 4000  # the longest halfvec HNSW takes
PATIENCE_S = 5  # for a connection to be made,
WAIT_S = 2.0  # and for one of the pool, which has some to spare unless the server does not answer
LOCK = 0x63616C6D  # "calm": of an advisory lock, so that services that start together make one schema

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
    "connect_timeout": PATIENCE_S,
    "application_name": "calmclip",
    "tcp_user_timeout": 10_000,  # ms: a peer that has vanished is an error, not a wait without end
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
        """Of two that make it at once, one does; both get it."""
        with self._server.connection() as connection, connection.transaction():
            made = connection.execute(
                "INSERT INTO calmclip_collections (name, model, digest, dim, created) VALUES (%s, %s, %s, %s, %s) "
                "ON CONFLICT DO NOTHING RETURNING number",
                [info.name, info.model, info.digest, info.dim, info.created],
            ).fetchone()
            if made:
                for statement in _table(made[0], info.dim):
                    connection.execute(statement)
        return PgTable(self._server, made[0], info) if made else self.open(info.name)

    def open(self, name: str) -> Table:
        with self._server.connection() as connection:
            found = connection.execute(
                "SELECT number, model, digest, dim, created FROM calmclip_collections WHERE name = %s", [name]
            ).fetchone()
        if found is None:
            raise CollectionNotFound(f"there is no collection {name!r}")
        number, *info = found
        return PgTable(self._server, number, Info(name, *info))

    def drop(self, name: str) -> None:
        with self._server.connection() as connection, connection.transaction():
            found = connection.execute("DELETE FROM calmclip_collections WHERE name = %s RETURNING number", [name])
            for (number,) in found.fetchall():
                connection.execute(f"DROP TABLE calmclip_c{number}")

    def close(self) -> None:
        self._server.close()

    def _extension(self, connection: Any) -> None:
        found = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
        if found is None:
            try:
                with connection.transaction():
                    connection.execute("CREATE EXTENSION vector")
            except errors.InsufficientPrivilege:
                raise CollectionError(
                    f"the database {self._server} has no extension vector, and its user may not make one; "
                    "let a superuser run CREATE EXTENSION vector"
                ) from None
            except psycopg.Error:
                raise CollectionError(
                    f"the server of {self._server} has no pgvector; install it (Debian: postgresql-17-pgvector)"
                ) from None
            found = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
        if [int(part) for part in found[0].split(".")[:2]] < [0, 8]:
            raise CollectionError(
                f"{self._server} has pgvector {found[0]}; expected 0.8 or newer: ALTER EXTENSION vector UPDATE"
            )


@dataclass
class PgTable:
    """Equal to another that is the same table at the same server."""

    _server: "_Server" = field(repr=False)
    _number: int
    info: Info
    _rows: int | None = field(default=None, compare=False)  # when last counted: which way to search

    def upsert(self, rows: Sequence[Row]) -> None:
        statement = (
            f"INSERT INTO {self._name} (id, vector, meta) VALUES (%s, %s, %s) "
            "ON CONFLICT (id) DO UPDATE SET vector = excluded.vector, meta = excluded.meta"
        )
        ordered = sorted(rows, key=lambda row: row.id)  # two writers lock rows in one order, or they may wait in a ring
        values = [(row.id, _text(row.vector), _json(row.meta)) for row in ordered]
        with self._open() as connection, connection.transaction():
            connection.cursor().executemany(statement, values)

    def delete(self, ids: Sequence[str]) -> int:
        with self._open() as connection:
            there: int = connection.execute(f"DELETE FROM {self._name} WHERE id = ANY(%s)", [list(ids)]).rowcount
        return there

    def search(self, vector: Array, top_k: int, where: Sequence[Condition] = ()) -> list[Found]:
        query = _text(vector)
        with self._open() as connection, connection.transaction():
            if where or not self._indexed(top_k):
                conditions, values = _where(where)
                found = connection.execute(
                    f"SELECT id, meta::text, 1 - (vector <=> %s::vector) AS score FROM {self._name}{conditions} "
                    "ORDER BY score DESC LIMIT %s",
                    [query, *values, top_k],
                )
            else:
                proposed = max(LEAST_PROPOSED, OVERSAMPLED * top_k)
                connection.execute(f"SET LOCAL hnsw.ef_search = {proposed}")
                connection.execute("SET LOCAL hnsw.iterative_scan = strict_order")  # past rows that are dead already
                dim = self.info.dim
                found = connection.execute(
                    f"SELECT id, meta::text, 1 - (vector <=> %s::vector) AS score FROM (SELECT * FROM {self._name} "
                    f"ORDER BY vector::halfvec({dim}) <=> %s::halfvec({dim}) LIMIT %s) AS proposed "
                    "ORDER BY score DESC LIMIT %s",
                    [query, query, proposed, top_k],
                )
            return [Found(id_, _meta(meta), score) for id_, meta, score in found]

    def page(self, after: str | None, limit: int) -> list[Found]:
        start, values = ("", []) if after is None else (" WHERE id > %s", [after])
        with self._open() as connection:
            found = connection.execute(
                f"SELECT id, meta::text FROM {self._name}{start} ORDER BY id LIMIT %s", [*values, limit]
            )
            return [Found(id_, _meta(meta)) for id_, meta in found]

    def count(self) -> int:
        with self._open() as connection:
            (rows,) = connection.execute(f"SELECT count(*) FROM {self._name}").fetchone()
        self._rows = rows
        return int(rows)

    def compact(self) -> None:
        """Nothing: autovacuum does that."""

    @property
    def _name(self) -> str:
        return f"calmclip_c{self._number}"

    def _indexed(self, top_k: int) -> bool:
        if self.info.dim > MOST_INDEXED or OVERSAMPLED * top_k > MOST_PROPOSED:
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
                "PostgreSQL keeps no NUL characters; an id, the metadata or the filter holds one, or a number "
                "beyond what it can hold"
            ) from None


class _Server:
    """A pool of connections to one database. As text: where it is, without user and password."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("postgresql", "postgres"):
            raise BadRequest(
                "the place of the store pgvector is no URL; expected pgvector:postgresql://USER@HOST/DATABASE"
            )
        if url.count("@") != parts.netloc.count("@") or parts.netloc.count("@") > 1:  # libpq quotes what it cannot read
            raise BadRequest(
                "the URL of the database has an @ too many; in a password it is %40, and / is %2F, ? is %3F"
            )
        self._text = f"{parts.path.lstrip('/') or 'default'} at {parts.netloc.rpartition('@')[2] or 'this machine'}"
        try:
            with psycopg.connect(url, **CONNECTION):
                pass
        except psycopg.OperationalError as error:
            raise StoreUnavailable(f"the database {self} does not answer: {_reason(error)}") from None
        except (psycopg.ProgrammingError, ValueError):  # their words may quote the URL
            raise BadRequest(f"the URL of the database {self} is none that libpq reads; check its options") from None
        self._pool: Any = ConnectionPool(
            url,
            kwargs={**CONNECTION, "autocommit": True},
            min_size=1,
            max_size=16,
            timeout=WAIT_S,
            configure=_configure,
            check=ConnectionPool.check_connection,  # one that died is replaced before anybody is handed it
            reconnect_timeout=PATIENCE_S,
            open=True,
            name="calmclip",
        )
        logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # a line for every attempt to connect again

    def __str__(self) -> str:
        return self._text

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """Raises `StoreUnavailable`; what was not committed by then is not there."""
        try:
            with self._pool.connection() as connection:
                yield connection
        except (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction) as error:
            log.warning("the database %s failed: %s", self, _reason(error))
            raise StoreUnavailable(f"the database {self} does not answer; try again in a few seconds") from None

    def close(self) -> None:
        self._pool.close()


def _configure(connection: Any) -> None:
    connection.execute("SET synchronous_commit = on")  # whatever the server's default: acknowledged is on disk


def _table(number: int, dim: int) -> Iterator[str]:
    """PLAIN keeps vectors in the table's own pages, where a search that sorts them all reads them.

    Without `fastupdate` off, each value that a filter asks for would read through all that was written of late.
    """
    name = f"calmclip_c{number}"
    yield f'CREATE TABLE {name} (id text COLLATE "C" PRIMARY KEY, vector vector({dim}) NOT NULL, meta jsonb NOT NULL)'
    yield f"ALTER TABLE {name} ALTER COLUMN vector SET STORAGE {'PLAIN' if dim <= 1536 else 'EXTERNAL'}"
    yield f"CREATE INDEX {name}_meta ON {name} USING gin (meta jsonb_path_ops) WITH (fastupdate = off)"
    if dim <= MOST_INDEXED:
        yield f"CREATE INDEX ON {name} USING hnsw ((vector::halfvec({dim})) halfvec_cosine_ops)"


def _where(conditions: Sequence[Condition]) -> tuple[str, list[Any]]:
    """SQL with placeholders, and their values: nothing a caller chose is part of the text.

    Equality is that of jsonb, so "3" is not 3 while 3.0 is; strings are ordered by code points.
    """
    found = [_condition(condition) for condition in conditions]
    text = " AND ".join(text for text, _ in found)
    return (f" WHERE {text}" if text else ""), [value for _, values in found for value in values]


def _condition(condition: Condition) -> tuple[str, list[Any]]:
    name, value = condition.field, condition.value
    if condition.op == "in":  # as containment, which the index of the metadata answers
        return "meta @> ANY(%s::jsonb[])", [[_json({name: one}) for one in value]]
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
    """jsonb writes 1e300 with all its digits; what no 64 bits hold was a float."""
    found: dict[str, Any] = json.loads(text, parse_int=_number)
    return found


def _number(digits: str) -> int | float:
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(number)


def _text(vector: Array) -> str:
    return "[" + ",".join(map(repr, np.asarray(vector, np.float32).tolist())) + "]"


def _reason(error: Exception) -> str:
    """The last line, where libpq says what was the matter; it never writes a password."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def open_pgvector(place: str) -> Store:
    return PgStore(place)


STORES.register("pgvector")(open_pgvector)
