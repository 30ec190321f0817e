"""`Admission`: two gates that bound the work in flight. What a request reserves counts until the request ends.

The first gate is before the body: it checks the number of requests in flight, announced bytes and the deadline. The
second gate is behind the picture's header: it checks the pixels that will be decoded. While no other request holds any
bytes or pixels, a request of any size passes: `Settings.limits` bounds a single request.
"""

from collections import defaultdict
from collections.abc import Callable
from time import monotonic

from calmclip.models.errors import Overloaded
from calmclip.service.settings import Settings
from calmclip.service.throughput import Throughput

# A request is admitted if its estimated time is at most this share of its time left. The estimate is a mean, so half of
# the requests that just fit would be late.
DEADLINE_SHARE = 0.5
HASTE_REQUESTS = 32  # over so many requests the mean of their haste fades


class TaskGate:
    """The deadline's gate of one task. ``now``: a clock in seconds.

    A request's haste is 1 over the seconds that it has left. The mean over all that ask, refused ones included, says
    what deadline the gate must meet: few requests with long deadlines do not hide many with short ones.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.throughput = Throughput(now)
        self._haste = 0.0  # 1/s

    def ask(self, left_s: float) -> None:
        haste = 1 / max(left_s, 1e-3)
        self._haste += (haste - self._haste) / HASTE_REQUESTS if self._haste else haste

    def fits(self, left_s: float) -> bool:
        """Whether one more request would be done in its time. A request alone always passes: else a throughput that was
        slow once would stay slow."""
        alone = not self.throughput.in_flight
        return alone or self.throughput.seconds_for(self.throughput.in_flight + 1) <= DEADLINE_SHARE * left_s

    def admissible(self, most: int) -> int:
        """How many requests the gate would admit at once at the present rate, 1 .. ``most``."""
        rate = self.throughput.rate
        return max(1, min(most, int(DEADLINE_SHARE * rate / self._haste))) if rate and self._haste else most


class Reservation:
    """What one admitted request holds until `release`."""

    def __init__(self, gate: "Admission", throughputs: tuple[Throughput, ...], size: int) -> None:
        self._gate = gate
        self._throughputs = throughputs
        self._task = throughputs[-1]
        self.bytes = 0
        self.pixels = 0
        self._waits = False
        self.reserve_bytes(size)
        for throughput in throughputs:
            throughput.begin()

    def reserve_bytes(self, count: int) -> None:
        """Raises `Overloaded`."""
        gate = self._gate
        if count and gate.bytes > self.bytes and gate.bytes + count > gate.max_bytes:
            raise gate.overloaded("bytes", f"requests in flight hold {gate.bytes} bytes of at most {gate.max_bytes}")
        self.bytes += count
        gate.bytes += count

    def reserve_pixels(self, count: int) -> None:
        """Raises `Overloaded`."""
        gate = self._gate
        if gate.pixels > self.pixels and gate.pixels + count > gate.max_pixels:
            raise gate.overloaded(
                "pixels", f"pictures in flight hold {gate.pixels} pixels of at most {gate.max_pixels}"
            )
        self.pixels += count
        gate.pixels += count

    def weigh(self, count: int) -> None:
        """The request is ``count`` units of work for its task, at least 1: a task's throughput counts pictures, whether
        they come in one request or in many. To be called once, before an answer begins."""
        self._throughputs += (self._task,) * (count - 1)
        for _ in range(count - 1):
            self._task.begin()

    def set_waits(self, waits: bool) -> None:
        """Whether the request waits for its client, which sends a body or receives an answer. That is not work."""
        if waits != self._waits:
            self._waits = waits
            for throughput in self._throughputs:
                throughput.add_waiting(1 if waits else -1)

    def release(self, *, finished: bool = True) -> None:
        """``finished`` False: the request was given up, so it does not count as finished work."""
        self.set_waits(False)
        self._gate.bytes -= self.bytes
        self._gate.pixels -= self.pixels
        for throughput in self._throughputs:
            throughput.end(finished=finished)


class Admission:
    """One per app. ``now``: a clock in seconds."""

    def __init__(self, settings: Settings, now: Callable[[], float] = monotonic) -> None:
        self.max_pending = settings.queue.max_pending
        self.max_bytes = settings.queue.max_bytes
        self.max_pixels = settings.queue.max_pixels
        self.bytes = 0
        self.pixels = 0
        self.leaving = False  # the service shuts down but still serves; `/readyz` answers 503
        self.closed = False  # no new request is admitted
        self.throughput = Throughput(now)
        self._by_task: defaultdict[str, TaskGate] = defaultdict(lambda: TaskGate(now))
        self._max_body = settings.limits.body_bytes

    @property
    def pending(self) -> int:
        """Requests in flight."""
        return self.throughput.in_flight

    def task_pending(self, task: str) -> int:
        """Requests of ``task`` in flight; one with many pictures counts as so many."""
        return self._by_task[task].throughput.in_flight

    def task_admissible(self, task: str) -> int:
        """How many requests of ``task`` would be admitted at once now: all gates but bytes and pixels."""
        return self._by_task[task].admissible(self.max_pending)

    def concurrent(self) -> bool:
        """Whether several requests are in flight, so that calls may come which can be merged."""
        return self.pending > 1 and not self.leaving

    def overloaded(self, reason: str, message: str) -> Overloaded:
        wait = self.throughput.retry_after_s
        return Overloaded(f"{message}; try again in {wait:.0f} s", retry_after=wait, reason=reason)

    def admit(self, task: str, left_s: float, announced: int | None = 0) -> Reservation:
        """``left_s``: seconds until the request's deadline. ``announced``: bytes of its body, None if unknown.

        Raises `Overloaded`, before a byte of the body is read.
        """
        if self.closed:
            raise self.overloaded("leaving", "the service is shutting down")
        gate, throughput = self._by_task[task], self._by_task[task].throughput
        gate.ask(left_s)
        if self.pending >= self.max_pending:
            raise self.overloaded("requests", f"{self.pending} requests are in flight, the most allowed")
        if not gate.fits(left_s):
            needed = throughput.seconds_for(throughput.in_flight + 1)
            raise self.overloaded(
                "deadline",
                f"this request would take {needed:.1f} s behind {throughput.in_flight} requests in flight, "
                f"and its deadline is in {max(0.0, left_s):.1f} s",
            )
        return Reservation(self, (self.throughput, throughput), min(announced or 0, self._max_body))
