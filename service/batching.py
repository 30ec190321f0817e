"""`Batcher`: merges compatible calls to one graph, runs them once, and splits the answer. Bounded.

Calls fit together when every feed has the same dtype and the same shape behind the first dimension: texts of
another length T wait for their own kind, so company changes no answer by padding: with an INT8 bundle the rows are
the very bits of a lone call; in float a lone row may differ by the last bit, for its products are summed in another
order. Nor does company make a call fail: those of a merged run that failed are run once more, each alone.
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
from calmclip.service.pace import Pace

Signature: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]
Outputs: TypeAlias = dict[str, Array]
# Why a batch went: no room for more; the oldest call had waited its time; nobody else was due; no waiting any more;
# a call alone, after a merged run that it was in had failed.
Release: TypeAlias = Literal["full", "timeout", "idle", "drain", "apart"]
RELEASES: tuple[Release, ...] = ("full", "timeout", "idle", "drain", "apart")

POLL_S = 0.0005


class Answer(NamedTuple):
    """Outputs by name, the seconds the call waited and the graph ran, and the rows of the largest run it shared."""

    outputs: Outputs
    queue_s: float
    infer_s: float
    rows: int


class _Entry:
    """One call in the queue; carries its own times and the future its caller waits on."""

    __slots__ = ("born", "done", "feeds", "rows", "signature", "until")

    def __init__(self, feeds: Arrays, done: "asyncio.Future[Answer]", until: float) -> None:
        self.feeds = feeds
        self.done = done
        self.until = until
        self.born = perf_counter()
        self.rows = _rows(feeds)
        self.signature: Signature = tuple((name, a.dtype.name, a.shape[1:]) for name, a in sorted(feeds.items()))


class Batcher:
    """The one door to a graph.

    ``max_size``, ``max_bytes``: rows, and bytes of feeds, in a merged run; one row always fits.
    ``max_wait_s``: how long the oldest call waits for company, and only while ``company()`` says that some may
    come. ``max_pending``: calls in the queue; more raise `Overloaded`. ``batch`` False: rows are no rows, every
    call runs alone. ``observe``: told the rows of each run that gave an answer, and why it was not held back for more.
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
        company: Callable[[], bool] = lambda: False,
        observe: Callable[[int, Release], None] = lambda rows, release: None,
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
        self._turn = Lock()  # held by whoever runs the graph
        self._worker: asyncio.Task[None] | None = None
        self._pace = Pace()
        self._draining = False
        self._closed = False

    @property
    def depth(self) -> int:
        """Calls that wait."""
        return len(self._queue)

    async def run(self, feeds: Arrays, *, until: float = inf) -> Answer:
        """``until``: on `perf_counter`; what is still in the queue then is not run.

        Raises `Overloaded` when the queue is full, `DeadlineExceeded`, what the graph raises, and `BundleInvalid` where
        its answer has not a row for each that was asked. A cancelled caller's call is dropped too.
        """
        answers = [await self._one(piece, until) for piece in self._pieces(feeds)]
        if len(answers) == 1:
            return answers[0]
        outputs = {name: np.concatenate([a.outputs[name] for a in answers]) for name in answers[0].outputs}
        queue_s, infer_s = sum(a.queue_s for a in answers), sum(a.infer_s for a in answers)
        return Answer(outputs, queue_s, infer_s, max(a.rows for a in answers))

    def run_here(self, feeds: Arrays) -> Answer | None:
        """In the calling thread, which is not the event loop's.

        None where `run` has to be asked: the graph is at work, somebody waits for it or may come, the call is more than
        one run, or this is closed. Raises what the graph raises, and `BundleInvalid` as `run` does.
        """
        fits = not self._batch or _rows(feeds) <= self._most(feeds)
        if not fits or self._closed or self._queue or self._company() or not self._turn.acquire(blocking=False):
            return None
        try:
            outputs, infer_s = self._timed(feeds)
        finally:
            self._turn.release()
        rows = self._checked(outputs, _rows(feeds), "idle")
        return Answer(outputs, 0.0, infer_s, rows)

    def drain(self) -> None:
        """From now on nothing waits for company."""
        self._draining = True

    async def close(self) -> None:
        """What is in the queue is run first."""
        self._draining = self._closed = True
        self._arrived.set()
        if self._worker:
            await self._worker
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

    async def _one(self, feeds: Arrays, until: float) -> Answer:
        if len(self._queue) >= self._max_pending:
            wait = self._pace.retry_after_s
            raise Overloaded(
                f"{len(self._queue)} calls wait for {self.name} already, the most allowed; try again in {wait:.0f} s",
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
        self._pace.begin()
        try:
            return await entry.done
        finally:
            self._pace.end(finished=not entry.done.cancelled())

    async def _work(self) -> None:
        while self._queue or not self._closed:
            await self._arrived.wait()
            while not self._turn.acquire(blocking=False):  # a run in the thread of its caller, and seldom
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
        """Run them together and hand out the rows; where that fails and may be the doing of one, each alone."""
        try:
            await self._run_once(entries, release)
        except Exception as error:
            if len(entries) > 1 and _may_be_one_call_s(error):
                for entry in entries:
                    if not self._is_over(entry):
                        await self._serve([entry], "apart")
                return
            for entry in entries:
                if not entry.done.done():
                    entry.done.set_exception(error)

    async def _run_once(self, entries: list[_Entry], release: Release) -> None:
        loop = asyncio.get_running_loop()
        outputs, infer_s = await loop.run_in_executor(self._thread, self._timed, _merge(entries))
        end = perf_counter()
        rows = self._checked(outputs, sum(entry.rows for entry in entries), release)
        at = 0
        for entry in entries:
            mine = outputs if len(entries) == 1 else {k: v[at : at + entry.rows] for k, v in outputs.items()}
            at += entry.rows
            if not entry.done.done():
                # waiting for the thread is waiting too: queue + infer is all of it
                entry.done.set_result(Answer(mine, end - entry.born - infer_s, infer_s, rows))

    def _checked(self, outputs: Outputs, rows: int, release: Release) -> int:
        """``rows``, of a run that gave an answer."""
        if self._batch:
            _check_rows(self.name, outputs, rows)
        self._observe(rows, release)
        return rows

    async def _gather(self) -> Release:
        """Waits for company, but no longer than the oldest call may, nor when none is due; says what ended it."""
        while True:
            self._drop()
            if not self._queue or self._full():
                return "full"
            if self._draining:
                return "drain"
            if not self._max_wait_s or not self._company():
                return "idle"
            left = self._queue[0].born + self._max_wait_s - perf_counter()
            if left <= 0:
                return "timeout"
            await asyncio.sleep(min(left, POLL_S))

    def _full(self) -> bool:
        """Whether no more fit beside the oldest call."""
        first = self._queue[0]
        return not self._batch or sum(e.rows for e in self._mates(first)) >= self._most(first.feeds)

    def _mates(self, first: _Entry) -> Iterator[_Entry]:
        """Those in the queue that fit with ``first``, and itself."""
        return (e for e in self._queue if e.signature == first.signature and not e.done.done())

    def _drop(self) -> None:
        """From the head of the queue, what is over."""
        while self._queue and self._is_over(self._queue[0]):
            self._queue.popleft()

    def _is_over(self, entry: _Entry) -> bool:
        """Whether nobody waits for it, or no longer: it is too late, which its caller is told."""
        if not entry.done.done() and entry.until < perf_counter():
            entry.done.set_exception(DeadlineExceeded(f"the deadline passed while waiting for {self.name}"))
        return entry.done.done()

    def _take(self) -> list[_Entry]:
        """The oldest call that somebody waits for, and those that fit with it, in order; the rest stays."""
        self._drop()
        if not self._queue:
            return []
        first = self._queue.popleft()
        taken, rows = [first], first.rows
        if self._batch:
            most = self._most(first.feeds)
            for entry in [e for e in self._mates(first) if e.until >= perf_counter()]:
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


def _may_be_one_call_s(error: Exception) -> bool:
    """Whether the others may be answered without it: not where the graph does not open, or is broken.

    Where memory is short they may: each alone needs less.
    """
    return isinstance(error, InputError) or not isinstance(error, CalmclipError)


def _check_rows(name: str, outputs: Outputs, rows: int) -> None:
    """Raises `BundleInvalid` before anybody is handed rows that are another's."""
    for output, array in outputs.items():
        if array.shape[:1] != (rows,):
            raise BundleInvalid(
                f"{name} was asked {rows} rows and answered {output!r} of shape {list(array.shape)}; expected "
                f"{rows} first. Its manifest should say that it does not batch"
            )


def _rows(feeds: Arrays) -> int:
    return next((int(array.shape[0]) for array in feeds.values() if array.ndim), 1)


def _merge(entries: list[_Entry]) -> Arrays:
    if len(entries) == 1:
        return entries[0].feeds
    return {name: np.concatenate([e.feeds[name] for e in entries]) for name in entries[0].feeds}
