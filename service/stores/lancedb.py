"""Collections in embedded LanceDB: in a folder, or at the URI of an object store.

Source: LanceDB (Apache-2.0). Every write is a new, atomically committed version of the table, so a killed process
leaves the last committed version. A search in a small table reads all rows. In a large table an index selects
candidates, and the float32 vectors decide.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import lancedb
import pyarrow as pa
from lancedb.index import BTree, IvfRq
from lancedb.query import ColumnOrdering

from calmclip.models.flow import Array
from calmclip.service.stores import STORES, Condition, Info, Match, Row, Table

KEY = b"calmclip"  # in the schema's metadata: the `Info` as JSON
OPERATORS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
BESIDE_EMPTY = {"gt": '"_%"', "gte": '"%', "lt": '"', "lte": '""'}  # LIKE patterns of strings that compare so to ""
CACHE_BYTES = 32 << 20  # of indexes; LanceDB's default is gigabytes
METADATA_BYTES = 4 << 20  # of files and versions; every commit adds some until the cache is full
STABLE = {"new_table_enable_stable_row_ids": "true"}  # a row's number outlives updates and compaction
SCAN_ROWS = 8192  # per batch
INDEXED_FROM = 10_000  # rows
# RaBitQ, arXiv:2405.12497: one bit per component. All partitions are read. One large partition would do, but LanceDB
# 0.40 splits it and loses most of its rows, so there are several, and the index is rebuilt before they grow large.
VECTOR_INDEX = "near"  # its name is this, followed by the number of rows that it was built for
PARTITION = 4096
REBUILD_GROWTH = 2  # the index is rebuilt when the table has so many times these rows
ALL_PARTITIONS = 1 << 20
CANDIDATES_PER_HIT = 50  # from the index; float32 decides among them
VERSION_AGE = timedelta(minutes=2)  # compaction removes older versions; a search uses one far shorter

log = logging.getLogger("calmclip")


class LanceStore:
    shared = False

    def __init__(self, location: str) -> None:
        session = lancedb.Session(index_cache_size_bytes=CACHE_BYTES, metadata_cache_size_bytes=METADATA_BYTES)
        self._db = lancedb.connect(location, session=session)

    def names(self) -> list[str]:
        names: list[str] = []
        token = None
        while True:
            page = self._db.list_tables(page_token=token)
            names += page.tables
            token = page.page_token
            if not token:
                return sorted(names)

    def create(self, info: Info) -> Table:
        schema = pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("vector", pa.list_(pa.float32(), info.dim), nullable=False),
                pa.field("meta", pa.json_(), nullable=False),
            ],
            metadata={KEY: json.dumps(asdict(info)).encode()},
        )
        return LanceTable(self._db.create_table(info.name, schema=schema, storage_options=STABLE))

    def open(self, name: str) -> Table:
        return LanceTable(self._db.open_table(name))

    def drop(self, name: str) -> None:
        self._db.drop_table(name)

    def close(self) -> None:
        """LanceDB keeps nothing open."""


class LanceTable:
    def __init__(self, table: Any) -> None:
        self._table = table
        self.info = Info(**json.loads(table.schema.metadata[KEY]))

    def upsert(self, rows: Sequence[Row]) -> None:
        vectors = pa.array([row.vector for row in rows], pa.list_(pa.float32(), self.info.dim))
        metas = pa.array([json.dumps(row.meta, ensure_ascii=False, allow_nan=False) for row in rows])
        data = pa.table(
            {
                "id": pa.array([row.id for row in rows], pa.string()),
                "vector": vectors,
                "meta": pa.ExtensionArray.from_storage(pa.json_(), metas),
            }
        )
        self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(data)

    def delete(self, ids: Sequence[str]) -> int:
        where = _id_in(ids)
        count: int = self._table.count_rows(where)
        if count:
            self._table.delete(where)
        return count

    def search(self, vector: Array, top_k: int, where: Sequence[Condition] = ()) -> list[Match]:
        query = self._table.search(vector).distance_type("cosine").select(["id", "meta", "_distance"]).limit(top_k)
        query = query.nprobes(ALL_PARTITIONS).refine_factor(CANDIDATES_PER_HIT)  # without effect if there is no index
        if where:
            query = query.where(" AND ".join(map(sql, where)), prefilter=True)
        return [
            Match(row["id"], json.loads(row["meta"]), 1.0 - row["_distance"]) for row in query.to_arrow().to_pylist()
        ]

    def page(self, after: str | None, limit: int) -> list[Match]:
        query = self._table.search().select(["id", "meta"]).limit(limit)
        query = query.order_by([ColumnOrdering(column_name="id", ascending=True, nulls_first=False)])
        if after is not None:
            query = query.where(f"id > {literal(after)}")
        return [Match(row["id"], json.loads(row["meta"])) for row in query.to_arrow().to_pylist()]

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

    def compact(self) -> None:
        """Also build the indexes of a large table. A search reads rows that are newer than the index as well."""
        self._table.optimize(cleanup_older_than=VERSION_AGE)
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


def sql(condition: Condition) -> str:
    """The condition in LanceDB's SQL. All values from the caller are inside quoted literals.

    Equality compares JSON texts, so it respects types: "3" (a string) is not 3. Numbers are cast. The order of strings
    uses a JSON path, because quotes and escapes change the order of JSON texts.
    """
    path = f"$.{json.dumps(condition.field, ensure_ascii=False)}"
    text = f"json_extract(meta, {literal(path)})"
    if condition.op == "in":
        return "(" + " OR ".join(_compare(text, "=", value) for value in condition.value) + ")"
    if condition.value == "":  # a JSON path cannot express it
        return f"{text} LIKE {literal(BESIDE_EMPTY[condition.op])}"
    if isinstance(condition.value, str):
        bound = f"{path}?(@ {OPERATORS[condition.op]} {json.dumps(condition.value, ensure_ascii=False)})"
        return f"({text} LIKE '\"%' AND json_exists(meta, {literal(bound)}))"  # a path also searches lists
    return _compare(text, OPERATORS[condition.op], condition.value)


def _id_in(ids: Sequence[str]) -> str:
    return f"id IN ({', '.join(map(literal, ids))})"


def _vectors(column: Any) -> Array:
    """A column of fixed-size lists -> float32 [N, dim]."""
    vectors: Array = column.flatten().to_numpy().reshape(len(column), -1)
    return vectors


def literal(text: str) -> str:
    """A string literal of standard SQL: only quotes are special, and are doubled."""
    return "'" + text.replace("'", "''") + "'"


def _compare(text: str, operator: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"try_cast({text} AS double) {operator} {float(value)!r}"
    return f"{text} {operator} {literal(json.dumps(value, ensure_ascii=False))}"


STORES.register("lancedb")(LanceStore)
