"""`Stopwatch`: named stage durations. No metric library in sight."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Adds up seconds by stage name, in the order in which stages were first seen."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._start = perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.add(name, perf_counter() - start)

    def add(self, name: str, seconds: float, end: float | None = None, **about: str | int) -> None:
        """``end`` (on `perf_counter`; without it, now) and ``about`` are for a watch that keeps laps. This adds up."""
        self.stages[name] = self.stages.get(name, 0.0) + seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the watch was made."""
        return perf_counter() - self._start
