"""Admission and the throughput behind `Retry-After`, on a clock that a test moves."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from calmclip.models.errors import Overloaded
from calmclip.service.admission import Admission, Reservation
from calmclip.service.settings import Settings
from calmclip.service.throughput import Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def steady(throughput: Throughput, clock: Clock, seconds: float, each: float, *, finished: bool = True) -> None:
    for _ in range(round(seconds / each)):
        throughput.begin()
        clock.now += each
        throughput.end(finished=finished)


def test_the_throughput_is_finished_requests_per_busy_second(clock):
    throughput = Throughput(clock)
    assert (throughput.rate, throughput.seconds_for(10), throughput.retry_after_s) == (0, 0, 1)
    steady(throughput, clock, 60, 0.1)
    assert throughput.rate == pytest.approx(10, rel=0.001)
    clock.now += 3600  # an idle hour does not lower the throughput
    throughput.begin()
    throughput.end()
    assert throughput.rate == pytest.approx(10, rel=0.05)
    assert throughput.seconds_for(25) == pytest.approx(2.5, rel=0.05)


def test_the_throughput_follows_changes_and_counts_no_cancelled_request(clock):
    throughput = Throughput(clock)
    steady(throughput, clock, 60, 0.1)
    steady(throughput, clock, 30, 1.0)
    assert throughput.rate == pytest.approx(1, rel=0.01)
    steady(throughput, clock, 30, 0.1, finished=False)
    assert throughput.rate < 0.15
    steady(throughput, clock, 300, 10.0)
    assert throughput.rate == pytest.approx(0.1, rel=0.01)


def test_concurrent_requests_count_together(clock):
    throughput = Throughput(clock)
    for _ in range(100):
        for _ in range(8):
            throughput.begin()
        clock.now += 0.5
        for _ in range(8):
            throughput.end()
    assert throughput.rate == pytest.approx(16, rel=0.001)


def settings(**queue: int) -> Settings:
    return Settings(queue=queue)


@contextmanager
def held(
    gate: Admission, left_s: float = 60.0, announced: int | None = 0, task: str = "classify"
) -> Iterator[Reservation]:
    reservation = gate.admit(task, left_s, announced)
    try:
        yield reservation
    finally:
        reservation.release()


def test_a_full_service_says_how_long_its_requests_will_take(clock):
    gate = Admission(settings(max_pending=40), clock)
    steady(gate.throughput, clock, 60, 0.25)  # 4 per second
    held_by = [gate.admit("classify", 60) for _ in range(40)]
    with pytest.raises(Overloaded, match="40 requests are in flight") as full:
        gate.admit("classify", 60)
    assert full.value.reason == "requests"
    assert full.value.retry_after == pytest.approx(10, rel=0.001)  # 40 at 4 per second
    for reservation in held_by:
        reservation.release()
    assert gate.pending == 0


@pytest.mark.parametrize(("per_second", "wanted"), [(100, 1), (0.1, 60)])
def test_retry_after_is_between_a_second_and_a_minute(clock, per_second, wanted):
    throughput = Throughput(clock)
    steady(throughput, clock, 100, 1 / per_second)
    for _ in range(20):
        throughput.begin()
    assert throughput.retry_after_s == wanted


def test_a_request_that_cannot_meet_its_deadline_is_shed_at_once(clock):
    gate = Admission(settings(), clock)
    for _ in range(100):
        with held(gate):
            clock.now += 0.25  # 4 per second
    with held(gate, 0.01):  # admitted without concurrent requests, or a higher throughput would never be measured
        pass
    with held(gate), held(gate), held(gate):
        with pytest.raises(Overloaded, match="behind 3 requests") as shed:  # 4 requests take a second
            gate.admit("classify", 1.0)
        with held(gate, 3.0), held(gate, 0.1, task="detect"):  # in time; another task
            pass
    assert shed.value.reason == "deadline"
    assert gate.pending == 0


def test_announced_bytes_and_pixels_have_limits_and_are_released(clock):
    gate = Admission(settings(max_bytes=1000, max_pixels=500), clock)
    with held(gate, announced=5000) as first:  # no concurrent request, so the limit does not apply
        assert gate.bytes == 5000
        with pytest.raises(Overloaded, match="5000 bytes") as bytes_:
            gate.admit("classify", 60, 1)
        first.reserve_pixels(400)
        first.reserve_pixels(400)  # pictures of the same request do not count against it
        with held(gate, announced=None) as second:
            with pytest.raises(Overloaded, match="800 pixels") as pixels:
                second.reserve_pixels(1)
            with pytest.raises(Overloaded):
                second.reserve_bytes(1)  # a chunked body is counted chunk by chunk
    assert (bytes_.value.reason, pixels.value.reason) == ("bytes", "pixels")
    assert (gate.pending, gate.bytes, gate.pixels) == (0, 0, 0)


def test_waiting_for_a_client_does_not_lower_the_throughput(clock):
    gate = Admission(settings(), clock)
    for _ in range(100):
        with held(gate):
            clock.now += 0.25  # 4 per second
    with held(gate) as dripping:
        dripping.set_waits(True)
        clock.now += 60
        with held(gate):
            clock.now += 0.25
        assert gate.throughput.rate == pytest.approx(4, rel=0.01)
        with held(gate, 2.0):  # 2 requests take half a second
            pass
    with held(gate):
        clock.now += 1000
    assert gate.throughput.rate < 0.1  # the service does not wait for a client, so the time counts again


@pytest.mark.parametrize("finished", [True, False])
def test_a_request_releases_what_it_holds_however_it_ends(clock, finished):
    gate = Admission(settings(), clock)
    reservation = gate.admit("classify", 60, 10)
    reservation.reserve_pixels(10)
    clock.now += 1
    reservation.release(finished=finished)
    assert (gate.pending, gate.bytes, gate.pixels) == (0, 0, 0)
    assert bool(gate.throughput.rate) == finished


def test_a_closing_service_admits_no_request_and_waits_for_no_concurrent_calls(clock):
    gate = Admission(settings(), clock)
    with held(gate), held(gate):
        assert gate.concurrent()
        gate.leaving = True
        assert not gate.concurrent()
        with held(gate):  # still served
            pass
        gate.closed = True
        with pytest.raises(Overloaded, match="shutting down") as shed:
            gate.admit("classify", 60)
    assert shed.value.reason == "leaving"


def test_what_is_admissible_now_is_bounded_by_the_queue_and_by_the_deadlines_that_callers_ask_for(clock):
    gate = Admission(settings(max_pending=40), clock)
    assert gate.task_admissible("classify") == 40  # the throughput is not known yet
    for _ in range(100):
        with held(gate):
            clock.now += 0.1  # 10 per second
    assert gate.task_admissible("classify") == 40  # 60 s, half of which gives time for 300
    for _ in range(200):
        with held(gate, 1.0):
            clock.now += 0.1
    assert gate.task_admissible("classify") == 5  # half a second's work
    reservations = [gate.admit("classify", 1.0) for _ in range(5)]
    assert gate.task_pending("classify") == 5
    with pytest.raises(Overloaded):
        gate.admit("classify", 1.0)
    for reservation in reservations:
        reservation.release()
    for _ in range(200):  # refused requests count: half of all ask for a second, half for 0.1 s
        for left_s in (1.0, 0.1):
            with held(gate, left_s):
                clock.now += 0.1
    assert gate.task_admissible("classify") == 1
    assert gate.task_admissible("detect") == 40


def test_overload_from_the_first_request_on_does_not_stop_every_answer(clock):
    """Before a request has finished the throughput is unknown. If all miss their deadlines, none ever finishes."""
    gate = Admission(settings(), clock)
    admitted = 0
    for _ in range(100):
        reservations = []
        for _ in range(10):
            with suppress(Overloaded):
                reservations.append(gate.admit("classify", 0.2))
        admitted += len(reservations)
        clock.now += 0.2  # the work of four
        for reservation in reservations:
            reservation.release(finished=len(reservations) <= 4)
    assert gate.throughput.rate > 0
    assert 100 <= admitted < 500
