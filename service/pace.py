"""`Pace`: how fast work gets finished, measured while there is some; what `Retry-After` and early refusals go by."""

from collections.abc import Callable
from math import exp
from time import monotonic

WINDOW_S = 3.0  # busy seconds that count; older ones fade
LONGEST_S = 60.0  # nobody is sent away for longer


class Pace:
    """Finished per second of busy time, the last ``window_s`` of it above all. Idle time does not count, nor does time
    in which all wait for their callers: a slow line is not slow work.

    Count and seconds fade alike, and only when something is finished: of steady work the rate is exact, however slow.
    ``now``: a clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = monotonic, window_s: float = WINDOW_S) -> None:
        self.under_way = 0
        self._waiting = 0  # of them, for their callers
        self._now = now
        self._window_s = window_s
        self._seen = 0.0  # the clock when this was brought up to date
        self._open_s = 0.0  # busy since something was finished last
        self._busy_s = 0.0  # before
        self._finished = 0.0

    def begin(self) -> None:
        self._advance()
        self.under_way += 1

    def end(self, *, finished: bool = True) -> None:
        """``finished`` False: given up, so it says nothing about how fast work is done."""
        self._advance()
        self.under_way -= 1
        if finished:
            kept = exp(-self._open_s / self._window_s)
            self._busy_s = self._busy_s * kept + self._open_s
            self._finished = self._finished * kept + 1
            self._open_s = 0.0

    def wait(self, count: int) -> None:
        """``count`` 1: one of those under way waits for its caller from now on. -1: no longer."""
        self._advance()
        self._waiting += count

    @property
    def rate(self) -> float:
        """Per second; 0 while nothing has been finished."""
        self._advance()
        seconds = self._busy_s + self._open_s
        return self._finished / seconds if seconds else 0.0

    def seconds_for(self, count: float) -> float:
        """How long ``count`` of them will take; 0 where that is not known yet."""
        return count / self.rate if self.rate else 0.0

    @property
    def retry_after_s(self) -> float:
        """Seconds until all that is under way is done, within 1 and `LONGEST_S`."""
        return min(LONGEST_S, max(1.0, self.seconds_for(self.under_way)))

    def _advance(self) -> None:
        now = self._now()
        if self.under_way > self._waiting:
            self._open_s += now - self._seen
        self._seen = now
