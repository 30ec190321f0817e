"""`Quantized`: a table with a small copy of its vectors in memory, which proposes; the table's own vectors decide.

A search goes through three sieves, each over what the one before left: the sign of every component (one bit; Hamming
distance), then eight bits of every component, then cosine in float32 of vectors read from the table. Signs and ranges
are those of what the collection holds, pictures as a rule: components are taken from their mean, and a query by text,
which lies elsewhere in the space, is not clipped, for it stays float32.

Source: binary and scalar quantization with re-scoring, as vector stores do it; sizes here from tests/bench/search.py.
Memory: 9/8 bytes for a component and about 150 for an id; 100 000 x 512 take 73 MB.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from calmclip.models.flow import Array
from calmclip.service.stores import Condition, Found, OwnTable, Row

LEAST = 10_000  # rows; fewer are read whole in the same time
SHARE = 30  # one row in so many passes the first sieve,
PROPOSED = 64  # but so many for each hit that is wanted
READ = 2  # rows read from the table for each hit that is wanted,
READ_LEAST = 20  # but at least so many
MOST = 100  # hits; reading more rows by their ids is slower than a scan
RANGE = 0.999  # quantile of a component's size that becomes 127
SAMPLE = 20_000  # rows that ranges are taken from
STALE = 2  # a copy is made anew when so many times the rows were written that its ranges are from


class Quantized:
    """One writer at a time, any number of readers. ``most``: bytes of a copy; a larger table is searched as it is."""

    def __init__(self, table: OwnTable, most: int) -> None:
        self.info = table.info
        self._table = table
        self._most = most
        self._copy: _Copy | None = None
        self._renew()

    def upsert(self, rows: Sequence[Row]) -> None:
        with self._in_step():
            self._table.upsert(rows)
            if self._copy:
                ids = [row.id for row in rows]
                places = self._table.places(ids)
                self._copy.put(ids, [places[id_] for id_ in ids], np.stack([row.vector for row in rows]))

    def delete(self, ids: Sequence[str]) -> int:
        with self._in_step():
            there = self._table.delete(ids)
            if self._copy:
                self._copy.remove(ids)
        return there

    def search(self, vector: Array, top_k: int, where: Sequence[Condition] = ()) -> list[Found]:
        copy = self._copy
        if copy is None or where or top_k > MOST:
            return self._table.search(vector, top_k, where)
        rows = self._table.fetch(copy.nearest(vector, max(READ * top_k, READ_LEAST), PROPOSED * top_k))
        found = [Found(row.id, row.meta, float(row.vector @ vector)) for row in rows]
        return sorted(found, key=lambda one: -one.score)[:top_k]

    def page(self, after: str | None, limit: int) -> list[Found]:
        return self._table.page(after, limit)

    def count(self) -> int:
        return self._table.count()

    def compact(self) -> None:
        self._table.compact()
        self._renew()

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Nobody knows how far a write came that failed: the copy is given up, and `compact` makes another."""
        try:
            yield
        except Exception:
            self._copy = None
            raise

    def _renew(self) -> None:
        """A copy where none is and one should be, or where the one there has grown too far from its ranges."""
        rows = self._table.count()
        if rows < LEAST or rows * _row_bytes(self.info.dim) > self._most:
            self._copy = None
        elif self._copy is None or self._copy.stale:
            self._copy = _copied(self._table, rows)


def _copied(table: OwnTable, rows: int) -> "_Copy":
    sample = np.concatenate([vectors for *_, vectors in table.scan(SAMPLE)])
    copy = _Copy(sample.mean(axis=0), np.quantile(np.abs(sample - sample.mean(axis=0)), RANGE, axis=0), rows)
    for ids, places, vectors in table.scan():
        copy.put(ids, places, vectors)
    return copy


@dataclass
class _Arrays:
    """Columns of rows in the order in which they came; of the first ``used`` no bit changes but ``alive``'s."""

    signs: Array  # uint64 [D / 64, N]: a column of words at a time is how they are compared
    codes: Array  # int8 [N, D]
    alive: Array  # bool [N]
    places: Array  # int64 [N], of the table's rows
    used: int = 0
    dead: int = 0


