"""`Memory`: rows of graphs, and what was made of them, by key. Bounded, safe between threads, counted.

It belongs to whatever drives flows: `Runner` has one, the service's `Engine` has one for all its bundles.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from threading import Lock
from typing import NamedTuple, TypeAlias

import numpy as np

from calmclip.models.flow import Arrays, Call, Keep, Recall

Name: TypeAlias = tuple[str, str, bytes]  # owner, graph, fingerprint of the key
Counter: TypeAlias = Callable[[int, int], None]  # hits, misses


class Row(NamedTuple):
    """One row of a graph's answer, by output; or what was made of several, and takes the place of ``size``."""

    outputs: Arrays
    size: int = 1


@dataclass(frozen=True)
class Partial:
    """A `Call` of which some rows are known. ``feeds``: of the others; None where every row is known."""

    feeds: Arrays | None
    complete: Callable[[Arrays], Arrays]


class Memory:
    """Least recently used rows, at most ``size`` of them. 0: nothing is remembered.

    ``hits`` and ``misses`` count the rows that were asked for. Memory grows with ``size``: a row of 512 float32 numbers
    takes 2 KiB. Look-ups take the same time however many rows are held.
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

    def answer(self, owner: str, asked: Recall | Keep, count: Counter | None = None) -> Arrays | None:
        """What a flow over the bundle ``owner`` (a digest) asks of its driver: the outputs where all rows are known."""
        if isinstance(asked, Keep):
            (name,) = _names(owner, asked.graph, (asked.key,))
            self._put(name, Row(asked.outputs, asked.size))
            return None
        names = _names(owner, asked.graph, asked.keys)
        rows = self._known(names)
        if len(rows) < len(set(names)):
            return None
        self._count(sum(rows[name].size for name in names), 0, count)
        return _stack([rows[name] for name in names])

    def split(self, owner: str, call: Call, count: Counter | None = None) -> Partial:
        """``call``, which has keys, without the rows that are known. ``complete`` takes the answer to the rest, keeps
        its rows, and gives all of them in the order of the call."""
        assert call.keys is not None
        names = _names(owner, call.graph, call.keys)
        rows = self._known(names)
        missing = [i for i, name in enumerate(names) if name not in rows]
        self._count(len(names) - len(missing), len(missing), count)
        feeds = {name: array[missing] for name, array in call.feeds.items()} if missing else None
        return Partial(feeds, partial(self._complete, names, rows, missing))

    def _complete(self, names: Sequence[Name], rows: dict[Name, Row], missing: Sequence[int], found: Arrays) -> Arrays:
        for at, i in enumerate(missing):
            # a copy: a row must not keep the whole batch it came with in memory
            rows[names[i]] = Row({output: array[at].copy() for output, array in found.items()})
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
            found = {}
            for name in names:
                if (row := self._rows.get(name)) is not None:
                    self._rows.move_to_end(name)
                    found[name] = row
            return found

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
    """A key's fingerprint: a text may be long, and hundreds of thousands are held."""
    return [(owner, graph, blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()) for key in keys]


def _stack(rows: Sequence[Row]) -> Arrays:
    return {output: np.stack([row.outputs[output] for row in rows]) for output in rows[0].outputs}
