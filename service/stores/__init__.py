"""FAMILY stores: vectors + metadata -> durable, filtered nearest neighbours, over an existing engine.

A store is synchronous, and several threads may call it. `calmclip.service.collections` has one writer per collection.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from calmclip.models.errors import BadRequest, CollectionError
from calmclip.models.flow import Array
from calmclip.models.registry import Registry

BATCH_ROWS = 4096  # of `Table.rows`, at most; fewer if their originals are large,
BATCH_BYTES = 64 << 20  # so that a batch has about so many bytes


@dataclass(frozen=True)
class Info:
    """A collection's properties, stored with its vectors. ``digest``: of what embedded them; "" if that was another
    program's model. ``dim``: the length of the vectors, which may be a prefix of what the bundle makes.

    ``originals``: whether the collection keeps the texts and pictures that were embedded.
    """

    name: str
    model: str
    digest: str
    dim: int
    created: str  # UTC, ISO 8601
    originals: bool = False

    @property
    def foreign(self) -> bool:
        """Whether no bundle can embed for it: its vectors come from a model of another program."""
        return not self.digest


@dataclass(frozen=True)
class Row:
    """``vector`` float32 [dim], a unit vector. ``original``: the embedded text, or the bytes of the picture's file.

    A collection without ``originals`` does not store the original. Only `Table.rows` returns originals.
    """

    id: str
    vector: Array
    meta: dict[str, Any] = field(default_factory=dict)
    original: str | bytes | None = None


@dataclass(frozen=True)
class Match:
    """``vector``: float32 [dim], on a page that was asked for vectors."""

    id: str
    meta: dict[str, Any]
    score: float = 0.0  # cosine; 0 on a page, which has no query
    vector: Array | None = None


@dataclass(frozen=True)
class Condition:
    """A condition on a top-level field of the metadata. A value of another type than the field's never matches, nor
    does a list, an object, null or a missing field, but for these operators:

    ``has`` takes a string, number or boolean, and matches a list with an equal element. ``exists`` takes a boolean;
    True matches every value but null, False matches null and a missing field.

    ``in`` and ``not_in`` take a tuple of strings, numbers and booleans; ``not_in`` matches a value of the type of one
    of them that equals none. ``contains`` takes a part of a string, the others one number or string.
    """

    field: str
    op: Literal["in", "not_in", "gt", "gte", "lt", "lte", "contains", "has", "exists"]
    value: Any


@dataclass(frozen=True)
class Group:
    """``or``: at least one of the filters holds; ``and``: all. A filter holds if all of its parts do."""

    op: Literal["or", "and"]
    filters: "tuple[tuple[Part, ...], ...]"


Part: TypeAlias = Condition | Group
Where: TypeAlias = Sequence[Part]  # all must hold


class Table(Protocol):
    """The vectors of one collection. A write is on disk when its call returns."""

    @property
    def info(self) -> Info: ...

    def upsert(self, rows: Sequence[Row]) -> None:
        """The ids are distinct. A row with an existing id replaces it."""

    def delete(self, ids: Sequence[str]) -> int:
        """The number of rows deleted."""

    def search(self, vector: Array, top_k: int, where: Where = ()) -> list[Match]:
        """The nearest rows by cosine that meet all conditions, best first. Scores are exact. In a large table, a few
        percent of the nearest rows may be missing."""

    def page(self, after: str | None, limit: int, vectors: bool = False) -> list[Match]:
        """Ordered by id, from the first id after ``after``."""

    def get(self, ids: Sequence[str], originals: bool = False) -> list[Row]:
        """The rows of these ids that exist, in any order; with their originals if asked for."""

    def count(self) -> int: ...

    def compact(self) -> None:
        """Merge the files of many small writes. Readers may go on, and answers do not change."""

    def rows(self, originals: bool = True) -> Iterator[list[Row]]:
        """All rows of one snapshot, in any order, with their originals unless they are not read; at most `BATCH_ROWS`
        at a time.

        The snapshot is taken at the first ``next``. Writers and compaction, also of other processes, do not disturb it.
        Close the iterator if you do not exhaust it: it holds the snapshot.
        """

    def verify(self) -> None:
        """Prove that the collection is whole. Raises `CollectionDamaged`, which names what is damaged."""


@runtime_checkable
class ExclusiveTable(Table, Protocol):
    """A table that no other process writes to, so a copy in memory stays correct.

    A *row number* identifies a row as long as its id exists; writes and compaction do not change it.
    """

    def row_numbers(self, ids: Sequence[str]) -> dict[str, int]:
        """id -> row number, for the ids that exist."""

    def fetch(self, row_numbers: Sequence[int]) -> list[Row]:
        """The rows that exist, in any order."""

    def scan(self, limit: int | None = None) -> Iterator[tuple[list[str], list[int], Array]]:
        """Ids, row numbers and vectors (float32 [N, dim]), some thousand rows at a time; of all rows or ``limit``."""


class Store(Protocol):
    """The collections at one location."""

    @property
    def shared(self) -> bool:
        """Whether other processes may write to it, so that every read may be outdated."""

    def names(self) -> list[str]: ...

    def create(self, info: Info) -> Table:
        """A new, empty table. The caller has checked that the name is free."""

    def replace(self, info: Info, rows: Iterable[Sequence[Row]]) -> Table:
        """Create a table of these rows, or put it in the place of the table ``info.name``, also of a damaged one.

        The ids are distinct. Readers see the old table until all rows are written. If ``rows`` raises, or the process
        ends, the old table stays as it was. No write to the old table may run meanwhile; a shared store lets the writes
        of other services wait, and they fail. ``rows`` may come from `Table.rows` of the old table.
        """

    def open(self, name: str) -> Table:
        """Equal to a table opened before, unless it was replaced. Cheap; `Table.verify` proves more.

        Raises `CollectionNotFound`, and `CollectionDamaged` for what is no table.
        """

    def drop(self, name: str) -> None:
        """Also drops a damaged table."""

    def close(self) -> None: ...


STORES: Registry[Callable[[str, bool], Store]] = Registry("stores", "calmclip.service.stores")  # location, read_only


def open_store(url: str, read_only: bool = False) -> Store:
    """``url``: KIND:LOCATION, for example ``lancedb:data/collections``.

    One process may write to a store that is not shared; it may be read beside that process. With ``read_only`` the
    store creates nothing, and every write raises `CollectionError`.

    Raises `BadRequest`, `UnknownName`, `StoreLocked` if another process writes to it, and the engine's errors.
    """
    kind, colon, location = url.partition(":")
    if not colon or not location:
        raise BadRequest(f"the store is {redacted(url)!r}; expected KIND:LOCATION, such as 'lancedb:data/collections'")
    return STORES.get(kind)(location, read_only)


def refuse_writes(read_only: bool) -> None:
    if read_only:
        raise CollectionError("the store was opened for reading; expected no write")


def redacted(url: str) -> str:
    """``url`` without user, password and options, for logs and answers."""
    return re.sub(r"//.*@", "//", url).partition("?")[0]