class _Copy:
    """``mean``, ``size``: float32 [D], of the components. ``rows``: how many are expected."""

    def __init__(self, mean: Array, size: Array, rows: int) -> None:
        self._mean = mean.astype(np.float32)
        usual = len(size) ** -0.5  # of a unit vector's component: where all rows are one, later ones will differ
        self._step = (np.maximum(size, usual) / 127).astype(np.float32)
        self._expected = rows
        self._arrays = _arrays(rows + rows // 4, len(mean))
        self._at: dict[str, int] = {}
        self._writing = threading.Lock()

    @property
    def stale(self) -> bool:
        return self._arrays.used >= STALE * self._expected

    def put(self, ids: Sequence[str], places: Sequence[int], vectors: Array) -> None:
        """What was there under these ids is dead, and the new rows stand behind all others: readers need no lock."""
        with self._writing:
            arrays = self._grown(len(ids))
            centred = vectors - self._mean
            start, end = arrays.used, arrays.used + len(ids)
            arrays.signs[:, start:end] = _signs(centred)
            arrays.codes[start:end] = np.clip(np.rint(centred / self._step), -127, 127)
            arrays.alive[start:end] = True
            arrays.places[start:end] = places
            self._bury(arrays, ids)
            self._at.update(zip(ids, range(start, end), strict=True))
            arrays.used = end
            self._arrays = arrays

    def remove(self, ids: Sequence[str]) -> None:
        with self._writing:
            self._bury(self._arrays, ids)

    def nearest(self, vector: Array, wanted: int, proposed: int) -> list[int]:
        """``wanted`` places by eight bits, of ``proposed`` or more by one; a dead one is never among them."""
        arrays, used = self._arrays, self._arrays.used
        few = min(used, max(proposed, used // SHARE))
        apart = _apart(arrays.signs[:, :used], _signs(vector[None])[:, 0])
        if arrays.dead:
            apart[~arrays.alive[:used]] = np.iinfo(apart.dtype).max
        farthest = np.searchsorted(np.cumsum(np.bincount(apart)), few)  # faster than to sort out the first few
        rows = np.flatnonzero(apart <= farthest)
        rows = rows[arrays.alive[rows]]
        # not @: for so little work BLAS would wake its threads, and wait for them where cores are busy
        scores = np.vecdot(arrays.codes[rows].astype(np.float32), vector * self._step)
        if len(rows) > wanted:
            rows = rows[np.argpartition(-scores, wanted - 1)[:wanted]]
        places: list[int] = arrays.places[rows].tolist()
        return places

    def _bury(self, arrays: _Arrays, ids: Sequence[str]) -> None:
        for id_ in ids:
            if (row := self._at.pop(id_, None)) is not None:
                arrays.alive[row] = False
                arrays.dead += 1

    def _grown(self, more: int) -> _Arrays:
        """The arrays, or a larger copy of them."""
        old = self._arrays
        rows = old.used + more
        if rows <= len(old.alive):
            return old
        new = _arrays(rows + rows // 2, old.codes.shape[1])
        new.signs[:, : old.used] = old.signs[:, : old.used]
        new.codes[: old.used] = old.codes[: old.used]
        new.alive[: old.used] = old.alive[: old.used]
        new.places[: old.used] = old.places[: old.used]
        new.used, new.dead = old.used, old.dead
        return new


def _arrays(rows: int, dim: int) -> _Arrays:
    words = -(-dim // 64)
    signs, codes = np.zeros((words, rows), np.uint64), np.zeros((rows, dim), np.int8)
    return _Arrays(signs, codes, np.zeros(rows, bool), np.zeros(rows, np.int64))


def _row_bytes(dim: int) -> int:
    return dim + -(-dim // 64) * 8 + 9


def _signs(vectors: Array) -> Array:
    """float [N, D] -> uint64 [D / 64 rounded up, N], a bit for each component over 0."""
    rows, dim = vectors.shape
    bits = np.zeros((rows, -(-dim // 64) * 64), bool)
    bits[:, :dim] = vectors > 0
    return np.packbits(bits, axis=1).view(np.uint64).T


def _apart(signs: Array, query: Array) -> Array:
    """Hamming distances, uint16 [N]."""
    apart: Array = np.bitwise_count(signs[0] ^ query[0]).astype(np.uint16)
    for column, word in zip(signs[1:], query[1:], strict=True):
        apart += np.bitwise_count(column ^ word)
    return apart
