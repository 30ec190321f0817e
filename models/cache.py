"""`RowCache`: rows of graphs, and values computed from them, by key. Bounded, thread-safe, counted.

A driver of flows owns it: `Runner` has one, and the service's `Engine` has one for all its bundles.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from threading import Lock
from typing import NamedTuple, TypeAlias

import numpy as np

from calmclip.models.flow import Arrays, Cached, CacheGet, CachePut, Call

Name: TypeAlias = tuple[str, str, bytes]  # owner, graph, fingerprint of the key
Counter: TypeAlias = Callable[[int, int], None]  # hits, misses


class Row(NamedTuple):
    """One row of a graph's answer, by output; or a value computed from rows, which counts as ``size`` rows."""

    outputs: Arrays
    size: int = 1


@dataclass(frozen=True)
class PartialCall:
    """A `Call` without its cached rows. ``feeds``: those of the other rows; None if every row is cached."""

    feeds: Arrays | None
    complete: Callable[[Arrays], Arrays]


class RowCache:
    """A least-recently-used cache of at most ``size`` rows. With 0 it holds no row.

    ``hits`` and ``misses`` count the requested rows. Memory grows with ``size``: a row of 512 float32 numbers takes
    2 KiB. The time of a look-up does not depend on the number of rows.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.hits = 0
        self.misses = 0
        self._rows: OrderedDict[Name, Row] = OrderedDict()
        self._held = 0
        self._lock = Lock()

    def __len__(self) -> int:
        """Rows held now."""
        return self._held

    def answer(self, owner: str, asked: CacheGet | CachePut, count: Counter | None = None) -> Cached:
        """Answer a flow over the bundle ``owner`` (a digest): the outputs of each cached row, by its key.

        It counts hits alone: a flow runs the other rows by a `Call`, and `split` counts those.
        """
        if isinstance(asked, CachePut):
            (name,) = _names(owner, asked.graph, (asked.key,))
            self._put(name, Row(asked.outputs, asked.size))
            return {}
        names = _names(owner, asked.graph, asked.keys)
        rows = self._known(names)
        self._count(sum(rows[name].size for name in names if name in rows), 0, count)
        return {key: rows[name].outputs for key, name in zip(asked.keys, names, strict=True) if name in rows}

    def split(self, owner: str, call: Call, count: Counter | None = None) -> PartialCall:
        """Take the cached rows out of ``call``, which has keys. ``complete`` takes the answer to the other rows, caches
        them, and returns all rows in the order of the call.

        The other rows keep their width, so a flow asks by `CacheGet` first, and pads what is left."""
        assert call.keys is not None
        names = _names(owner, call.graph, call.keys)
        rows = self._known(names)
        missing = [i for i, name in enumerate(names) if name not in rows]
        self._count(len(names) - len(missing), len(missing), count)
        feeds = {name: array[missing] for name, array in call.feeds.items()} if missing else None
        return PartialCall(feeds, partial(self._complete, names, rows, missing))

    def _complete(self, names: Sequence[Name], rows: dict[Name, Row], missing: Sequence[int], new: Arrays) -> Arrays:
        for at, i in enumerate(missing):
            # a copy: a row must not keep the whole batch it came with in memory
            rows[names[i]] = Row({output: array[at].copy() for output, array in new.items()})
            self._put(names[i], rows[names[i]])
        return _stack([rows[name] for name in names])

    def _count(self, hits: int, misses: int, count: Counter | None) -> None:
        with self._lock:
            self.hits += hits
            self.misses += misses
        if count:
            count(hits, misses)

    def _known(self, names: Sequence[Name]) -> dict[Name, Row]:
        with self._lock:
            cached = {}
            for name in names:
                if (row := self._rows.get(name)) is not None:
                    self._rows.move_to_end(name)
                    cached[name] = row
            return cached

    def _put(self, name: Name, row: Row) -> None:
        if row.size > self.size:
            return
        with self._lock:
            if before := self._rows.pop(name, None):
                self._held -= before.size
            self._rows[name] = row
            self._held += row.size
            while self._held > self.size:
                self._held -= self._rows.popitem(last=False)[1].size


def _names(owner: str, graph: str, keys: Sequence[str]) -> list[Name]:
    """Keys as fingerprints: a text may be long, and the cache may hold hundreds of thousands."""
    return [(owner, graph, blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()) for key in keys]


def _stack(rows: Sequence[Row]) -> Arrays:
    return {output: np.stack([row.outputs[output] for row in rows]) for output in rows[0].outputs}
