"""`Resting`: a graph's session that leaves memory while nobody uses it and is opened again by the next run."""

import threading
from collections.abc import Callable
from time import monotonic, perf_counter

from calmclip.models.flow import Array, Arrays
from calmclip.models.runtime.session import Session


class Resting:
    """``open_session`` opens the session, at once and after each rest; ``opened`` is told the seconds, ``closed`` that
    it rests. `run` and `rest` may be called from several threads; a run under way keeps its session.
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
        self._used = now()
        self._session: Session | None = None
        self._wake()

    def run(self, feeds: Arrays) -> dict[str, Array]:
        """As `Session.run`; raises what opening it raises."""
        with self._lock:
            session = self._wake()
            self._running += 1
        try:
            return session.run(feeds)
        finally:
            with self._lock:
                self._running -= 1
                self._used = self._now()

    @property
    def rests(self) -> bool:
        """Whether the next run opens it first."""
        return self._session is None

    def rest(self, idle_s: float) -> bool:
        """Close it when its last run ended ``idle_s`` ago or earlier; whether it did."""
        with self._lock:
            due = self._session is not None and not self._running and self._now() - self._used >= idle_s
            if due:
                self._session = None
                self._closed()
            return due

    def _wake(self) -> Session:
        if self._session is None:
            start = perf_counter()
            self._session = self._open_session()
            self._opened(perf_counter() - start)
        return self._session
