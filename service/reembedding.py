"""`re_embed`: the items of a collection get the vectors of another bundle, all of them or none.

The texts and pictures come from the collection, if it keeps originals, or from the folder that `calmclip index` read.
Time: one run of a tower per item. Memory: some hundred items. `Store.replace` commits once, at the end, so a killed
process leaves the collection as it was.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from calmclip.models.errors import BadRequest, InputError
from calmclip.models.flow import Flow
from calmclip.models.preprocess.truncation import Truncation
from calmclip.models.runner import Runner
from calmclip.models.tasks.embed import Embeddings, EmbedRequest, document_prompt, embed
from calmclip.models.tasks.features import check_dimensions
from calmclip.service.indexing import Picture
from calmclip.service.stores import Info, Row, Store, Table
from calmclip.service.thumbnails import Thumbnailed

PAGE = 1000
TEXTS = 256  # of one run
SHOWN = 3  # ids in an error


@dataclass
class Counts:
    """``changed``: pictures whose file differs from the indexed one; their metadata follows the file."""

    items: int = 0
    changed: int = 0
    dropped: list[str] = field(default_factory=list)


def re_embed(
    store: Store,
    name: str,
    runner: Runner,
    folder: Path | None = None,
    *,
    drop: bool = False,
    truncation: Truncation | None = None,
    dimensions: int | None = None,
) -> Counts:
    """``folder``: for the items without an original, by their ids. ``drop``: leave out the items that have no source.
    ``truncation``: of a text that is too long; None: the bundle's. ``dimensions``: the length of the new vectors, one
    of `Bundle.dimensions`; None: all that the bundle makes.

    Raises `CollectionNotFound`, and `BadRequest` for another length, an item without a source, and a picture that
    cannot be decoded; then the collection has not changed. Other services that write to the collection wait meanwhile.
    """
    table = store.open(name)
    table.verify()
    counts = Counts()
    bundle = runner.bundle
    bundle.require("embed")
    assert bundle.embedding_digest
    check_dimensions(bundle, dimensions)
    if not table.info.originals:
        _require_sources(table, folder, drop)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    info = Info(name, bundle.name, bundle.embedding_digest, dimensions or bundle.dim, now, table.info.originals)
    with tqdm(total=table.count(), unit="item", disable=None) as bar:
        settings = {"prompt": document_prompt(bundle), "truncation": truncation, "dimensions": dimensions}
        store.replace(info, _batches(_embedded(table, runner, folder, drop, settings, counts), counts, bar))
    return counts


def _require_sources(table: Table, folder: Path | None, drop: bool) -> None:
    """Before hours of work: raises `BadRequest` if an item has no file in ``folder``."""
    missing, total = [], 0
    for id_ in _ids(table):
        total += 1
        if _file(folder, id_) is None:
            missing.append(id_)
    if missing and not drop:
        shown = ", ".join(map(repr, missing[:SHOWN])) + (", …" if len(missing) > SHOWN else "")
        where = f"no file in {folder}" if folder else "no source, because the collection keeps no originals"
        raise BadRequest(
            f"{len(missing)} of {total} items have {where}: {shown}. Name the folder that was indexed (--folder), or "
            "leave these items out (--drop)"
        )
    if missing and len(missing) == total:
        raise BadRequest(
            f"no item has a source, so nothing would be left; 'calmclip collection remove {table.info.name}'"
        )


def _ids(table: Table) -> Iterator[str]:
    after = None
    while page := table.page(after, PAGE):
        yield from (match.id for match in page)
        after = page[-1].id


def _file(folder: Path | None, id_: str) -> Path | None:
    """The file of this id inside ``folder``, or None."""
    parts = PurePosixPath(id_).parts
    if folder is None or "\0" in id_ or ".." in parts or PurePosixPath(id_).is_absolute():
        return None
    path = folder.joinpath(*parts)
    return path if path.is_file() else None


def _embedded(
    table: Table, runner: Runner, folder: Path | None, drop: bool, settings: Mapping[str, Any], counts: Counts
) -> Iterator[Row]:
    """The rows with their new vectors, in the order of `Table.rows`."""
    waiting: deque[list[tuple[Row, str | bytes]]] = deque()  # rows and sources of the flows that have begun

    def flows() -> Iterator[Flow[Embeddings]]:
        for rows in table.rows():
            sourced = [pair for row in rows if (pair := _sourced(row, folder, drop, counts))]
            for is_text, group in groupby(sourced, key=lambda pair: isinstance(pair[1], str)):
                pairs = list(group)
                size = TEXTS if is_text else 1
                for start in range(0, len(pairs), size):
                    part = pairs[start : start + size]
                    waiting.append(part)
                    yield embed(runner.bundle, EmbedRequest([source for _, source in part], **settings))

    try:
        for answer in runner.map(flows()):
            for (row, source), vector in zip(waiting.popleft(), answer.vectors, strict=True):
                yield replace(row, vector=vector, meta=row.meta | getattr(source, "meta", {}))
    except InputError as error:
        ids = ", ".join(repr(row.id) for row, _ in (waiting[0] if waiting else [])[:SHOWN])
        raise BadRequest(f"{ids}: {error}" if ids else str(error)) from None


def _sourced(row: Row, folder: Path | None, drop: bool, counts: Counts) -> tuple[Row, str | bytes] | None:
    """The row, and what to embed for it; None if it has no source and is left out."""
    if row.original is not None:
        return row, row.original
    path = _file(folder, row.id)
    if path is None:
        if not drop:
            raise BadRequest(f"the item {row.id!r} has no source any more; expected its file in {folder}")
        counts.dropped.append(row.id)
        return None
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if row.meta.get("sha256") not in (None, digest):
        counts.changed += 1
        return replace(row, meta=row.meta | Picture(row.id, data, digest).meta), Thumbnailed(data)
    return row, data


def _batches(rows: Iterator[Row], counts: Counts, bar: "tqdm[None]") -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        counts.items += 1
        bar.update(1)
        if len(batch) == PAGE:
            yield batch
            batch = []
    if batch:
        yield batch
