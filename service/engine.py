"""`Engine`: the async driver of flows. Steps run in a bounded pool, calls go through batchers, all time is measured."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

from calmclip.models.cache import RowCache
from calmclip.models.flow import Arrays, Cached, CacheGet, CachePut, Call, Done, Flow, State, Together, Walk
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
        self._cache = RowCache(settings.text_cache)
        # One batch waits while another runs. More pictures of one request would take memory, and the queue's places.
        self._at_once = max(1, min(2 * settings.batch.max_size, settings.queue.max_pending // 2))

    async def answer(self, loaded: Loaded, flow: Flow[T], context: Context) -> T:
        """Drive ``flow`` to its end within the request's deadline. Raises what the flow raises, `DeadlineExceeded`."""
        with loaded.lease():
            async with context.deadline():
                return await self._drive(loaded, flow, context)

    async def _drive(self, loaded: Loaded, flow: Flow[T], context: Context) -> T:
        walk = Walk(flow, context.clock, partial(self._cached, loaded), splits=True)
        state: State[T] = await self.thread(self._advance, context, context, loaded, walk)
        while not isinstance(state, Done):
            value: Any
            if isinstance(state, Together):
                value = await self._together(loaded, state, context)
            else:
                value = await self._call(loaded, state, context)
            state = await self.thread(self._advance, context, context, loaded, walk, value)
        return state.value

    async def _together(self, loaded: Loaded, together: Together, context: Context) -> list[Any]:
        """The answers of the flows. At most `_at_once` of them run at a time. The first error cancels the others."""
        start, waiting = perf_counter(), iter(enumerate(together.flows))
        answers: dict[int, Any] = {}
        parts: list[Context] = []

        async def work() -> None:
            parts.append(part := context.part())
            for index, flow in waiting:
                answers[index] = await self._drive(loaded, flow, part)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in together.flows[: self._at_once]:
                    group.create_task(work())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            context.join(parts, start)
        return [answers[index] for index in range(len(together.flows))]

    async def thread(self, do: Callable[..., T], context: Context, *args: object) -> T:
        """Run in the pool. Time that ``do`` did not measure itself is the wait for a thread; it counts as `queue`."""
        start, before = perf_counter(), sum(context.clock.stages.values())
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, do, *args)
        finally:
            measured = sum(context.clock.stages.values()) - before
            waited = max(0.0, perf_counter() - start - measured)
            context.clock.add("queue", waited, start + waited)

    def _advance(self, context: Context, loaded: Loaded, walk: Walk[T], value: Any = None) -> State[T]:
        """In the pool: step to the end, to flows that run together, or to the next call that must go through the
        batcher.

        A switch to another thread and back takes long, and the graph has just filled this core's caches.
        """
        state = walk.step(value)
        while isinstance(state, Call) and (direct := self._run_here(context, loaded, state)) is not None:
            state = walk.step(direct)
        return state

    def _run_here(self, context: Context, loaded: Loaded, call: Call) -> Arrays | None:
        """The graph's answer, run in this thread; None if the graph is busy or other requests are in flight."""
        if call.keys is not None or context.status or context.left_s < 0:  # has rows to cache; no client waits any more
            return None
        answer = loaded.batchers[call.graph].run_here(call.feeds)
        return answer and _timed(context, call.graph, answer, 0.0)

    def _cached(self, loaded: Loaded, asked: CacheGet | CachePut) -> Cached:
        return self._cache.answer(loaded.digest, asked, partial(self.metrics.cached, loaded.name))

    async def _call(self, loaded: Loaded, call: Call, context: Context) -> Arrays:
        if call.keys is None:
            return await self._run(loaded, call.graph, call.feeds, context)
        part = self._cache.split(loaded.digest, call, partial(self.metrics.cached, loaded.name))
        return part.complete(await self._run(loaded, call.graph, part.feeds, context) if part.feeds else {})

    async def _run(self, loaded: Loaded, graph: str, feeds: Arrays, context: Context) -> Arrays:
        start = perf_counter()
        answer = await loaded.batchers[graph].run(feeds, until=context.until)
        if context.partial:  # else each call of the request would count a run that they share
            rows = next((len(array) for array in feeds.values() if array.ndim), 1)
            answer = answer._replace(infer_s=answer.infer_s * min(1.0, rows / answer.rows))
        # The time outside the run is a wait: in the queue, for a thread, or for the event loop.
        return _timed(context, graph, answer, perf_counter() - start - answer.infer_s)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _timed(context: Context, graph: str, answer: Answer, queue_s: float) -> Arrays:
    end = perf_counter()
    context.spent("queue", graph, queue_s, end - answer.infer_s)
    context.spent("infer", graph, answer.infer_s, end, batch=answer.rows)
    return answer.outputs
