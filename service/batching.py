"""`Batcher`: merges compatible calls to one graph, runs them once, and splits the answer. Bounded.

Calls fit together when every feed has the same dtype and the same shape behind the first dimension: texts of
another length T wait for their own kind, so a merged answer holds the very rows a lone one would.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import NamedTuple, TypeAlias

import numpy as np

from models.errors import Overloaded
from models.flow import Array, Arrays

Signature: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]
Outputs: TypeAlias = dict[str, Array]


class Answer(NamedTuple):
    """Outputs by name, and the seconds the call waited and the graph ran."""

    outputs: Outputs
    queue_s: float
    infer_s: float


class _Entry:
    """One call in the queue; carries its own times and the future its caller waits on."""

    __slots__ = ("born", "done", "feeds", "rows", "signature")

    def __init__(self, feeds: Arrays, done: "asyncio.Future[Answer]") -> None:
        self.feeds = feeds
        self.done = done
        self.born = perf_counter()
        self.rows = _rows(feeds)
        self.signature: Signature = tuple((name, a.dtype.name, a.shape[1:]) for name, a in sorted(feeds.items()))


class Batcher:
    """The one door to a graph.

    ``max_size``, ``max_bytes``: rows, and bytes of feeds, in a merged run; one row always fits.
    ``max_wait_s``: how long the oldest call waits for company, and only while ``company()`` says that some may
    come. ``max_pending``: calls in the queue; more raise `Overloaded`. ``batch`` False: rows are no rows, every
    call runs alone.
    """

    def __init__(
        self,
        run: Callable[[Arrays], Outputs],
        *,
        batch: bool = True,
        max_size: int = 8,
        max_bytes: int = 8 << 20,
        max_wait_s: float = 0.002,
        max_pending: int = 64,
        company: Callable[[], bool] = lambda: False,
        observe: Callable[[int], None] = lambda rows: None,
        name: str = "graph",
    ) -> None:
        self.name = name
        self._run = run
        self._batch = batch
        self._max_size = max_size
        self._max_bytes = max_bytes
        self._max_wait_s = max_wait_s
        self._max_pending = max_pending
        self._company = company
        self._observe = observe
        self._queue: deque[_Entry] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"infer-{name}")
        self._worker: asyncio.Task[None] | None = None
        self._pace_s = 0.0  # smoothed seconds per call, for Retry-After

    @property
    def depth(self) -> int:
        """Calls that wait."""
        return len(self._queue)

    async def run(self, feeds: Arrays) -> Answer:
        """Raises `Overloaded` when the queue is full. A cancelled caller's call is dropped before it runs."""
        answers = [await self._one(piece) for piece in self._pieces(feeds)]
        if len(answers) == 1:
            return answers[0]
        outputs = {name: np.concatenate([a.outputs[name] for a in answers]) for name in answers[0].outputs}
        return Answer(outputs, sum(a.queue_s for a in answers), sum(a.infer_s for a in answers))

    async def close(self) -> None:
        if self._worker:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for entry in self._queue:
            entry.done.cancel()
        self._thread.shutdown(wait=True)

    def _pieces(self, feeds: Arrays) -> Iterator[Arrays]:
        """A call of many rows goes in pieces: others get between, and memory stays bounded."""
        rows, size = _rows(feeds), self._most(feeds)
        if not self._batch or rows <= size:
            yield feeds
            return
        for start in range(0, rows, size):
            yield {name: array[start : start + size] for name, array in feeds.items()}

    def _most(self, feeds: Arrays) -> int:
        """Rows in one run of calls like this."""
        row_bytes = sum(array.nbytes for array in feeds.values()) // max(1, _rows(feeds))
        return max(1, min(self._max_size, self._max_bytes // max(1, row_bytes)))

    async def _one(self, feeds: Arrays) -> Answer:
        if len(self._queue) >= self._max_pending:
            wait = max(1.0, self._pace_s * len(self._queue))
            raise Overloaded(
                f"{len(self._queue)} calls wait for {self.name} already, the most allowed; "
                f"try again in {math.ceil(wait)} s",
                retry_after=wait,
            )
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = loop.create_task(self._work(), name=f"batcher-{self.name}")
        entry = _Entry(feeds, loop.create_future())
        self._queue.append(entry)
        self._arrived.set()
        return await entry.done

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            await self._gather()
            entries = self._take()
            if not self._queue:
                self._arrived.clear()
            if not entries:
                continue
            start = perf_counter()
            try:
                outputs, infer_s = await loop.run_in_executor(self._thread, self._timed, _merge(entries))
            except Exception as error:
                for entry in entries:
                    if not entry.done.done():
                        entry.done.set_exception(error)
                continue
            end = perf_counter()
            self._observe(sum(entry.rows for entry in entries))
            spent = (end - start) / len(entries)
            self._pace_s = spent if not self._pace_s else 0.8 * self._pace_s + 0.2 * spent
            at = 0
            for entry in entries:
                mine = outputs if len(entries) == 1 else {k: v[at : at + entry.rows] for k, v in outputs.items()}
                at += entry.rows
                if not entry.done.done():
                    # waiting for the thread is waiting too: queue + infer is all of it
                    entry.done.set_result(Answer(mine, end - entry.born - infer_s, infer_s))

    async def _gather(self) -> None:
        """Waits for company, but no longer than the oldest call may, nor when none is due."""
        if not self._batch or not self._max_wait_s or not self._queue:
            return
        until = self._queue[0].born + self._max_wait_s
        while self._company() and sum(e.rows for e in self._queue) < self._most(self._queue[0].feeds):
            left = until - perf_counter()
            if left <= 0:
                return
            await asyncio.sleep(min(left, 0.0005))

    def _take(self) -> list[_Entry]:
        """The oldest call that somebody waits for, and those that fit with it, in order; the rest stays."""
        while self._queue and self._queue[0].done.done():
            self._queue.popleft()
        if not self._queue:
            return []
        first = self._queue.popleft()
        taken, rows = [first], first.rows
        if self._batch:
            most = self._most(first.feeds)
            for entry in [e for e in self._queue if e.signature == first.signature and not e.done.done()]:
                if rows + entry.rows > most:
                    break
                taken.append(entry)
                rows += entry.rows
            chosen = set(map(id, taken))
            self._queue = deque(e for e in self._queue if id(e) not in chosen)
        return taken

    def _timed(self, feeds: Arrays) -> tuple[Outputs, float]:
        start = perf_counter()
        return self._run(feeds), perf_counter() - start


def _rows(feeds: Arrays) -> int:
    return next((int(array.shape[0]) for array in feeds.values() if array.ndim), 1)


def _merge(entries: list[_Entry]) -> Arrays:
    if len(entries) == 1:
        return entries[0].feeds
    return {name: np.concatenate([e.feeds[name] for e in entries]) for name in entries[0].feeds}
