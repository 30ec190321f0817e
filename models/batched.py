"""The driver of `Runner.map`: many flows, whose calls of one graph and shape run together."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Generic, TypeVar

import numpy as np

from calmclip.models.flow import Arrays, Cache, Call, Done, Flow, State, Walk
from calmclip.models.runtime.clock import Stopwatch

T = TypeVar("T")
BATCH_BYTES = 3_670_016  # inputs of one run, as in the service; larger inputs do not fit into the CPU's caches
AHEAD = 2  # pictures are decoded for this many runs at once: the current run and the next one


@dataclass
class _Started(Generic[T]):
    """A flow that has begun. ``step``: its next step in a thread, or the call that it waits for."""

    walk: Walk[T]
    step: "Future[State[T]]"

    def waiting(self) -> Call | None:
        """The call that the flow waits for; None if its step still runs, has failed, or has ended the flow."""
        if not self.step.done() or self.step.cancelled() or self.step.exception():
            return None
        state = self.step.result()
        return state if isinstance(state, Call) else None


@dataclass
class BatchedDriver:
    """Graphs run in the calling thread, the code between them in ``threads`` other threads.

    ``run`` answers one call. ``mergeable``: whether a graph's rows are independent. ``record`` gets the stage times of
    each flow that ends. ``batch``: rows of one run; None: as many as `BATCH_BYTES` hold.
    """

    run: Callable[[Call], Arrays]
    cache: Cache
    mergeable: Callable[[str], bool]
    record: Callable[[Stopwatch], None]
    batch: int | None
    threads: int
    _capacity: int = field(default=1, init=False)  # rows that the last run could take
    _pool: ThreadPoolExecutor | None = field(default=None, init=False)

    def answers(self, flows: Iterator[Flow[T]]) -> Iterator[T]:
        """The answers in the order of ``flows``, which are taken from the iterator as they are needed."""
        started: deque[_Started[T]] = deque()
        self._capacity = self.batch or 1
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="map") if self.threads else None
        try:
            while True:
                wanted = self._capacity * (AHEAD if self._pool else 1) + self.threads
                for flow in islice(flows, max(0, wanted - len(started))):
                    walk = Walk(flow, Stopwatch(), self.cache)  # a stopwatch belongs to one thread
                    started.append(_Started(walk, self._submit(walk.step)))
                if not started:
                    return
                state = started[0].step.result()
                if isinstance(state, Done):
                    self.record(started.popleft().walk.clock)
                    yield state.value
                else:
                    assert isinstance(state, Call)  # these walks do not split
                    self._run(state, started)
        finally:
            for entry in started:
                entry.step.cancel()
            if self._pool:
                self._pool.shutdown(wait=True, cancel_futures=True)
            for entry in started:  # a flow may hold an open file
                entry.walk.flow.close()

    def _run(self, call: Call, started: "deque[_Started[T]]") -> None:
        """Run the oldest flow's call together with the calls of other flows that have the same graph and shape."""
        merged, rows = [(started[0], call)], _rows(call)
        self._capacity = self._limit(call)
        if self._capacity > rows:
            for entry in islice(started, 1, None):
                other = entry.waiting()
                if other and rows + _rows(other) <= self._capacity and _mergeable(call, other):
                    merged.append((entry, other))
                    rows += _rows(other)
        feeds = call.feeds
        if len(merged) > 1:
            feeds = {name: np.concatenate([other.feeds[name] for _, other in merged]) for name in feeds}
        with started[0].walk.clock.stage("infer"):
            outputs = self.run(replace(call, feeds=feeds))
        start = 0
        for entry, other in merged:
            end = start + _rows(other)
            part = outputs if len(merged) == 1 else {name: array[start:end] for name, array in outputs.items()}
            entry.step = self._submit(partial(entry.walk.step, part))
            start = end

    def _limit(self, call: Call) -> int:
        """The number of rows in one run of calls like ``call``."""
        if call.keys is not None or not self.mergeable(call.graph):
            return 1
        rows = _rows(call)
        size = sum(array.nbytes for array in call.feeds.values())
        return max(rows, self.batch or rows * (BATCH_BYTES // max(size, 1)))

    def _submit(self, step: "Callable[[], State[T]]") -> "Future[State[T]]":
        if self._pool:
            return self._pool.submit(step)
        done: Future[State[T]] = Future()
        try:
            done.set_result(step())
        except BaseException as error:
            done.set_exception(error)
        return done


def _rows(call: Call) -> int:
    """The number of rows; 1 for a graph whose input is a scalar."""
    array = next(iter(call.feeds.values()), None)
    return 1 if array is None or not array.ndim else len(array)


def _mergeable(call: Call, other: Call) -> bool:
    shapes = [{name: (a.shape[1:], a.dtype) for name, a in c.feeds.items()} for c in (call, other)]
    return call.graph == other.graph and other.keys is None and shapes[0] == shapes[1]
