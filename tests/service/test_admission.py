"""Both gates, and the pace that `Retry-After` goes by, on a clock that stands still until it is moved."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from calmclip.models.errors import Overloaded
from calmclip.service.admission import Admission, Place
from calmclip.service.pace import Pace
from calmclip.service.request import Context
from calmclip.service.settings import Settings


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def steady(pace: Pace, clock: Clock, seconds: float, each: float, *, finished: bool = True) -> None:
    for _ in range(round(seconds / each)):
        pace.begin()
        clock.now += each
        pace.end(finished=finished)


def test_the_pace_is_what_was_finished_per_busy_second(clock):
    pace = Pace(clock)
    assert (pace.rate, pace.seconds_for(10), pace.retry_after_s) == (0, 0, 1)
    steady(pace, clock, 60, 0.1)
    assert pace.rate == pytest.approx(10, rel=0.001)
    clock.now += 3600  # nothing under way: it says nothing about how fast work is done
    pace.begin()
    pace.end()
    assert pace.rate == pytest.approx(10, rel=0.05)
    assert pace.seconds_for(25) == pytest.approx(2.5, rel=0.05)


def test_the_pace_follows_and_counts_no_work_given_up(clock):
    pace = Pace(clock)
    steady(pace, clock, 60, 0.1)
    steady(pace, clock, 30, 1.0)
    assert pace.rate == pytest.approx(1, rel=0.01)
    steady(pace, clock, 30, 0.1, finished=False)
    assert pace.rate < 0.15
    steady(pace, clock, 300, 10.0)
    assert pace.rate == pytest.approx(0.1, rel=0.01)


def test_several_at_once_count_together(clock):
    pace = Pace(clock)
    for _ in range(100):
        for _ in range(8):
            pace.begin()
        clock.now += 0.5
        for _ in range(8):
            pace.end()
    assert pace.rate == pytest.approx(16, rel=0.001)


def settings(**queue: int) -> Settings:
    return Settings(queue=queue)


def own(deadline_s: float = 60.0, task: str = "classify") -> Context:
    return Context("id", deadline_s, task=task)


@contextmanager
def held(gate: Admission, own: Context, announced: int | None = 0) -> Iterator[Place]:
    place = gate.admit(own, announced)
    try:
        yield place
    finally:
        place.leave()


def test_a_full_service_says_how_long_its_requests_will_take(clock):
    gate = Admission(settings(max_pending=40), clock)
    steady(gate.pace, clock, 60, 0.25)  # 4 per second
    places = [gate.admit(own()) for _ in range(40)]
    with pytest.raises(Overloaded, match="40 requests are under way") as full:
        gate.admit(own())
    assert full.value.reason == "requests"
    assert full.value.retry_after == pytest.approx(10, rel=0.001)  # 40 at 4 per second
    for place in places:
        place.leave()
    assert gate.pending == 0


@pytest.mark.parametrize(("per_second", "wanted"), [(100, 1), (0.1, 60)])
def test_nobody_is_sent_away_for_less_than_a_second_or_more_than_a_minute(clock, per_second, wanted):
    pace = Pace(clock)
    steady(pace, clock, 100, 1 / per_second)
    for _ in range(20):
        pace.begin()
    assert pace.retry_after_s == wanted


def test_who_has_no_chance_to_be_in_time_is_turned_away_at_once(clock):
    gate = Admission(settings(), clock)
    for _ in range(100):
        with held(gate, own()):
            clock.now += 0.25  # 4 per second
    with held(gate, own(0.01)):  # alone: how else should the pace ever be found to have changed
        pass
    with held(gate, own()), held(gate, own()), held(gate, own()):
        with pytest.raises(Overloaded, match="behind 3 requests") as shed:  # 4 in line take a second
            gate.admit(own(1.0))
        with held(gate, own(3.0)), held(gate, own(0.1, "detect")):  # in time; another kind of work
            pass
    assert shed.value.reason == "deadline"
    assert gate.pending == 0


def test_announced_bytes_and_pixels_have_their_limits_and_are_given_back(clock):
    gate = Admission(settings(max_bytes=1000, max_pixels=500), clock)
    with held(gate, own(), 5000) as first:  # alone, so its size is not this gate's business
        assert gate.bytes == 5000
        with pytest.raises(Overloaded, match="5000 bytes") as bytes_:
            gate.admit(own(), 1)
        first.more_pixels(400)
        first.more_pixels(400)  # its own pictures do not stand in its way
        with held(gate, own(), None) as second:
            with pytest.raises(Overloaded, match="800 pixels") as pixels:
                second.more_pixels(1)
            with pytest.raises(Overloaded):
                second.more_bytes(1)  # a body in chunks is counted as it comes
    assert (bytes_.value.reason, pixels.value.reason) == ("bytes", "pixels")
    assert (gate.pending, gate.bytes, gate.pixels) == (0, 0, 0)


def test_who_keeps_us_waiting_says_nothing_about_the_pace(clock):
    gate = Admission(settings(), clock)
    for _ in range(100):
        with held(gate, own()):
            clock.now += 0.25  # 4 per second
    with held(gate, own()) as dripping:
        dripping.waits(True)
        clock.now += 60
        with held(gate, own()):
            clock.now += 0.25
        assert gate.pace.rate == pytest.approx(4, rel=0.01)
        with held(gate, own(2.0)):  # 2 in line take half a second
            pass
    with held(gate, own()):
        clock.now += 1000
    assert gate.pace.rate < 0.1  # nobody waits any more, and it counts again


@pytest.mark.parametrize("finished", [True, False])
def test_a_request_gives_its_place_back_however_it_ends(clock, finished):
    gate = Admission(settings(), clock)
    place = gate.admit(own(), 10)
    place.more_pixels(10)
    clock.now += 1
    place.leave(finished=finished)
    assert (gate.pending, gate.bytes, gate.pixels) == (0, 0, 0)
    assert bool(gate.pace.rate) == finished


def test_a_service_that_closes_lets_nobody_in_and_waits_for_no_company(clock):
    gate = Admission(settings(), clock)
    with held(gate, own()), held(gate, own()):
        assert gate.company()
        gate.leaving = True
        assert not gate.company()
        with held(gate, own()):  # still served
            pass
        gate.closed = True
        with pytest.raises(Overloaded, match="shutting down") as shed:
            gate.admit(own())
    assert shed.value.reason == "leaving"
