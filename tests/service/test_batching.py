"""The batcher over a graph that notes the shapes of its inputs."""

import asyncio
import threading
from time import perf_counter

import numpy as np
import pytest

from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import BadRequest, BundleInvalid, DeadlineExceeded, Overloaded
from calmclip.service.batching import Batcher


class Graph:
    """y = 2 x, row by row; notes input shapes; `gate` holds it back; negative numbers raise `error`."""

    error: type[Exception] = BadRequest

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, feeds):
        self.gate.wait(5)
        self.shapes.append(feeds["x"].shape)
        if (feeds["x"] < 0).any():
            raise self.error("negative")
        return {"y": feeds["x"] * 2}


def rows(*values: float, width: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.repeat(np.array(values, np.float32)[:, None], width, 1)}


def run(scenario, **options):
    async def main():
        graph = Graph()
        batcher = Batcher(graph, **options)
        try:
            return await scenario(batcher, graph), graph
        finally:
            graph.gate.set()
            await batcher.close()

    return asyncio.run(main())


async def behind(batcher, graph, *calls):
    """Starts a call that occupies the graph, then ``calls``, which wait in the queue."""
    graph.gate.clear()
    first = asyncio.create_task(batcher.run(rows(0, width=9)))
    while batcher.depth or not batcher._worker:
        await asyncio.sleep(0.001)
    tasks = [asyncio.create_task(batcher.run(call)) for call in calls]
    await asyncio.sleep(0.01)
    return first, tasks


NEARLY = [TextPreprocess(context=77, multiple=8).width(tokens) for tokens in (5, 7, 8, 9)]  # 8, 8, 8, 16


@pytest.mark.parametrize(
    ("calls", "options", "shapes"),
    [
        pytest.param([rows(1), rows(2, 3), rows(4)], {}, [(4, 2)], id="merged, and split"),
        pytest.param(
            [rows(1), rows(2, width=3), rows(3), rows(4, width=3)], {}, [(2, 2), (2, 3)],
            id="different lengths are not merged; order is kept within a length",
        ),
        pytest.param(
            [rows(i, width=width) for i, width in enumerate(NEARLY)], {}, [(3, 8), (1, 16)],
            id="texts of similar lengths, whose widths are rounded up",
        ),
        pytest.param([rows(1), rows(2)], {"batch": False}, [(1, 2), (1, 2)], id="a graph without batch"),
        pytest.param([rows(*range(7))], {"max_size": 3}, [(3, 2), (3, 2), (1, 2)], id="a larger call is split"),
        pytest.param([rows(*range(5))], {"max_bytes": 17}, [(2, 2), (2, 2), (1, 2)], id="8 bytes a row"),
        pytest.param([rows(1, 2, width=100)], {"max_bytes": 17}, [(1, 100), (1, 100)], id="at least one row"),
    ],
)  # fmt: skip
def test_waiting_calls_are_merged_up_to_the_limits_and_split(calls, options, shapes):
    async def scenario(batcher, graph):
        first, tasks = await behind(batcher, graph, *calls)
        graph.gate.set()
        await first
        return [answer.outputs["y"] for answer in await asyncio.gather(*tasks)]

    answers, graph = run(scenario, **options)
    for answer, call in zip(answers, calls, strict=True):
        assert (answer == 2 * call["x"]).all()
    assert graph.shapes == [(1, 9), *shapes]


def test_a_full_queue_is_refused_and_goes_on():
    async def scenario(batcher, graph):
        first, tasks = await behind(batcher, graph, rows(1), rows(2))
        with pytest.raises(Overloaded, match="2 calls wait") as refused:
            await batcher.run(rows(3))
        graph.gate.set()
        await asyncio.gather(first, *tasks)
        return refused.value.retry_after, (await batcher.run(rows(5))).outputs["y"].tolist()

    (retry_after, later), _ = run(scenario, max_pending=2)
    assert retry_after >= 1
    assert later == [[10, 10]]


def test_a_cancelled_call_is_not_run():
    async def scenario(batcher, graph):
        first, tasks = await behind(batcher, graph, rows(1, width=4), rows(2))
        tasks[0].cancel()
        graph.gate.set()
        await asyncio.gather(first, tasks[1])

    _, graph = run(scenario)
    assert graph.shapes == [(1, 9), (1, 2)]


def test_an_error_reaches_its_caller_and_the_next_call_runs():
    async def scenario(batcher, graph):
        with pytest.raises(BadRequest, match="negative"):
            await batcher.run(rows(-1))
        return (await batcher.run(rows(1))).outputs["y"].tolist()

    answer, _ = run(scenario)
    assert answer == [[2, 2]]


