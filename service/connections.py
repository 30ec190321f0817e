"""`Connections`: how many are open, and which of them goes where there are too many."""

from collections.abc import Callable, Hashable


class Connections:
    """Of one app, at all its ports.

    One over ``limit`` costs the one that has waited longest for a request to begin its place: an idle one, one whose
    headers drip, or the newcomer itself where all others are at work. So whoever opens many does not shut others out,
    a probe for life least of all. ``crowded`` is told of each.
    """

    def __init__(self, limit: int, crowded: Callable[[], None] = lambda: None) -> None:
        self.limit = limit
        self.open = 0
        self._crowded = crowded
        self._waiting: dict[Hashable, Callable[[], None]] = {}  # the longest first

    def opened(self, connection: Hashable, close: Callable[[], None]) -> None:
        self.open += 1
        self.waits(connection, close)
        if self.open > self.limit:
            oldest = next(iter(self._waiting))
            self._crowded()
            self._waiting.pop(oldest)()

    def waits(self, connection: Hashable, close: Callable[[], None]) -> None:
        """For a request to begin, from now on or already; ``close`` ends that."""
        self._waiting.setdefault(connection, close)

    def works(self, connection: Hashable) -> None:
        self._waiting.pop(connection, None)

    def lost(self, connection: Hashable) -> None:
        self.open -= 1
        self.works(connection)
