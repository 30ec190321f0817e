"""`Engine`: the async driver of flows. Steps in a bounded pool, calls through batchers, every second on the clock."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from threading import Lock
from time import perf_counter
from typing import NamedTuple, TypeVar

import numpy as np

from calmclip.models.flow import Arrays, Call, Done, Flow, Keep, Recall, Walk
from calmclip.service.batching import Answer
from calmclip.service.context import Context
from calmclip.service.hub import Loaded
from calmclip.service.metrics import Metrics
from calmclip.service.settings import Settings

T = TypeVar("T")
Name = tuple[str, str, bytes]  # bundle digest, graph, fingerprint of the key


class Row(NamedTuple):
    """One row of a graph's answer, by output; or what was made of several, and takes the place of ``size``."""

    outputs: Arrays
    size: int = 1


class Engine:
    """Drives flows over loaded bundles. One per app."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.metrics = metrics
        self._pool = ThreadPoolExecutor(settings.cores + 1, thread_name_prefix="step")
        self._cache = RowCache(settings.text_cache)

    async def answer(self, loaded: Loaded, flow: Flow[T], own: Context) -> T:
        """Drive ``flow`` to its end within the request's deadline. Raises what the flow raises, `DeadlineExceeded`."""
        walk = Walk(flow, own.clock, partial(self._memory, loaded))
        with loaded.lease():
            async with own.deadline():
                state: Call | Done[T] = await self.thread(self._advance, own, own, loaded, walk)
                while isinstance(state, Call):
                    outputs = await self._call(loaded, state, own)
                    state = await self.thread(self._advance, own, own, loaded, walk, outputs)
        self.metrics.answered(loaded.name, state.value)
        return state.value

    async def thread(self, do: Callable[..., T], own: Context, *args: object) -> T:
        """Run in the pool. What the clock did not see of it is waiting for a thread, so it counts as `queue`."""
        start, before = perf_counter(), sum(own.clock.stages.values())
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, do, *args)
        finally:
            seen = sum(own.clock.stages.values()) - before
            waited = max(0.0, perf_counter() - start - seen)
            own.clock.add("queue", waited, start + waited)

    def _advance(self, own: Context, loaded: Loaded, walk: Walk[T], outputs: Arrays | None = None) -> Call | Done[T]:
        """In the pool, to the next call that has to wait for others: the way to another thread and back takes long,
        with caches that a graph has just filled."""
        state = walk.step(outputs)
        while isinstance(state, Call) and (found := self._here(own, loaded, state)) is not None:
            state = walk.step(found)
        return state

    def _here(self, own: Context, loaded: Loaded, call: Call) -> Arrays | None:
        """The graph's answer, where it is idle and no other request is under way."""
        if call.keys is not None or own.status or own.left_s < 0:  # rows to remember; nobody waits for it any more
            return None
        answer = loaded.batchers[call.graph].run_here(call.feeds)
        return answer and _timed(own, call.graph, answer, 0.0)

    def _memory(self, loaded: Loaded, asked: Recall | Keep) -> Arrays | None:
        if isinstance(asked, Keep):
            (name,) = _names(loaded, asked.graph, (asked.key,))
            self._cache.put(name, Row(asked.outputs, asked.size))
            return None
        names = _names(loaded, asked.graph, asked.keys)
        rows = self._known(names)
        if len(rows) < len(set(names)):
            return None
        self.metrics.cached(loaded.name, hits=sum(rows[name].size for name in names), misses=0)
        return _stack(names, rows)

    def _known(self, names: Sequence[Name]) -> dict[Name, Row]:
        return {name: row for name in names if (row := self._cache.get(name)) is not None}

    async def _call(self, loaded: Loaded, call: Call, own: Context) -> Arrays:
        if call.keys is None:
            return await self._run(loaded, call.graph, call.feeds, own)
        names = _names(loaded, call.graph, call.keys)
        rows = self._known(names)
        missing = [i for i, name in enumerate(names) if name not in rows]
        self.metrics.cached(loaded.name, hits=len(names) - len(missing), misses=len(missing))
        if missing:
            feeds = {name: array[missing] for name, array in call.feeds.items()}
            found = await self._run(loaded, call.graph, feeds, own)
            for at, i in enumerate(missing):
                # a copy: a row must not keep the whole batch it came with in memory
                rows[names[i]] = Row({output: array[at].copy() for output, array in found.items()})
                self._cache.put(names[i], rows[names[i]])
        return _stack(names, rows)

    async def _run(self, loaded: Loaded, graph: str, feeds: Arrays, own: Context) -> Arrays:
        start = perf_counter()
        answer = await loaded.batchers[graph].run(feeds, until=own.until)
        # all that is not the run itself is waiting: for the queue, for a thread, for the event loop's turn
        return _timed(own, graph, answer, perf_counter() - start - answer.infer_s)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _timed(own: Context, graph: str, answer: Answer, queue_s: float) -> Arrays:
    end = perf_counter()
    own.spent("queue", graph, queue_s, end - answer.infer_s)
    own.spent("infer", graph, answer.infer_s, end, batch=answer.rows)
    return answer.outputs


def _names(loaded: Loaded, graph: str, keys: Sequence[str]) -> list[Name]:
    return [(loaded.digest, graph, fingerprint(key)) for key in keys]


def _stack(names: Sequence[Name], rows: Mapping[Name, Row]) -> Arrays:
    return {output: np.stack([rows[name].outputs[output] for name in names]) for output in rows[names[0]].outputs}


def fingerprint(key: str) -> bytes:
    """Stands for a text in the cache: the text itself may have 100 000 characters."""
    return blake2b(key.encode(), digest_size=16).digest()


class RowCache:
    """The rows used last, by bundle digest, graph and `fingerprint`. ``size``: of all together; what is larger alone is
    not remembered, so with 0 nothing is. For any thread.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: OrderedDict[Name, Row] = OrderedDict()
        self._held = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return self._held

    def get(self, name: Name) -> Row | None:
        with self._lock:
            if name in self._rows:
                self._rows.move_to_end(name)
            return self._rows.get(name)

    def put(self, name: Name, row: Row) -> None:
        if row.size > self.size:
            return
        with self._lock:
            if before := self._rows.pop(name, None):
                self._held -= before.size
            self._rows[name] = row
            self._held += row.size
            while self._held > self.size:
                self._held -= self._rows.popitem(last=False)[1].size
