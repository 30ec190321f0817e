"""`Stopwatch`: durations of named stages."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Sums seconds by stage name, in the order in which the stages first occur."""

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
        """``end`` (by `perf_counter`; None: now) and ``about`` are for subclasses that record each stage."""
        self.stages[name] = self.stages.get(name, 0.0) + seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self._start
