"""`Context`: what belongs to one request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from fastapi import Request

from calmclip.models.errors import DeadlineExceeded
from calmclip.models.runtime.clock import Stopwatch

if TYPE_CHECKING:
    from calmclip.service.admission import Place


@dataclass
class Context:
    """One request: who it is, what it has cost so far, when it must be over. Made by the middleware."""

    id: str
    deadline_s: float  # seconds after the start; the caller may ask for less than the service allows
    clock: Stopwatch = field(default_factory=Stopwatch)
    graphs: dict[tuple[str, str], float] = field(default_factory=dict)  # (stage, graph) -> seconds
    task: str = "other"  # what it counts as: the endpoint's
    model: str = ""
    key: str = ""  # name of the one it came with
    problem: str = ""  # slug of the problem that was answered
    head_s: float = 0.0  # until the first byte of the answer
    shed: str = ""  # why it was turned away, if it was
    pictures: list[tuple[int, int]] = field(default_factory=list)  # bytes and pixels of those that passed
    place: "Place | None" = None  # what it holds of the bytes and pixels under way, once it is admitted
    status: int = 0
    answered: float | None = None  # perf_counter when the answer was there
    trace: str = ""  # its trace id, where it was traced and sampled

    def spent(self, stage: str, graph: str, seconds: float, end: float, **about: int) -> None:
        """Time in or before a graph: on the clock under ``stage``, and by graph for the metrics."""
        self.clock.add(stage, seconds, end, graph=graph, **about)
        self.graphs[stage, graph] = self.graphs.get((stage, graph), 0.0) + seconds

    @asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """Raises `DeadlineExceeded` when the block is not done in what is left of the request's time."""
        try:
            async with asyncio.timeout(self.left_s):
                yield
        except TimeoutError:
            raise self.late() from None

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; negative behind it."""
        return self.deadline_s - self.clock.elapsed

    @property
    def until(self) -> float:
        """The deadline on `perf_counter`."""
        return perf_counter() + self.left_s

    def late(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"the request was not done after {self.deadline_s * 1000:.0f} ms; it was {self.where()}. "
            "Send less at once, or try later."
        )

    def where(self) -> str:
        stages = self.clock.stages
        return f"last at {next(reversed(stages))!r}" if stages else "still being read"


def context(request: Request) -> Context:
    found: Context = request.scope["calmclip.context"]
    return found