async def outcomes(*tasks):
    """For each task: the first number of each row, or the name of its error."""
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    return [type(a).__name__ if isinstance(a, Exception) else a.outputs["y"][:, 0].tolist() for a in answers]


@pytest.mark.parametrize("error", [BadRequest, RuntimeError, MemoryError])
def test_in_a_merged_run_that_fails_only_the_faulty_call_fails(error):
    releases = []

    async def scenario(batcher, graph):
        graph.error = error
        first, tasks = await behind(batcher, graph, rows(1), rows(-1), rows(2, 3))
        graph.gate.set()
        await first
        return await outcomes(*tasks, batcher.run(rows(5)))

    answers, graph = run(scenario, observe=lambda count, release: releases.append((count, release)))
    assert answers == [[2], error.__name__, [4, 6], [10]]
    assert graph.shapes == [(1, 9), (4, 2), (1, 2), (1, 2), (2, 2), (1, 2)]  # each call runs once more on its own
    assert releases == [(1, "idle"), (1, "apart"), (2, "apart"), (1, "idle")]  # the runs with answers


@pytest.mark.parametrize("error", [BundleInvalid, Overloaded])
def test_an_error_that_no_call_can_cause_is_not_retried(error):
    async def scenario(batcher, graph):
        graph.error = error
        first, tasks = await behind(batcher, graph, rows(-1), rows(1))
        graph.gate.set()
        await first
        return await outcomes(*tasks)

    answers, graph = run(scenario)
    assert answers == [error.__name__] * 2
    assert graph.shapes == [(1, 9), (2, 2)]


