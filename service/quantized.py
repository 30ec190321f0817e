"""`QuantizedTable`: a table with a quantized copy of its vectors in memory. The copy selects candidates; the table's
own float32 vectors decide.

A search has three passes, each over the rows that the previous pass left: the sign bit of every component (Hamming
distance), then 8-bit components, then the exact cosine of float32 vectors read from the table. Components are centred
on the mean of a sample of the collection. A query is not quantized, so a text, whose vector lies elsewhere in the space
than pictures', is not clipped.

Source: binary and scalar quantization with re-scoring, as in other vector stores; the sizes are measured by
tests/bench/search.py. Memory: 9/8 bytes per component and about 150 bytes per id; 100 000 x 512 take 73 MB.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from calmclip.models.flow import Array
from calmclip.service.stores import ExclusiveTable, Match, Row, Where

MIN_ROWS = 10_000  # a scan of fewer rows takes the same time
CANDIDATE_SHARE = 30  # the sign bits keep one row in so many,
CANDIDATES_PER_HIT = 64  # and at least so many per hit
READS_PER_HIT = 2  # rows read from the table per hit,
MIN_READS = 20  # and at least so many
MAX_TOP_K = 100  # to read more rows by number is slower than a scan
RANGE_QUANTILE = 0.999  # of a component's magnitude; the quantile becomes 127
SAMPLE_ROWS = 20_000  # that mean and ranges are computed from
STALE_GROWTH = 2  # a copy is rebuilt when it has so many times the rows that it was built for


class QuantizedTable:
    """One writer at a time, any number of readers. ``max_bytes``: a table whose copy would be larger has none."""

    def __init__(self, table: ExclusiveTable, max_bytes: int) -> None:
        self.info = table.info
        self._table = table
        self._max_bytes = max_bytes
        self._copy: _Copy | None = None
        self._refresh()

    def upsert(self, rows: Sequence[Row]) -> None:
        with self._consistently():
            self._table.upsert(rows)
            if self._copy:
                ids = [row.id for row in rows]
                numbers = self._table.row_numbers(ids)
                self._copy.upsert(ids, [numbers[id_] for id_ in ids], np.stack([row.vector for row in rows]))

    def delete(self, ids: Sequence[str]) -> int:
        with self._consistently():
            count = self._table.delete(ids)
            if self._copy:
                self._copy.delete(ids)
        return count

    def search(self, vector: Array, top_k: int, where: Where = ()) -> list[Match]:
        copy = self._copy
        if copy is None or where or top_k > MAX_TOP_K:
            return self._table.search(vector, top_k, where)
        numbers = copy.nearest(vector, max(READS_PER_HIT * top_k, MIN_READS), CANDIDATES_PER_HIT * top_k)
        matches = [Match(row.id, row.meta, float(row.vector @ vector)) for row in self._table.fetch(numbers)]
        return sorted(matches, key=lambda match: -match.score)[:top_k]

    def page(self, after: str | None, limit: int, vectors: bool = False) -> list[Match]:
        return self._table.page(after, limit, vectors)

    def get(self, ids: Sequence[str], originals: bool = False) -> list[Row]:
        return self._table.get(ids, originals)

    def count(self) -> int:
        return self._table.count()

    def compact(self) -> None:
        self._table.compact()
        self._refresh()

    def scan(self, limit: int | None = None) -> Iterator[tuple[list[str], list[int], Array]]:
        return self._table.scan(limit)

    def rows(self, originals: bool = True) -> Iterator[list[Row]]:
        return self._table.rows(originals)

    def verify(self) -> None:
        self._table.verify()

    @contextmanager
    def _consistently(self) -> Iterator[None]:
        """Drops the copy if a write fails, because the write may be half done. `compact` builds a new copy."""
        try:
            yield
        except Exception:
            self._copy = None
            raise

    def _refresh(self) -> None:
        """Build a copy if there should be one and it is missing or stale; drop it if there should be none."""
        rows = self._table.count()
        if rows < MIN_ROWS or rows * _row_bytes(self.info.dim) > self._max_bytes:
            self._copy = None
        elif self._copy is None or self._copy.stale:
            self._copy = _build(self._table, rows)


def _build(table: ExclusiveTable, rows: int) -> "_Copy":
    sample = np.concatenate([vectors for *_, vectors in table.scan(SAMPLE_ROWS)])
    mean = sample.mean(axis=0)
    copy = _Copy(mean, np.quantile(np.abs(sample - mean), RANGE_QUANTILE, axis=0), rows)
    for ids, numbers, vectors in table.scan():
        copy.upsert(ids, numbers, vectors)
    return copy


@dataclass
class _Arrays:
    """Rows in the order of arrival. Of the first ``used`` rows, only ``alive`` changes."""

    signs: Array  # uint64 [D / 64, N]: word by word, as they are compared
    codes: Array  # int8 [N, D]
    alive: Array  # bool [N]
    numbers: Array  # int64 [N], the table's row numbers
    used: int = 0
    dead: int = 0


class _Copy:
    """``mean`` and ``magnitude``: float32 [D], per component. ``rows``: the expected number of rows."""

    def __init__(self, mean: Array, magnitude: Array, rows: int) -> None:
        self._mean = mean.astype(np.float32)
        typical = len(magnitude) ** -0.5  # of a unit vector: if all sampled rows are equal, later rows will differ
        self._step = (np.maximum(magnitude, typical) / 127).astype(np.float32)
        self._expected = rows
        self._arrays = _arrays(rows + rows // 4, len(mean))
        self._index: dict[str, int] = {}  # id -> row of the arrays
        self._lock = threading.Lock()  # of writers

    @property
    def stale(self) -> bool:
        return self._arrays.used >= STALE_GROWTH * self._expected

    def upsert(self, ids: Sequence[str], numbers: Sequence[int], vectors: Array) -> None:
        """Old rows of these ids die and the new rows are appended, so readers need no lock."""
        with self._lock:
            arrays = self._with_room(len(ids))
            centred = vectors - self._mean
            start, end = arrays.used, arrays.used + len(ids)
            arrays.signs[:, start:end] = _signs(centred)
            arrays.codes[start:end] = np.clip(np.rint(centred / self._step), -127, 127)
            arrays.alive[start:end] = True
            arrays.numbers[start:end] = numbers
            self._kill(arrays, ids)
            self._index.update(zip(ids, range(start, end), strict=True))
            arrays.used = end
            self._arrays = arrays

    def delete(self, ids: Sequence[str]) -> None:
        with self._lock:
            self._kill(self._arrays, ids)

    def nearest(self, vector: Array, reads: int, candidates: int) -> list[int]:
        """Row numbers of the ``reads`` nearest by 8-bit components, among the nearest ``candidates`` or more by sign
        bits. A dead row is never among them."""
        arrays, used = self._arrays, self._arrays.used
        candidates = min(used, max(candidates, used // CANDIDATE_SHARE))
        distances = _hamming(arrays.signs[:, :used], _signs(vector[None])[:, 0])
        if arrays.dead:
            distances[~arrays.alive[:used]] = np.iinfo(distances.dtype).max
        limit = np.searchsorted(np.cumsum(np.bincount(distances)), candidates)  # faster than a partition
        rows = np.flatnonzero(distances <= limit)
        rows = rows[arrays.alive[rows]]
        # not @: for so little work BLAS would wake its threads, and wait for them if the cores are busy
        scores = np.vecdot(arrays.codes[rows].astype(np.float32), vector * self._step)
        if len(rows) > reads:
            rows = rows[np.argpartition(-scores, reads - 1)[:reads]]
        numbers: list[int] = arrays.numbers[rows].tolist()
        return numbers

    def _kill(self, arrays: _Arrays, ids: Sequence[str]) -> None:
        for id_ in ids:
            if (row := self._index.pop(id_, None)) is not None:
                arrays.alive[row] = False
                arrays.dead += 1

    def _with_room(self, more: int) -> _Arrays:
        """The arrays, or a larger copy of them, with room for ``more`` rows."""
        old = self._arrays
        rows = old.used + more
        if rows <= len(old.alive):
            return old
        new = _arrays(rows + rows // 2, old.codes.shape[1])
        new.signs[:, : old.used] = old.signs[:, : old.used]
        for name in ("codes", "alive", "numbers"):
            getattr(new, name)[: old.used] = getattr(old, name)[: old.used]
        new.used, new.dead = old.used, old.dead
        return new


def _arrays(rows: int, dim: int) -> _Arrays:
    signs, codes = np.zeros((-(-dim // 64), rows), np.uint64), np.zeros((rows, dim), np.int8)
    return _Arrays(signs, codes, np.zeros(rows, bool), np.zeros(rows, np.int64))


def _row_bytes(dim: int) -> int:
    return dim + -(-dim // 64) * 8 + 9


def _signs(vectors: Array) -> Array:
    """float [N, D] -> uint64 [D / 64 rounded up, N], one bit per component: 1 if it is positive."""
    rows, dim = vectors.shape
    bits = np.zeros((rows, -(-dim // 64) * 64), bool)
    bits[:, :dim] = vectors > 0
    return np.packbits(bits, axis=1).view(np.uint64).T


def _hamming(signs: Array, query: Array) -> Array:
    """Hamming distances, uint16 [N]."""
    distances: Array = np.bitwise_count(signs[0] ^ query[0]).astype(np.uint16)
    for column, word in zip(signs[1:], query[1:], strict=True):
        distances += np.bitwise_count(column ^ word)
    return distances
