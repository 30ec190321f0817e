"""`Admission`: the two gates. What is let in is counted until its request ends, whichever way it ends.

The first gate is before the body: requests under way, the bytes they announced, and whether this one can still be
in time. The second is behind the picture's header: pixels that will be decoded. Who finds nothing of a kind under way
passes whatever its size: the limits of a single request are others' business.
"""

from collections import defaultdict
from collections.abc import Callable
from time import monotonic

from calmclip.models.errors import Overloaded
from calmclip.service.pace import Pace
from calmclip.service.request import Context
from calmclip.service.settings import Settings

HOPE = 0.5  # of the time that is left: the pace is a mean, and what just fits is late every other time


class Place:
    """What one request holds of what may be under way, until it leaves. Raises `Overloaded`."""

    def __init__(self, gate: "Admission", paces: tuple[Pace, ...], size: int) -> None:
        self._gate = gate
        self._paces = paces
        self.bytes = 0
        self.pixels = 0
        self._waits = False
        self.more_bytes(size)
        for pace in paces:
            pace.begin()

    def more_bytes(self, count: int) -> None:
        """Raises `Overloaded`."""
        gate = self._gate
        others = gate.bytes - self.bytes
        if count and others and gate.bytes + count > gate.max_bytes:
            raise gate.full("bytes", f"requests under way have {gate.bytes} bytes, and at most {gate.max_bytes} may be")
        self.bytes += count
        gate.bytes += count

    def more_pixels(self, count: int) -> None:
        """Raises `Overloaded`."""
        gate = self._gate
        others = gate.pixels - self.pixels
        if others and gate.pixels + count > gate.max_pixels:
            raise gate.full(
                "pixels", f"pictures under way have {gate.pixels} pixels, and at most {gate.max_pixels} may be"
            )
        self.pixels += count
        gate.pixels += count

    def waits(self, for_caller: bool) -> None:
        """Whether it is the caller who keeps it here, with a body to come or an answer to take: that is no work."""
        if for_caller != self._waits:
            self._waits = for_caller
            for pace in self._paces:
                pace.wait(1 if for_caller else -1)

    def leave(self, *, finished: bool = True) -> None:
        """``finished`` False: given up, so it says nothing about how fast work is done."""
        self.waits(False)
        self._gate.bytes -= self.bytes
        self._gate.pixels -= self.pixels
        for pace in self._paces:
            pace.end(finished=finished)


class Admission:
    """One per app. ``now``: a clock in seconds."""

    def __init__(self, settings: Settings, now: Callable[[], float] = monotonic) -> None:
        self.max_pending = settings.queue.max_pending
        self.max_bytes = settings.queue.max_bytes
        self.max_pixels = settings.queue.max_pixels
        self.bytes = 0
        self.pixels = 0
        self.leaving = False  # shutting down, and still serving: who asks whether this is ready is told
        self.closed = False  # what is under way is the last
        self.pace = Pace(now)
        self._paces: defaultdict[str, Pace] = defaultdict(lambda: Pace(now))  # by task: they cost differently
        self._max_body = settings.limits.body_bytes

    @property
    def pending(self) -> int:
        """Requests under way."""
        return self.pace.under_way

    def company(self) -> bool:
        """Whether more than one request is under way, so that calls may come that can be merged."""
        return self.pending > 1 and not self.leaving

    def full(self, reason: str, what: str) -> Overloaded:
        wait = self.pace.retry_after_s
        return Overloaded(f"{what}; try again in {wait:.0f} s", retry_after=wait, reason=reason)

    def admit(self, own: Context, announced: int | None = 0) -> Place:
        """A place for a request whose body will have ``announced`` bytes, so far as is known.

        Raises `Overloaded`, before a byte of the body is read.
        """
        if self.closed:
            raise self.full("leaving", "the service is shutting down")
        if self.pending >= self.max_pending:
            raise self.full("requests", f"{self.pending} requests are under way, the most allowed")
        pace = self._paces[own.task]
        needed = pace.seconds_for(pace.under_way + 1)
        if pace.under_way and needed > HOPE * own.left_s:
            raise self.full(
                "deadline",
                f"this would take {needed:.1f} s behind {pace.under_way} requests under way, "
                f"and must be done in {max(0.0, own.left_s):.1f} s",
            )
        return Place(self, (self.pace, pace), min(announced or 0, self._max_body))
