"""`UnloadableSession`: a graph's session that leaves memory while it is idle. The next run opens it again."""

import threading
from collections.abc import Callable
from time import monotonic, perf_counter

from calmclip.models.flow import Array, Arrays
from calmclip.models.runtime.session import Session


class UnloadableSession:
    """``open_session`` is called at once, and by the first run after each unload; then ``opened`` gets the seconds that
    it took. ``closed`` is called after an unload. Several threads may call the methods; a run keeps its session.
    ``runs`` counts the runs.
    """

    def __init__(
        self,
        open_session: Callable[[], Session],
        opened: Callable[[float], None] = lambda seconds: None,
        closed: Callable[[], None] = lambda: None,
        now: Callable[[], float] = monotonic,
    ) -> None:
        self._open_session = open_session
        self._opened = opened
        self._closed = closed
        self._now = now
        self._lock = threading.Lock()
        self._running = 0
        self.runs = 0
        self._used = now()
        self._session: Session | None = None
        self._open()

    def run(self, feeds: Arrays) -> dict[str, Array]:
        """As `Session.run`; raises also what ``open_session`` raises."""
        with self._lock:
            session = self._open()
            self._running += 1
            self.runs += 1
        try:
            return session.run(feeds)
        finally:
            with self._lock:
                self._running -= 1
                self._used = self._now()

    @property
    def unloaded(self) -> bool:
        return self._session is None

    def unload(self, idle_s: float) -> bool:
        """Close the session if its last run ended at least ``idle_s`` ago. Returns whether it did."""
        with self._lock:
            due = self._session is not None and not self._running and self._now() - self._used >= idle_s
            if due:
                self._session = None
                self._closed()
            return due

    def _open(self) -> Session:
        if self._session is None:
            start = perf_counter()
            self._session = self._open_session()
            self._opened(perf_counter() - start)
        return self._session