def test_late_and_cancelled_calls_are_not_retried_after_a_failed_merged_run():
    async def scenario(batcher, graph):
        first, tasks = await behind(batcher, graph, rows(-1), rows(1))
        cancelled = asyncio.create_task(batcher.run(rows(2)))
        late = asyncio.create_task(batcher.run(rows(3), until=perf_counter() + 0.05))
        await asyncio.sleep(0.01)
        first_shape, plain = len(graph.shapes), Graph.__call__

        def slow(self, feeds):
            if len(self.shapes) == first_shape + 1:  # the merged run
                cancelled.get_loop().call_soon_threadsafe(cancelled.cancel)
                threading.Event().wait(0.1)
            return plain(self, feeds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Graph, "__call__", slow)
            graph.gate.set()
            await first
            return await outcomes(*tasks, late)

    answers, graph = run(scenario)
    assert answers == ["BadRequest", [2], "DeadlineExceeded"]
    assert graph.shapes == [(1, 9), (4, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("calls", [1, 2])
def test_an_answer_without_a_row_for_each_input_row_is_an_invalid_bundle(calls):
    """If a graph sums over its rows, the rows cannot be split between the calls."""

    async def main():
        batcher = Batcher(lambda feeds: {"y": feeds["x"].sum(0)}, name="sums")
        try:
            return await asyncio.gather(*(batcher.run(rows(i, width=3)) for i in range(calls)), return_exceptions=True)
        finally:
            await batcher.close()

    for answer in asyncio.run(main()):
        assert isinstance(answer, BundleInvalid)
        assert f"sums was called with {calls} rows and answered 'y' of shape [3]" in str(answer)


def test_the_oldest_call_waits_for_more_only_while_requests_are_concurrent():
    async def scenario(batcher, graph):
        late = asyncio.create_task(batcher.run(rows(1)))
        await asyncio.sleep(0.01)
        await asyncio.gather(late, batcher.run(rows(2)))

    _, graph = run(scenario, max_wait_s=5.0, max_size=2, concurrent=lambda: True)
    assert graph.shapes == [(2, 2)]
    _, graph = run(scenario, max_wait_s=5.0, max_size=2, concurrent=lambda: False)
    assert graph.shapes == [(1, 2), (1, 2)]


def test_queue_time_and_run_time_are_measured_apart():
    async def scenario(batcher, graph):
        first, tasks = await behind(batcher, graph, rows(1))
        await asyncio.sleep(0.05)
        graph.gate.set()
        return await first, await tasks[0]

    (first, second), _ = run(scenario)
    assert first.infer_s >= 0.05
    assert second.queue_s >= 0.05
    assert second.infer_s < 0.05


def releases(scenario, **options):
    """The number of rows and the release reason of each run."""
    observed = []
    run(scenario, observe=lambda rows, release: observed.append((rows, release)), **options)
    return observed


def test_each_run_has_a_release_reason():
    async def alone(batcher, graph):
        await batcher.run(rows(1))

    async def together(batcher, graph):
        await asyncio.gather(*(batcher.run(rows(i)) for i in range(2)))

    async def leaving(batcher, graph):
        batcher.drain()
        await together(batcher, graph)

    busy = {"concurrent": lambda: True}
    assert releases(alone) == [(1, "idle")]
    assert releases(alone, max_wait_s=0.01, **busy) == [(1, "timeout")]
    assert releases(together, max_wait_s=5.0, max_size=2, **busy) == [(2, "full")]
    assert releases(alone, batch=False, **busy) == [(1, "full")]
    assert releases(leaving, max_wait_s=5.0, **busy) == [(2, "drain")]


def test_calls_of_another_length_do_not_make_a_batch_full():
    async def scenario(batcher, graph):
        await asyncio.gather(*(batcher.run(rows(i, width=2 + i)) for i in range(2)))

    assert releases(scenario, max_wait_s=0.02, max_size=2, concurrent=lambda: True) == [(1, "timeout"), (1, "timeout")]


def test_a_call_past_its_deadline_is_dropped_before_its_run():
    async def scenario(batcher, graph):
        first, tasks = await behind(batcher, graph, rows(1))
        late = asyncio.create_task(batcher.run(rows(2), until=perf_counter() + 0.02))
        await asyncio.sleep(0.05)
        graph.gate.set()
        await asyncio.gather(first, *tasks)
        with pytest.raises(DeadlineExceeded):
            await late
        return batcher.depth

    depth, graph = run(scenario, max_size=1)
    assert depth == 0
    assert graph.shapes == [(1, 9), (1, 2)]


def test_the_callers_thread_runs_the_graph_when_no_call_waits():
    async def scenario(batcher, graph):
        answer = await asyncio.to_thread(batcher.run_here, rows(1, 2))
        assert answer.outputs["y"].tolist() == [[2, 2], [4, 4]]
        assert (answer.queue_s, answer.rows) == (0, 2)
        assert await asyncio.to_thread(batcher.run_here, rows(1, 2, 3)) is None  # it needs more than one run
        with pytest.raises(BadRequest, match="negative"):
            await asyncio.to_thread(batcher.run_here, rows(-1))
        first, tasks = await behind(batcher, graph, rows(3))
        assert await asyncio.to_thread(batcher.run_here, rows(4)) is None  # the graph runs, and a call waits
        graph.gate.set()
        await asyncio.gather(first, *tasks)
        assert await asyncio.to_thread(batcher.run_here, rows(5)) is not None  # idle again
        await batcher.close()
        assert batcher.run_here(rows(6)) is None

    observed = releases(scenario, max_size=2)
    assert observed == [(2, "idle"), (1, "idle"), (1, "idle"), (1, "idle")]

    async def due(batcher, graph):
        assert await asyncio.to_thread(batcher.run_here, rows(1)) is None

    assert releases(due, concurrent=lambda: True) == []


def test_the_queue_waits_for_a_run_in_a_callers_thread_and_merges_meanwhile():
    async def scenario(batcher, graph):
        graph.gate.clear()
        here = asyncio.create_task(asyncio.to_thread(batcher.run_here, rows(1)))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(asyncio.to_thread(batcher.run_here, rows(9)))
        await asyncio.wait([second], timeout=5)
        if not second.done():
            graph.gate.set()  # or the thread would never end
        assert second.done()
        assert await second is None  # the graph runs
        tasks = [asyncio.create_task(batcher.run(rows(i))) for i in (2, 3)]
        await asyncio.sleep(0.02)
        assert batcher.depth == 2  # they stay in the queue, where more calls can join them
        tasks.append(asyncio.create_task(batcher.run(rows(4))))
        await asyncio.sleep(0)
        graph.gate.set()
        return [a.outputs["y"].tolist() for a in await asyncio.gather(here, *tasks)]

    answers, graph = run(scenario)
    assert answers == [[[2, 2]], [[4, 4]], [[6, 6]], [[8, 8]]]
    assert graph.shapes == [(1, 2), (3, 2)]


def test_closing_runs_what_is_queued_first():
    async def scenario(batcher, graph):
        first, tasks = await behind(batcher, graph, rows(1), rows(2, width=3))
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        graph.gate.set()
        await closing
        answers = await asyncio.gather(first, *tasks)
        with pytest.raises(Overloaded, match="unloaded"):
            await batcher.run(rows(3))
        return [answer.outputs["y"].tolist() for answer in answers[1:]]

    assert run(scenario)[0] == [[[2, 2]], [[4, 4, 4]]]
