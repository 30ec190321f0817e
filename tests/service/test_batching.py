"""The batcher against a graph that says what it was run on."""

import asyncio
import threading
from time import perf_counter

import numpy as np
import pytest

from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import BadRequest, BundleInvalid, DeadlineExceeded, Overloaded
from calmclip.service.batching import Batcher


class Graph:
    """y = 2 x, row by row; remembers the shapes it saw; `gate` holds it back; negative numbers raise `error`."""

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
    """Starts one call that occupies the graph, and ``calls`` behind it."""
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
            id="other lengths are not merged, and order holds within a length",
        ),
        pytest.param(
            [rows(i, width=width) for i, width in enumerate(NEARLY)], {}, [(3, 8), (1, 16)],
            id="texts of nearly one length, whose widths are rounded up",
        ),
        pytest.param([rows(1), rows(2)], {"batch": False}, [(1, 2), (1, 2)], id="a graph without batch"),
        pytest.param([rows(*range(7))], {"max_size": 3}, [(3, 2), (3, 2), (1, 2)], id="a larger call in pieces"),
        pytest.param([rows(*range(5))], {"max_bytes": 17}, [(2, 2), (2, 2), (1, 2)], id="8 bytes a row"),
        pytest.param([rows(1, 2, width=100)], {"max_bytes": 17}, [(1, 100), (1, 100)], id="one row always"),
    ],
)  # fmt: skip
def test_calls_that_wait_are_merged_as_far_as_they_fit_and_split(calls, options, shapes):
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


def test_what_nobody_waits_for_is_not_run():
    async def scenario(batcher, graph):
        first, tasks = await behind(batcher, graph, rows(1, width=4), rows(2))
        tasks[0].cancel()
        graph.gate.set()
        await asyncio.gather(first, tasks[1])

    _, graph = run(scenario)
    assert graph.shapes == [(1, 9), (1, 2)]


def test_an_error_reaches_its_callers_and_the_next_call_runs():
    async def scenario(batcher, graph):
        with pytest.raises(BadRequest, match="negative"):
            await batcher.run(rows(-1))
        return (await batcher.run(rows(1))).outputs["y"].tolist()

    answer, _ = run(scenario)
    assert answer == [[2, 2]]


async def told(*tasks):
    """What each was answered: the first number of its rows, or the name of its error."""
    found = await asyncio.gather(*tasks, return_exceptions=True)
    return [type(one).__name__ if isinstance(one, Exception) else one.outputs["y"][:, 0].tolist() for one in found]


@pytest.mark.parametrize("error", [BadRequest, RuntimeError, MemoryError])
def test_of_a_merged_run_that_fails_only_the_guilty_call_does(error):
    seen = []

    async def scenario(batcher, graph):
        graph.error = error
        first, tasks = await behind(batcher, graph, rows(1), rows(-1), rows(2, 3))
        graph.gate.set()
        await first
        return await told(*tasks, batcher.run(rows(5)))

    answers, graph = run(scenario, observe=lambda count, release: seen.append((count, release)))
    assert answers == [[2], error.__name__, [4, 6], [10]]
    assert graph.shapes == [(1, 9), (4, 2), (1, 2), (1, 2), (2, 2), (1, 2)]  # once more each, and no more
    assert seen == [(1, "idle"), (1, "apart"), (2, "apart"), (1, "idle")]  # runs that gave answers


@pytest.mark.parametrize("error", [BundleInvalid, Overloaded])
def test_what_no_call_can_have_caused_is_not_tried_again(error):
    async def scenario(batcher, graph):
        graph.error = error
        first, tasks = await behind(batcher, graph, rows(-1), rows(1))
        graph.gate.set()
        await first
        return await told(*tasks)

    answers, graph = run(scenario)
    assert answers == [error.__name__] * 2
    assert graph.shapes == [(1, 9), (2, 2)]


