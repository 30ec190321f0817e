"""A flow stops at its calls, its work is timed by stage, and its errors reach the driver."""

from typing import Any

import numpy as np
import pytest

from calmclip.models.flow import CacheGet, Call, Done, Flow, Together, Walk, Work, drive
from calmclip.models.runtime.clock import Stopwatch

ONE = {"x": np.ones(1)}


def double_twice(start: int) -> Flow[int]:
    """Two calls, with work before and between them."""
    ready = yield Work("decode", lambda: start + 1)
    first = yield Call("double", {"x": np.array(ready)})
    middle = yield Work("between", lambda: int(first["y"]) + 1)
    second = yield Call("double", {"x": np.array(middle)})
    return int(second["y"])


def run(call: Call) -> dict[str, Any]:
    assert call.graph == "double"
    return {"y": call.feeds["x"] * 2}


def test_drive_answers_calls_and_returns_the_value():
    assert drive(double_twice(4), run) == 22  # (4 + 1) * 2 = 10, (10 + 1) * 2 = 22


def test_stages_are_in_the_order_of_their_first_use():
    clock = Stopwatch()
    drive(double_twice(4), run, clock)
    assert list(clock.stages) == ["preprocess", "decode", "infer", "postprocess", "between"]
    assert all(seconds >= 0 for seconds in clock.stages.values())
    assert sum(clock.stages.values()) <= clock.elapsed


def test_a_walk_stops_at_each_call_and_then_is_done():
    walk = Walk(double_twice(0), Stopwatch())
    first = walk.step()
    assert isinstance(first, Call)
    assert first.feeds["x"] == 1
    second = walk.step({"y": np.array(7)})
    assert isinstance(second, Call)
    assert second.feeds["x"] == 8
    assert walk.step({"y": np.array(5)}) == Done(5)


def test_cached_rows_need_no_call():
    def flow() -> Flow[list[Any]]:
        cached = yield CacheGet("double", ("one",))
        rows = cached["one"] if cached else (yield Call("double", ONE, ("one",)))
        return rows["y"].tolist()

    assert drive(flow(), run) == [2]  # `drive` without a cache
    clock, requests = Stopwatch(), []
    walk = Walk(flow(), clock, lambda request: requests.append(request) or {"one": {"y": np.array([3])}})
    assert walk.step() == Done([3])
    assert requests == [CacheGet("double", ("one",))]
    assert list(clock.stages) == ["preprocess"]


def test_a_flow_without_calls_is_done_at_once():
    def flow() -> Flow[str]:
        return (yield Work("decode", lambda: "value"))

    def nothing() -> Flow[None]:
        return
        yield

    assert drive(flow(), run) == "value"
    assert Walk(nothing(), Stopwatch()).step() == Done(None)


@pytest.mark.parametrize("place", ["flow", "work", "run"])
def test_errors_reach_the_driver_and_are_timed(place: str):
    def fail(*_: Any) -> Any:
        raise ValueError(place)

    def flow() -> Flow[None]:
        if place == "flow":
            fail()
        yield Work("decode", fail if place == "work" else lambda: None)
        yield Call("double", ONE)

    clock = Stopwatch()
    with pytest.raises(ValueError, match=place):
        drive(flow(), fail, clock)
    assert {"flow": "preprocess", "work": "decode", "run": "infer"}[place] in clock.stages


def test_a_stop_iteration_inside_a_flow_is_not_taken_for_its_end():
    """PEP 479: a generator that leaks it raises RuntimeError."""

    def flow() -> Flow[None]:
        yield Work("decode", lambda: None)
        next(iter(()))

    with pytest.raises(RuntimeError, match="generator raised StopIteration"):
        drive(flow(), run)


def many(*starts: int) -> Flow[list[int]]:
    """`Together` within `Together`: the last two flows are in one of their own."""

    def last() -> Flow[list[int]]:
        answers: list[int] = yield Together([double_twice(start) for start in starts[-2:]])
        return answers

    first = yield Together([*(double_twice(start) for start in starts[:-2]), last()])
    return [*first[:-1], *first[-1]]


def test_flows_that_run_together_answer_in_their_order():
    assert drive(many(4, 0, 1, 2), run) == [22, 6, 10, 14]  # ((x + 1) * 2 + 1) * 2
    assert drive(many(1, 2), run) == [10, 14]


def test_a_driver_that_splits_gets_the_flows_and_others_get_their_calls():
    walk = Walk(many(4, 0, 1), Stopwatch(), splits=True)
    state = walk.step()
    assert isinstance(state, Together)
    assert [drive(part, run) for part in state.flows] == [22, [6, 10]]
    assert walk.step([7, [8, 9]]) == Done([7, 8, 9])
    other = Walk(many(4, 0, 1), Stopwatch())
    calls = [other.step()]
    while isinstance(calls[-1], Call):
        calls.append(other.step(run(calls[-1])))
    assert [call.feeds["x"] for call in calls[:-1]] == [5, 11, 1, 3, 2, 5]
    assert calls[-1] == Done([22, 6, 10])


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_of_a_flow_among_others_ends_all_and_closes_them(bad: int):
    closed = []

    def flow(index: int) -> Flow[None]:
        try:
            yield Work("decode", lambda: 1 // (index != bad))
            yield Call("double", ONE)
        finally:
            closed.append(index)

    def both() -> Flow[None]:
        try:
            yield Together([flow(0), flow(1)])
        finally:
            closed.append(2)

    with pytest.raises(ZeroDivisionError):
        drive(both(), run)
    assert closed == [*range(bad + 1), 2]


def test_a_stopwatch_adds_up_by_name():
    clock = Stopwatch()
    clock.add("infer", 1.5)
    clock.add("infer", 0.25)
    with clock.stage("decode"):
        pass
    assert clock.stages["infer"] == 1.75
    assert list(clock.stages) == ["infer", "decode"]
