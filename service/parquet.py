"""A collection as one Parquet file: `write` and `read`. The file is a backup, and a way to other programs.

Columns: ``id`` string, ``vector`` list of D float32, ``meta`` string (JSON), ``text`` string and ``picture`` binary
(what was embedded, if the collection keeps originals). The file's metadata holds `KEY`: the format's number and the
`Info`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calmclip.models.errors import BadRequest
from calmclip.service import metadata, strict_json
from calmclip.service.errors import InvalidRequest
from calmclip.service.exchange import UNIT, File, Ids, whole
from calmclip.service.stores import Info, Row, Table

KEY = b"calmclip"
FORMAT = 1
READ_ROWS = 1024


def write(table: Table, path: Path, *, replace: bool = False) -> int:
    """Write every row of one snapshot of ``table``; -> their number. The file appears whole or not at all.

    Raises `BadRequest` if the file exists without ``replace``. Memory: one batch of rows.
    """
    info = table.info
    schema = _schema(info.dim).with_metadata({KEY: json.dumps({"format": FORMAT, "collection": asdict(info)})})
    count = 0
    with whole(path, replace=replace) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for rows in table.rows():
            writer.write_batch(_batch(rows, schema))
            count += len(rows)
    return count


def read(path: Path) -> File:
    """Raises `BadRequest` for a file that `write` did not write."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadRequest(f"{path} cannot be read as Parquet: {error}") from None
    try:
        head = json.loads((file.schema_arrow.metadata or {})[KEY])
        number = head["format"]
        info = Info(**head["collection"]) if number == FORMAT else None
    except (KeyError, TypeError, ValueError):
        raise BadRequest(f"{path} is no file of 'calmclip collection export': its metadata has no collection") from None
    if info is None:
        raise BadRequest(f"{path} has format {number}; this calmclip reads {FORMAT}. Install a newer calmclip")
    expected = _schema(info.dim)
    if not file.schema_arrow.remove_metadata().equals(expected):
        raise BadRequest(
            f"{path} has the columns {_columns(file.schema_arrow)}; expected {_columns(expected)}, as its metadata says"
        )
    return File(info, _rows(file, path, info))


def _rows(file: pq.ParquetFile, path: Path, info: Info) -> Iterator[list[Row]]:
    ids = Ids(str(path))
    try:
        for batch in file.iter_batches(READ_ROWS):
            yield [_row(values, path, info, ids) for values in batch.to_pylist()]
    except (pa.ArrowException, OSError) as error:  # a truncated file may have a whole end
        raise BadRequest(f"{path} is damaged: {error}") from None


def _row(values: dict[str, Any], path: Path, info: Info, ids: Ids) -> Row:
    id_, text, picture = ids.check(values["id"]), values["text"], values["picture"]
    vector = np.array(values["vector"], np.float32)
    length = float(np.linalg.norm(vector))
    if not abs(length - 1) <= UNIT:  # also if it is not a number
        raise BadRequest(f"{path}: the vector of {id_!r} has the length {length:.4g}; expected a unit vector")
    try:
        meta = metadata.storable(dict(strict_json.parse(values["meta"].encode(), "it")))
    except (InvalidRequest, ValueError) as error:
        raise BadRequest(f"{path}: the meta of {id_!r}: {error}") from None
    return Row(id_, vector, meta, (picture if text is None else text) if info.originals else None)


def _schema(dim: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.field("item", pa.float32(), nullable=False), dim), nullable=False),
            pa.field("meta", pa.string(), nullable=False),
            pa.field("text", pa.string()),
            pa.field("picture", pa.binary()),
        ]
    )


def _batch(rows: Sequence[Row], schema: pa.Schema) -> pa.RecordBatch:
    originals = [row.original for row in rows]
    columns: dict[str, Iterable[Any]] = {
        "id": [row.id for row in rows],
        "vector": [row.vector for row in rows],
        "meta": [json.dumps(row.meta, ensure_ascii=False) for row in rows],
        "text": [original if isinstance(original, str) else None for original in originals],
        "picture": [original if isinstance(original, bytes) else None for original in originals],
    }
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
