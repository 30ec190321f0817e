"""FAMILY stores: vectors + metadata -> durable, filtered nearest neighbours, over an engine that exists already.

A store is synchronous and may be called from several threads; `calmclip.service.collections` sees to it that each
collection has one writer.
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
    """What a collection is, kept beside its vectors. ``digest``: of the bundle whose vectors it holds."""

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
class Found:
    id: str
    meta: dict[str, Any]
    score: float = 0.0  # cosine; 0 where nothing was searched


@dataclass(frozen=True)
class Condition:
    """On a top-level field of the metadata. Values of another type than the field's never match.

    ``in`` takes a tuple of strings, numbers and booleans; the others one number or string.
    """

    field: str
    op: Literal["in", "gt", "gte", "lt", "lte"]
    value: Any


class Table(Protocol):
    """The vectors of one collection. A write is on disk when its call returns."""

    @property
    def info(self) -> Info: ...

    def upsert(self, rows: Sequence[Row]) -> None:
        """Rows with distinct ids; an id already there is replaced."""

    def delete(self, ids: Sequence[str]) -> int:
        """How many there were."""

    def search(self, vector: Array, top_k: int, where: Sequence[Condition] = ()) -> list[Found]:
        """Nearest by cosine among the rows on which all conditions hold, best first. Scores are exact; among many rows
        a few in a hundred hits may be missed."""

    def page(self, after: str | None, limit: int) -> list[Found]:
        """By id, from the first one behind ``after``."""

    def count(self) -> int: ...

    def compact(self) -> None:
        """Tidy up what many small writes left; readers and answers are not disturbed."""


@runtime_checkable
class OwnTable(Table, Protocol):
    """One that nobody else writes to, so that what is kept of it in memory stays true.

    A row's *place* is a number that is its own as long as its id is there, whatever is written or tidied up.
    """

    def places(self, ids: Sequence[str]) -> dict[str, int]:
        """Of those that are there."""

    def fetch(self, places: Sequence[int]) -> list[Row]:
        """The rows that are there, in any order."""

    def scan(self, most: int | None = None) -> Iterator[tuple[list[str], list[int], Array]]:
        """Ids, places and vectors, float32 [N, dim], of all rows, a few thousand at a time; or of ``most``."""


class Store(Protocol):
    """Collections at one place."""

    @property
    def shared(self) -> bool:
        """Whether other processes may write there too, so that nothing read from it stays true."""

    def names(self) -> list[str]: ...

    def create(self, info: Info) -> Table:
        """An empty one. The name is free; the caller has checked."""

    def open(self, name: str) -> Table:
        """Equal to one opened before as long as it is the same. Raises `CollectionNotFound` where ``shared``."""

    def drop(self, name: str) -> None: ...

    def close(self) -> None: ...


STORES: Registry[Callable[[str], Store]] = Registry("stores", "calmclip.service.stores")


def open_store(url: str) -> Store:
    """``KIND:PLACE``, for example ``lancedb:data/collections``. Raises `BadRequest`, `UnknownName`, and what the
    engine is asked in vain for."""
    kind, colon, place = url.partition(":")
    if not colon or not place:
        raise BadRequest(f"the store {shown(url)!r} is not KIND:PLACE; for example 'lancedb:data/collections'")
    return STORES.get(kind)(place)


def shown(url: str) -> str:
    """``url`` for logs and answers: without user, password and options."""
    return re.sub(r"//.*@", "//", url).partition("?")[0]
