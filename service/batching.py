"""`Batcher`: merges compatible calls to one graph, runs them once, and splits the answer. Its queue is bounded.

Two calls are compatible if every feed has the same dtype and the same shape after the first dimension. Texts of another
length T are not, so merging adds no padding. With an INT8 bundle a merged row equals a lone one bit by bit; in float it
may differ in the last bit, because a product of one row sums in another order. Merging makes no call fail: if a merged
run fails, each of its calls runs again alone.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import inf
from threading import Lock
from time import perf_counter
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from calmclip.models.errors import BundleInvalid, CalmclipError, DeadlineExceeded, InputError, Overloaded
from calmclip.models.flow import Array, Arrays
from calmclip.service.statistics import Statistics
from calmclip.service.throughput import Throughput

Signature: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]
Outputs: TypeAlias = dict[str, Array]
# Why a batch was released: it was full; its oldest call had waited `max_wait_s`; no other request was in flight; the
# service was draining; the call runs alone after its merged run failed.
Release: TypeAlias = Literal["full", "timeout", "idle", "drain", "apart"]
RELEASES: tuple[Release, ...] = ("full", "timeout", "idle", "drain", "apart")

POLL_S = 0.0005


class Answer(NamedTuple):
    """Outputs by name, seconds in the queue and in the graph, and the rows of the largest run that served the call."""

    outputs: Outputs
    queue_s: float
    infer_s: float
    rows: int


class _Entry:
    """One call in the queue. ``done``: the future on which its caller waits. ``until``: its deadline."""

    __slots__ = ("born", "done", "feeds", "rows", "signature", "until")

    def __init__(self, feeds: Arrays, done: "asyncio.Future[Answer]", until: float) -> None:
        self.feeds = feeds
        self.done = done
        self.until = until
        self.born = perf_counter()
        self.rows = _rows(feeds)
        self.signature: Signature = tuple((name, a.dtype.name, a.shape[1:]) for name, a in sorted(feeds.items()))


class Batcher:
    """All runs of one graph go through its batcher.

    ``max_size``, ``max_bytes``: most rows, and bytes of feeds, in one run; one row always fits.
    ``max_wait_s``: how long the oldest call waits for more calls, and only while ``concurrent()`` says that other
    requests are in flight. ``max_pending``: most calls in the queue; one more raises `Overloaded`. ``batch`` False: the
    first dimension does not count rows, so every call runs alone. ``observe`` gets the rows of each run that gave an
    answer, and why it was released.
    """

    def __init__(
        self,
        run: Callable[[Arrays], Outputs],
        *,
        batch: bool = True,
        max_size: int = 8,
        max_bytes: int = 7 << 19,
        max_wait_s: float = 0.002,
        max_pending: int = 64,
        concurrent: Callable[[], bool] = lambda: False,
        observe: Callable[[int, Release], None] = lambda rows, release: None,
        name: str = "graph",
    ) -> None:
        self.name = name
        self.statistics = Statistics()
        self._run = run
        self._batch = batch
        self._max_size = max_size
        self._max_bytes = max_bytes
        self._max_wait_s = max_wait_s
        self._max_pending = max_pending
        self._concurrent = concurrent
        self._observe = observe
        self._queue: deque[_Entry] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"infer-{name}")
        self._turn = Lock()  # held while the graph runs
        self._worker: asyncio.Task[None] | None = None
        self._throughput = Throughput()
        self._draining = False
        self._closed = False

    @property
    def depth(self) -> int:
        """Calls in the queue."""
        return len(self._queue)

    @property
    def full(self) -> bool:
        """Whether `run` would refuse one more call."""
        return len(self._queue) >= self._max_pending

    async def run(self, feeds: Arrays, *, until: float = inf) -> Answer:
        """``until``: a deadline on `perf_counter`; a call that is still in the queue then does not run.

        Raises `Overloaded` if the queue is full, `DeadlineExceeded`, what the graph raises, and `BundleInvalid` if the
        answer does not have one row per requested row. If the caller is cancelled, its call is dropped.
        """
        start = perf_counter()
        try:
            answers = [await self._enqueue(piece, until) for piece in self._pieces(feeds)]
        except Exception:
            self.statistics.broke(perf_counter() - start)
            raise
        queue_s, infer_s = sum(a.queue_s for a in answers), sum(a.infer_s for a in answers)
        self.statistics.answered(perf_counter() - start, queue_s)
        if len(answers) == 1:
            return answers[0]
        outputs = {name: np.concatenate([a.outputs[name] for a in answers]) for name in answers[0].outputs}
        return Answer(outputs, queue_s, infer_s, max(a.rows for a in answers))

    def run_here(self, feeds: Arrays) -> Answer | None:
        """Run in the calling thread, which must not be the event loop's.

        None if the caller must use `run` instead: the graph is busy, other calls wait or may come, the call needs more
        than one run, or the batcher is closed. Raises what the graph raises, and `BundleInvalid` as `run` does.
        """
        fits = not self._batch or _rows(feeds) <= self._most(feeds)
        if not fits or self._closed or self._queue or self._concurrent() or not self._turn.acquire(blocking=False):
            return None
        start = perf_counter()
        try:
            try:
                outputs, infer_s = self._timed(feeds)
            finally:
                self._turn.release()
            rows = self._checked(outputs, _rows(feeds), "idle")
        except Exception:
            self.statistics.broke(perf_counter() - start)
            raise
        self.statistics.ran(rows, infer_s)
        self.statistics.answered(perf_counter() - start, 0.0)
        return Answer(outputs, 0.0, infer_s, rows)

    def drain(self) -> None:
        """From now on no call waits for more calls."""
        self._draining = True

    async def close(self) -> None:
        """Run the calls in the queue, then end."""
        self._draining = self._closed = True
        self._arrived.set()
        if self._worker:
            await self._worker
        self._thread.shutdown(wait=True)

    def _pieces(self, feeds: Arrays) -> Iterator[Arrays]:
        """Split a call of many rows, so that other calls run in between and memory stays bounded."""
        rows, size = _rows(feeds), self._most(feeds)
        if not self._batch or rows <= size:
            yield feeds
            return
        for start in range(0, rows, size):
            yield {name: array[start : start + size] for name, array in feeds.items()}

    def _most(self, feeds: Arrays) -> int:
        """Most rows in one run of such calls."""
        row_bytes = sum(array.nbytes for array in feeds.values()) // max(1, _rows(feeds))
        return max(1, min(self._max_size, self._max_bytes // max(1, row_bytes)))

    async def _enqueue(self, feeds: Arrays, until: float) -> Answer:
        if self.full:
            wait = self._throughput.retry_after_s
            raise Overloaded(
                f"{len(self._queue)} calls wait for {self.name}, the most allowed; try again in {wait:.0f} s",
                retry_after=wait,
            )
        if self._closed:
            raise Overloaded(f"{self.name} has just been unloaded; try again in a second", reason="replaced")
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = loop.create_task(self._work(), name=f"batcher-{self.name}")
        entry = _Entry(feeds, loop.create_future(), until)
        self._queue.append(entry)
        self._arrived.set()
        self._throughput.begin()
        try:
            return await entry.done
        finally:
            self._throughput.end(finished=not entry.done.cancelled())

    async def _work(self) -> None:
        while self._queue or not self._closed:
            await self._arrived.wait()
            while not self._turn.acquire(blocking=False):  # seldom: `run_here` is running
                await asyncio.sleep(POLL_S)
            try:
                release = await self._gather()
                entries = self._take()
                if not self._queue and not self._closed:
                    self._arrived.clear()
                if entries:
                    await self._serve(entries, release)
            finally:
                self._turn.release()

    async def _serve(self, entries: list[_Entry], release: Release) -> None:
        """Run the calls together and hand out their rows. If that fails and one call may be the cause: each alone."""
        try:
            await self._run_once(entries, release)
        except Exception as error:
            if len(entries) > 1 and _may_be_due_to_one_call(error):
                for entry in entries:
                    if not self._is_over(entry):
                        await self._serve([entry], "apart")
                return
            for entry in entries:
                if not entry.done.done():
                    entry.done.set_exception(error)

    async def _run_once(self, entries: list[_Entry], release: Release) -> None:
        loop = asyncio.get_running_loop()
        start = perf_counter()
        feeds = _merge(entries)
        merge_s = perf_counter() - start
        outputs, infer_s = await loop.run_in_executor(self._thread, self._timed, feeds)
        end = perf_counter()
        rows = self._checked(outputs, sum(entry.rows for entry in entries), release)
        at = 0
        for entry in entries:
            part = outputs if len(entries) == 1 else {k: v[at : at + entry.rows] for k, v in outputs.items()}
            at += entry.rows
            if not entry.done.done():
                # The wait for the thread counts as queue, so queue + infer is all of the call's time.
                entry.done.set_result(Answer(part, end - entry.born - infer_s, infer_s, rows))
        self.statistics.ran(rows, infer_s, merge_s, perf_counter() - end)

    def _checked(self, outputs: Outputs, rows: int, release: Release) -> int:
        """-> ``rows``, after the answer of a run was checked and counted."""
        if self._batch:
            _check_rows(self.name, outputs, rows)
        self._observe(rows, release)
        return rows

    async def _gather(self) -> Release:
        """Wait for more calls while other requests are in flight and the oldest call may wait. -> why it ended."""
        while True:
            self._drop_over()
            if not self._queue or self._full():
                return "full"
            if self._draining:
                return "drain"
            if not self._max_wait_s or not self._concurrent():
                return "idle"
            wait_s = self._queue[0].born + self._max_wait_s - perf_counter()
            if wait_s <= 0:
                return "timeout"
            await asyncio.sleep(min(wait_s, POLL_S))

    def _full(self) -> bool:
        """Whether the oldest call and those compatible with it fill one run."""
        first = self._queue[0]
        return not self._batch or sum(e.rows for e in self._compatible(first)) >= self._most(first.feeds)

    def _compatible(self, first: _Entry) -> Iterator[_Entry]:
        """The calls in the queue that are compatible with ``first``, and itself."""
        return (e for e in self._queue if e.signature == first.signature and not e.done.done())

    def _drop_over(self) -> None:
        """Drop calls that are over from the head of the queue."""
        while self._queue and self._is_over(self._queue[0]):
            self._queue.popleft()

    def _is_over(self, entry: _Entry) -> bool:
        """Whether its caller no longer waits. Past its deadline the caller gets `DeadlineExceeded`."""
        if not entry.done.done() and entry.until < perf_counter():
            entry.done.set_exception(DeadlineExceeded(f"the deadline passed while waiting for {self.name}"))
        return entry.done.done()

    def _take(self) -> list[_Entry]:
        """Take the oldest call that is not over, and the calls that fit into the same run, in order."""
        self._drop_over()
        if not self._queue:
            return []
        first = self._queue.popleft()
        taken, rows = [first], first.rows
        if self._batch:
            most = self._most(first.feeds)
            for entry in [e for e in self._compatible(first) if e.until >= perf_counter()]:
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


def _may_be_due_to_one_call(error: Exception) -> bool:
    """Whether the other calls may succeed alone: not if the graph does not open or is broken, but also if memory was
    short, because a lone call needs less."""
    return isinstance(error, InputError) or not isinstance(error, CalmclipError)


def _check_rows(name: str, outputs: Outputs, rows: int) -> None:
    """Raises `BundleInvalid` before a caller gets rows of another call."""
    for output, array in outputs.items():
        if array.shape[:1] != (rows,):
            raise BundleInvalid(
                f"{name} was called with {rows} rows and answered {output!r} of shape {list(array.shape)}; expected "
                f"{rows} as the first dimension. If the graph does not batch, its manifest should say so"
            )


def _rows(feeds: Arrays) -> int:
    return next((int(array.shape[0]) for array in feeds.values() if array.ndim), 1)


def _merge(entries: list[_Entry]) -> Arrays:
    if len(entries) == 1:
        return entries[0].feeds
    return {name: np.concatenate([e.feeds[name] for e in entries]) for name in entries[0].feeds}
