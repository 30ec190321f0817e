"""FAMILY stores: vectors + metadata -> durable, filtered nearest neighbours, over an existing engine.

A store is synchronous, and several threads may call it. `calmclip.service.collections` has one writer per collection.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array
from calmclip.models.registry import Registry


@dataclass(frozen=True)
class Info:
    """A collection's properties, stored with its vectors. ``digest``: of the bundle that made the vectors."""

    name: str
    model: str
    digest: str
    dim: int
    created: str  # UTC, ISO 8601


@dataclass(frozen=True)
class Row:
    """``vector`` float32 [dim], a unit vector."""

    id: str
    vector: Array
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    id: str
    meta: dict[str, Any]
    score: float = 0.0  # cosine; 0 on a page, which has no query


@dataclass(frozen=True)
class Condition:
    """A condition on a top-level field of the metadata. A value of another type than the field's never matches.

    ``in`` takes a tuple of strings, numbers and booleans; the other operators take one number or string.
    """

    field: str
    op: Literal["in", "gt", "gte", "lt", "lte"]
    value: Any


class Table(Protocol):
    """The vectors of one collection. A write is on disk when its call returns."""

    @property
    def info(self) -> Info: ...

    def upsert(self, rows: Sequence[Row]) -> None:
        """The ids are distinct. A row with an existing id replaces it."""

    def delete(self, ids: Sequence[str]) -> int:
        """The number of rows deleted."""

    def search(self, vector: Array, top_k: int, where: Sequence[Condition] = ()) -> list[Match]:
        """The nearest rows by cosine that meet all conditions, best first. Scores are exact. In a large table, a few
        percent of the nearest rows may be missing."""

    def page(self, after: str | None, limit: int) -> list[Match]:
        """Ordered by id, from the first id after ``after``."""

    def count(self) -> int: ...

    def compact(self) -> None:
        """Merge the files of many small writes. Readers may go on, and answers do not change."""


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

    def open(self, name: str) -> Table:
        """Equal to a table opened before, unless it was replaced. Raises `CollectionNotFound` if ``shared``."""

    def drop(self, name: str) -> None: ...

    def close(self) -> None: ...


STORES: Registry[Callable[[str], Store]] = Registry("stores", "calmclip.service.stores")


def open_store(url: str) -> Store:
    """``url``: KIND:LOCATION, for example ``lancedb:data/collections``.

    Raises `BadRequest`, `UnknownName`, and the engine's errors.
    """
    kind, colon, location = url.partition(":")
    if not colon or not location:
        raise BadRequest(f"the store is {redacted(url)!r}; expected KIND:LOCATION, such as 'lancedb:data/collections'")
    return STORES.get(kind)(location)


def redacted(url: str) -> str:
    """``url`` without user, password and options, for logs and answers."""
    return re.sub(r"//.*@", "//", url).partition("?")[0]