def test_apart_too_what_is_late_or_given_up_is_not_run():
    async def scenario(batcher, graph):
        first, tasks = await behind(batcher, graph, rows(-1), rows(1))
        given_up = asyncio.create_task(batcher.run(rows(2)))
        late = asyncio.create_task(batcher.run(rows(3), until=perf_counter() + 0.05))
        await asyncio.sleep(0.01)
        first_shape, plain = len(graph.shapes), Graph.__call__

        def slow(self, feeds):
            if len(self.shapes) == first_shape + 1:  # the merged run
                given_up.get_loop().call_soon_threadsafe(given_up.cancel)
                threading.Event().wait(0.1)
            return plain(self, feeds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Graph, "__call__", slow)
            graph.gate.set()
            await first
            return await told(*tasks, late)

    answers, graph = run(scenario)
    assert answers == ["BadRequest", [2], "DeadlineExceeded"]
    assert graph.shapes == [(1, 9), (4, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("calls", [1, 2])
def test_an_answer_without_a_row_for_each_is_nobody_s(calls):
    """A graph that sums over its rows would hand the sum to one, and nothing to the other."""

    async def main():
        batcher = Batcher(lambda feeds: {"y": feeds["x"].sum(0)}, name="sums")
        try:
            return await asyncio.gather(*(batcher.run(rows(i, width=3)) for i in range(calls)), return_exceptions=True)
        finally:
            await batcher.close()

    for answer in asyncio.run(main()):
        assert isinstance(answer, BundleInvalid)
        assert f"sums was asked {calls} rows and answered 'y' of shape [3]" in str(answer)


def test_the_oldest_call_waits_for_company_only_while_some_may_come():
    async def scenario(batcher, graph):
        late = asyncio.create_task(batcher.run(rows(1)))
        await asyncio.sleep(0.01)
        await asyncio.gather(late, batcher.run(rows(2)))

    _, graph = run(scenario, max_wait_s=5.0, max_size=2, company=lambda: True)
    assert graph.shapes == [(2, 2)]
    _, graph = run(scenario, max_wait_s=5.0, max_size=2, company=lambda: False)
    assert graph.shapes == [(1, 2), (1, 2)]


def test_waiting_and_running_are_told_apart():
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
    """Rows and reason of each run."""
    seen = []
    run(scenario, observe=lambda rows, release: seen.append((rows, release)), **options)
    return seen


def test_each_run_says_why_it_was_not_held_back():
    async def alone(batcher, graph):
        await batcher.run(rows(1))

    async def together(batcher, graph):
        await asyncio.gather(*(batcher.run(rows(i)) for i in range(2)))

    async def leaving(batcher, graph):
        batcher.drain()
        await together(batcher, graph)

    busy = {"company": lambda: True}
    assert releases(alone) == [(1, "idle")]
    assert releases(alone, max_wait_s=0.01, **busy) == [(1, "timeout")]
    assert releases(together, max_wait_s=5.0, max_size=2, **busy) == [(2, "full")]
    assert releases(alone, batch=False, **busy) == [(1, "full")]
    assert releases(leaving, max_wait_s=5.0, **busy) == [(2, "drain")]


def test_calls_of_another_length_do_not_make_a_batch_full():
    async def scenario(batcher, graph):
        await asyncio.gather(*(batcher.run(rows(i, width=2 + i)) for i in range(2)))

    assert releases(scenario, max_wait_s=0.02, max_size=2, company=lambda: True) == [(1, "timeout"), (1, "timeout")]


def test_what_is_past_its_deadline_is_dropped_when_its_turn_comes():
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


def test_a_caller_s_own_thread_runs_the_graph_when_nobody_is_due():
    async def scenario(batcher, graph):
        answer = await asyncio.to_thread(batcher.run_here, rows(1, 2))
        assert answer.outputs["y"].tolist() == [[2, 2], [4, 4]]
        assert (answer.queue_s, answer.rows) == (0, 2)
        assert await asyncio.to_thread(batcher.run_here, rows(1, 2, 3)) is None  # more than one run
        with pytest.raises(BadRequest, match="negative"):
            await asyncio.to_thread(batcher.run_here, rows(-1))
        first, tasks = await behind(batcher, graph, rows(3))
        assert await asyncio.to_thread(batcher.run_here, rows(4)) is None  # at work, and somebody waits
        graph.gate.set()
        await asyncio.gather(first, *tasks)
        assert await asyncio.to_thread(batcher.run_here, rows(5)) is not None  # and free again
        await batcher.close()
        assert batcher.run_here(rows(6)) is None

    seen = releases(scenario, max_size=2)
    assert seen == [(2, "idle"), (1, "idle"), (1, "idle"), (1, "idle")]

    async def due(batcher, graph):
        assert await asyncio.to_thread(batcher.run_here, rows(1)) is None

    assert releases(due, company=lambda: True) == []


def test_the_queue_waits_for_a_run_in_a_caller_s_thread_and_merges_meanwhile():
    async def scenario(batcher, graph):
        graph.gate.clear()
        here = asyncio.create_task(asyncio.to_thread(batcher.run_here, rows(1)))
        await asyncio.sleep(0.02)
        tasks = [asyncio.create_task(batcher.run(rows(i))) for i in (2, 3)]
        await asyncio.sleep(0.02)
        assert batcher.depth == 2  # not taken out of the queue, where more can join them
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
