"""Collections in LanceDB, embedded: a folder, or the URI of an object store.

Source: LanceDB (Apache-2.0). Every write is a new, atomically committed version of the table, so a killed
process leaves the last committed one. Search reads all rows while they are few; then an index proposes, and float32
decides.
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
from calmclip.service.stores import STORES, Condition, Found, Info, Row, Store, Table

KEY = b"calmclip"  # of the schema's metadata: the Info, as JSON
OPERATORS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
BESIDE_EMPTY = {"gt": '"_%"', "gte": '"%', "lt": '"', "lte": '""'}  # JSON texts of strings so ordered to ""
CACHE_BYTES = 32 << 20  # of indexes; of its own making LanceDB would take gigabytes
METADATA_BYTES = 4 << 20  # of files and versions: each commit leaves some, until there is no more room for them
STABLE = {"new_table_enable_stable_row_ids": "true"}  # a row's number outlives updates and compaction
SCANNED = 8192  # rows at a time
INDEXED_FROM = 10_000  # rows
# RaBitQ, arXiv:2405.12497: a bit for each component. All partitions are read. There are several since LanceDB splits
# one that grows large, and (0.40) loses most of it: before that, the index is made anew.
NEAR = "near"  # and the rows it was made for: its name
PARTITION = 4096
REMADE = 2  # times the rows
ALL = 1 << 20
PROPOSED = 50  # rows that the index proposes for each hit that is wanted; float32 decides
OLD = timedelta(minutes=2)  # versions that compaction removes; a search holds one for far less

log = logging.getLogger("calmclip")


class LanceStore:
    shared = False

    def __init__(self, place: str) -> None:
        session = lancedb.Session(index_cache_size_bytes=CACHE_BYTES, metadata_cache_size_bytes=METADATA_BYTES)
        self._db = lancedb.connect(place, session=session)

    def names(self) -> list[str]:
        found: list[str] = []
        token = None
        while True:
            page = self._db.list_tables(page_token=token)
            found += page.tables
            token = page.page_token
            if not token:
                return sorted(found)

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
        """Nothing is held open."""


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
        where = _among(ids)
        there: int = self._table.count_rows(where)
        if there:
            self._table.delete(where)
        return there

    def search(self, vector: Array, top_k: int, where: Sequence[Condition] = ()) -> list[Found]:
        query = self._table.search(vector).distance_type("cosine").select(["id", "meta", "_distance"]).limit(top_k)
        query = query.nprobes(ALL).refine_factor(PROPOSED)  # which say nothing where there is no index
        if where:
            query = query.where(" AND ".join(map(sql, where)), prefilter=True)
        return [
            Found(row["id"], json.loads(row["meta"]), 1.0 - row["_distance"]) for row in query.to_arrow().to_pylist()
        ]

    def page(self, after: str | None, limit: int) -> list[Found]:
        query = self._table.search().select(["id", "meta"]).limit(limit)
        query = query.order_by([ColumnOrdering(column_name="id", ascending=True, nulls_first=False)])
        if after is not None:
            query = query.where(f"id > {literal(after)}")
        return [Found(row["id"], json.loads(row["meta"])) for row in query.to_arrow().to_pylist()]

    def count(self) -> int:
        rows: int = self._table.count_rows()
        return rows

    def places(self, ids: Sequence[str]) -> dict[str, int]:
        found = self._table.search().where(_among(ids)).with_row_id(True).select(["id"]).limit(len(ids)).to_arrow()
        return dict(zip(found["id"].to_pylist(), found["_rowid"].to_pylist(), strict=True))

    def fetch(self, places: Sequence[int]) -> list[Row]:
        found = self._table.take_row_ids(list(places)).select(["id", "vector", "meta"]).to_arrow()
        columns = (found["id"].to_pylist(), _vectors(found["vector"].combine_chunks()), found["meta"].to_pylist())
        return [Row(id_, vector, json.loads(meta)) for id_, vector, meta in zip(*columns, strict=True)]

    def scan(self, most: int | None = None) -> Iterator[tuple[list[str], list[int], Array]]:
        query = self._table.search().with_row_id(True).select(["id", "vector"]).limit(most)
        for batch in query.to_batches(batch_size=SCANNED):
            yield batch["id"].to_pylist(), batch["_rowid"].to_pylist(), _vectors(batch["vector"])

    def compact(self) -> None:
        """Also indexes, once there is something to gain. Rows written since are read beside them."""
        self._table.optimize(cleanup_older_than=OLD)
        rows = self.count()
        if rows < INDEXED_FROM or self.info.dim % 8:
            return
        there = {index.name for index in self._table.list_indices()}
        if "id" not in there:
            self._table.create_index("id", config=BTree(), name="id")
        made_for = max((int(name.removeprefix(NEAR)) for name in there if name.startswith(NEAR)), default=0)
        if rows >= REMADE * made_for:
            config = IvfRq(distance_type="cosine", num_partitions=-(-rows // PARTITION))
            self._table.create_index("vector", config=config, name=f"{NEAR}{rows}")
            if made_for:
                self._table.drop_index(f"{NEAR}{made_for}")


def sql(condition: Condition) -> str:
    """The condition for LanceDB's SQL. Everything a caller chose ends up inside a quoted literal.

    Equality compares JSON texts, so types are told apart: "3" (a string) is not 3. Numbers go through a cast.
    The order of strings is a JSON path's: texts differ from what they say by quotes and escapes.
    """
    path = f"$.{json.dumps(condition.field, ensure_ascii=False)}"
    text = f"json_extract(meta, {literal(path)})"
    if condition.op == "in":
        return "(" + " OR ".join(_compare(text, "=", value) for value in condition.value) + ")"
    if condition.value == "":  # which a path cannot say
        return f"{text} LIKE {literal(BESIDE_EMPTY[condition.op])}"
    if isinstance(condition.value, str):
        bound = f"{path}?(@ {OPERATORS[condition.op]} {json.dumps(condition.value, ensure_ascii=False)})"
        return f"({text} LIKE '\"%' AND json_exists(meta, {literal(bound)}))"  # a path also looks into lists
    return _compare(text, OPERATORS[condition.op], condition.value)


def _among(ids: Sequence[str]) -> str:
    return f"id IN ({', '.join(map(literal, ids))})"


def _vectors(column: Any) -> Array:
    """A column of fixed-size lists -> float32 [N, dim]."""
    found: Array = column.flatten().to_numpy().reshape(len(column), -1)
    return found


def literal(text: str) -> str:
    """A string literal of standard SQL: quotes doubled, nothing else is special."""
    return "'" + text.replace("'", "''") + "'"


def _compare(text: str, operator: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"try_cast({text} AS double) {operator} {float(value)!r}"
    return f"{text} {operator} {literal(json.dumps(value, ensure_ascii=False))}"


def open_lancedb(place: str) -> Store:
    return LanceStore(place)


STORES.register("lancedb")(open_lancedb)
