"""`Throughput`: requests finished per busy second. `Retry-After` and early refusals are computed from it."""

from collections.abc import Callable
from math import exp
from time import monotonic

WINDOW_S = 3.0  # time constant of the exponential fading, in busy seconds
MAX_RETRY_S = 60.0


class Throughput:
    """An exponentially fading mean over ``window_s`` of busy time. Time counts as busy while at least one request is in
    flight that does not wait for its client: a slow connection is not slow work.

    Count and seconds fade together, and only when a request finishes. So the rate of steady work is exact, however
    slow the work is. ``now``: a clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = monotonic, window_s: float = WINDOW_S) -> None:
        self.in_flight = 0
        self._waiting = 0  # requests in flight that wait for their clients
        self._now = now
        self._window_s = window_s
        self._updated = 0.0  # clock
        self._open_s = 0.0  # busy time since a request last finished
        self._busy_s = 0.0  # faded busy time before that
        self._finished = 0.0  # faded count

    def begin(self) -> None:
        self._update()
        self.in_flight += 1

    def end(self, *, finished: bool = True) -> None:
        """``finished`` False: the request was given up, so it does not count as finished work."""
        self._update()
        self.in_flight -= 1
        if finished:
            fade = exp(-self._open_s / self._window_s)
            self._busy_s = self._busy_s * fade + self._open_s
            self._finished = self._finished * fade + 1
            self._open_s = 0.0

    def add_waiting(self, count: int) -> None:
        """``count`` more requests in flight wait for their clients; -1: one less."""
        self._update()
        self._waiting += count

    @property
    def rate(self) -> float:
        """Requests per second; 0 while it is unknown.

        If the first requests all miss their deadlines, none finishes. Then the rate is not unknown for ever: it is less
        than one in all the time so far. Else the gate would go on to admit what cannot be done.
        """
        self._update()
        seconds = self._busy_s + self._open_s
        if self._finished:
            return self._finished / seconds if seconds else 0.0
        return 1 / seconds if seconds > self._window_s else 0.0

    def seconds_for(self, count: float) -> float:
        """Estimated seconds for ``count`` requests; 0 while the rate is unknown."""
        return count / self.rate if self.rate else 0.0

    @property
    def retry_after_s(self) -> float:
        """Estimated seconds until all requests in flight are done, clipped to 1 .. `MAX_RETRY_S`."""
        return min(MAX_RETRY_S, max(1.0, self.seconds_for(self.in_flight)))

    def _update(self) -> None:
        now = self._now()
        if self.in_flight > self._waiting:
            self._open_s += now - self._updated
        self._updated = now
