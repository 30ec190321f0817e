"""`Engine`: the async driver of flows. Steps run in a bounded pool, calls go through batchers, all time is measured."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

from calmclip.models.cache import RowCache
from calmclip.models.errors import DeadlineExceeded
from calmclip.models.flow import Arrays, Cached, CacheGet, CachePut, Call, Done, Flow, State, Together, Walk
from calmclip.service.batching import Answer
from calmclip.service.hub import Loaded
from calmclip.service.metrics import Metrics
from calmclip.service.request import Context
from calmclip.service.settings import Settings

T = TypeVar("T")
FULL_S = 0.005  # between two looks at a full queue


class Engine:
    """Drives flows over loaded bundles. One per app."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.metrics = metrics
        self._pool = ThreadPoolExecutor(settings.cores + 1, thread_name_prefix="step")
        self._cache = RowCache(settings.text_cache)
        # Flows of one request that run at a time: one batch waits while another runs. More would take memory, and the
        # queue's places.
        self.at_once = max(1, min(2 * settings.batch.max_size, settings.queue.max_pending // 2))

    async def answer(self, loaded: Loaded, flow: Flow[T], context: Context) -> T:
        """Drive ``flow`` to its end within the request's deadline. Raises what the flow raises, `DeadlineExceeded`."""
        with loaded.lease():
            async with context.deadline():
                return await self._drive(loaded, flow, context)

    async def _drive(self, loaded: Loaded, flow: Flow[T], context: Context) -> T:
        walk = Walk(flow, context.clock, partial(self._cached, loaded, context), splits=True)
        state: State[T] = await self.thread(self._advance, context, context, loaded, walk)
        while not isinstance(state, Done):
            value: Any
            if isinstance(state, Together):
                value = await self._together(loaded, state, context)
            else:
                value = await self._call(loaded, state, context)
            state = await self.thread(self._advance, context, context, loaded, walk, value)
        return state.value

    async def each(
        self,
        loaded: Loaded,
        flows: Sequence[Flow[T]],
        context: Context,
        give: Callable[[int, T | Exception, Context], Awaitable[None]],
    ) -> None:
        """Drive ``flows`` beside each other, each for itself: ``give`` gets its index, and its answer or its error, as
        soon as it ends, with the context of its times.

        At most `at_once` flows have begun and are not yet taken by ``give``. After the deadline ``give`` gets
        `DeadlineExceeded` for each that is left. Raises what ``give`` raises.
        """
        left = dict.fromkeys(range(len(flows)))

        async def run(index: int, part: Context) -> None:
            outcome: T | Exception
            try:
                outcome = await self._drive(loaded, flows[index], part)
            except Exception as error:
                outcome = error
            await give(index, outcome, part)
            del left[index]  # a deadline may have ended `give`

        with loaded.lease():
            try:
                async with context.deadline():
                    await self._beside(len(flows), context, run)
            except DeadlineExceeded as late:
                for index in left:
                    await give(index, late, context)

    async def _together(self, loaded: Loaded, together: Together, context: Context) -> list[Any]:
        """The answers of the flows. The first error cancels the others."""
        answers: dict[int, Any] = {}

        async def run(index: int, part: Context) -> None:
            answers[index] = await self._drive(loaded, together.flows[index], part)

        await self._beside(len(together.flows), context, run)
        return [answers[index] for index in range(len(together.flows))]

    async def _beside(self, count: int, context: Context, run: Callable[[int, Context], Awaitable[None]]) -> None:
        """``run`` each index below ``count``, at most `at_once` at a time, with the context of a part of the request.
        Raises the first error, which cancels the others."""
        start, waiting = perf_counter(), iter(range(count))
        parts: list[Context] = []

        async def work() -> None:
            parts.append(part := context.part())
            for index in waiting:
                await run(index, part)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(count, self.at_once)):
                    group.create_task(work())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            context.join(parts, start)

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

    def _cached(self, loaded: Loaded, context: Context, asked: CacheGet | CachePut) -> Cached:
        cached = self._cache.answer(loaded.digest, asked, partial(self.metrics.cached, loaded.name))
        kept = context.kept
        if kept is None:
            return cached
        if isinstance(asked, CachePut):
            kept[asked.graph, asked.key] = asked.outputs
            return cached
        return {**{key: kept[asked.graph, key] for key in asked.keys if (asked.graph, key) in kept}, **cached}

    async def _call(self, loaded: Loaded, call: Call, context: Context) -> Arrays:
        if call.keys is None:
            return await self._run(loaded, call.graph, call.feeds, context)
        part = self._cache.split(loaded.digest, call, partial(self.metrics.cached, loaded.name))
        rows = part.complete(await self._run(loaded, call.graph, part.feeds, context) if part.feeds else {})
        if context.kept is not None:
            for index, key in enumerate(call.keys):
                context.kept[call.graph, key] = {name: array[index] for name, array in rows.items()}
        return rows

    async def _run(self, loaded: Loaded, graph: str, feeds: Arrays, context: Context) -> Arrays:
        start, batcher = perf_counter(), loaded.batchers[graph]
        while context.kept is not None and batcher.full:  # one of many pictures: the others should not be in vain
            await asyncio.sleep(FULL_S)
        answer = await batcher.run(feeds, until=context.until)
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
