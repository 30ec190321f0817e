"""`Engine`: the async driver of flows. Steps in a bounded pool, calls through batchers, every second on the clock."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import TypeVar

from calmclip.models.flow import Arrays, Call, Done, Flow, Keep, Recall, Walk
from calmclip.models.memory import Memory
from calmclip.service.batching import Answer
from calmclip.service.hub import Loaded
from calmclip.service.metrics import Metrics
from calmclip.service.request import Context
from calmclip.service.settings import Settings

T = TypeVar("T")


class Engine:
    """Drives flows over loaded bundles. One per app."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.metrics = metrics
        self._pool = ThreadPoolExecutor(settings.cores + 1, thread_name_prefix="step")
        self._memory = Memory(settings.text_cache)

    async def answer(self, loaded: Loaded, flow: Flow[T], own: Context) -> T:
        """Drive ``flow`` to its end within the request's deadline. Raises what the flow raises, `DeadlineExceeded`."""
        walk = Walk(flow, own.clock, partial(self._remember, loaded))
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

    def _remember(self, loaded: Loaded, asked: Recall | Keep) -> Arrays | None:
        return self._memory.answer(loaded.digest, asked, partial(self.metrics.cached, loaded.name))

    async def _call(self, loaded: Loaded, call: Call, own: Context) -> Arrays:
        if call.keys is None:
            return await self._run(loaded, call.graph, call.feeds, own)
        part = self._memory.split(loaded.digest, call, partial(self.metrics.cached, loaded.name))
        found = await self._run(loaded, call.graph, part.feeds, own) if part.feeds else {}
        return part.complete(found)

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
