"""`Connections`: the open connections of an app, and which of them closes when there are too many."""

from collections.abc import Callable, Hashable


class Connections:
    """One app's connections, at all its ports.

    If a new connection exceeds ``limit``, the connection closes that has waited longest for a request to begin: an idle
    one, one with slow headers, or the new one if all others are busy. So a client with many connections does not lock
    out others, such as liveness probes. ``crowded`` is called for each connection that closes so.
    """

    def __init__(self, limit: int, crowded: Callable[[], None] = lambda: None) -> None:
        self.limit = limit
        self.open = 0
        self._crowded = crowded
        self._waiting: dict[Hashable, Callable[[], None]] = {}  # to close them; the longest wait first

    def opened(self, connection: Hashable, close: Callable[[], None]) -> None:
        self.open += 1
        self.waiting(connection, close)
        if self.open > self.limit:
            oldest = next(iter(self._waiting))
            self._crowded()
            self._waiting.pop(oldest)()

    def waiting(self, connection: Hashable, close: Callable[[], None]) -> None:
        """The connection waits for a request to begin; ``close`` closes it. A second call changes nothing."""
        self._waiting.setdefault(connection, close)

    def busy(self, connection: Hashable) -> None:
        self._waiting.pop(connection, None)

    def lost(self, connection: Hashable) -> None:
        self.open -= 1
        self.busy(connection)
