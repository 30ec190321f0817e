"""`Context`: the state of one request."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter

from fastapi import Request

from calmclip.models.errors import DeadlineExceeded
from calmclip.models.flow import Arrays
from calmclip.models.runtime.clock import Stopwatch
from calmclip.service.dialects import OURS, Dialect

# HTTP status -> outcome, for statuses whose class (4xx, 5xx) says too little.
OUTCOMES = {499: "cancelled", 504: "deadline"}


def unbounded(count: int) -> None:
    """The reservation of a request that passes no gate."""


def _nothing(waits: bool) -> None:
    """Of a request that no gate counts."""


@dataclass
class Operation:
    """What OpenTelemetry's conventions for generative AI say of a request, see `tracing` and `metrics`.

    ``name``: as there, such as `embeddings`. ``tokens``: of all texts; None until they are counted. ``dimensions``: of
    the vectors in the answer; 0 without one. ``formats``: encodings that the request asks for.
    """

    name: str
    tokens: int | None = None
    dimensions: int = 0
    formats: tuple[str, ...] = ()


@dataclass
class Context:
    """One request: its identity, its deadline, and what it has cost so far. The middleware makes it."""

    id: str
    deadline_s: float  # seconds after the start; the client may ask for less than the service allows
    clock: Stopwatch = field(default_factory=Stopwatch)
    graphs: dict[tuple[str, str], float] = field(default_factory=dict)  # (stage, graph) -> seconds
    task: str = "other"  # the endpoint's
    dialect: Dialect = OURS  # the endpoint's
    operation: Operation | None = None
    model: str = ""
    key: str = ""  # name of the API key
    problem: str = ""  # slug of the problem in the answer
    head_s: float = 0.0  # seconds until the first byte of the answer
    shed: str = ""  # reason of an `Overloaded`
    pictures: list[tuple[int, int]] = field(default_factory=list)  # bytes and pixels of each accepted picture
    reserve_bytes: Callable[[int], None] = unbounded  # both raise `Overloaded`
    reserve_pixels: Callable[[int], None] = unbounded
    weigh: Callable[[int], None] = unbounded  # the request is so many pictures of work
    wait: Callable[[bool], None] = _nothing  # whether the request waits for its client
    status: int = 0
    answered: float | None = None  # perf_counter when the handler had its answer
    trace: str = ""  # trace id, if the request was traced and sampled
    partial: bool = False  # made by `part`
    # Outputs of rows by graph and key, for a request whose flows need them again, whatever the cache holds.
    kept: dict[tuple[str, str], Arrays] | None = None
    faults: list[str] = field(default_factory=list)  # slugs of the problems of single pictures in an answer
    streams: bool = False  # the answer has begun, and its work goes on
    head_part: "Context | None" = None  # the part whose answer is the first line of a stream

    @classmethod
    def of(cls, request: Request) -> "Context":
        context: Context = request.scope["calmclip.context"]
        return context

    def spent(self, stage: str, graph: str, seconds: float, end: float, **about: int) -> None:
        """Add time in or before a graph: to the clock under ``stage``, and by graph for the metrics."""
        self.clock.add(stage, seconds, end, graph=graph, **about)
        self.graphs[stage, graph] = self.graphs.get((stage, graph), 0.0) + seconds

    def part(self) -> "Context":
        """The context of work that runs beside other work of this request: it has a clock of its own, because a
        stopwatch belongs to one thread at a time. `join` adds its times."""
        return replace(self, clock=Stopwatch(), graphs={}, deadline_s=self.left_s, partial=True)

    def join(self, parts: Sequence["Context"], start: float) -> None:
        """Add the times of parts that ran beside each other from ``start`` (by `perf_counter`) until now.

        They overlap, and the request's stages add up to its duration. So work counts in full, or less if several
        threads worked; the wait is what remains.
        """
        spent: dict[tuple[str, str], float] = {}  # (stage, graph or "") -> seconds
        for part in parts:  # the thread of a part that was given up may still add
            graphs = [*part.graphs.items()]
            rests = [
                ((stage, ""), max(0.0, seconds - sum(s for (name, _), s in graphs if name == stage)))
                for stage, seconds in [*part.clock.stages.items()]
            ]
            for key, seconds in [*graphs, *rests]:
                spent[key] = spent.get(key, 0.0) + seconds
        duration = perf_counter() - start
        waited = sum(seconds for (stage, _), seconds in spent.items() if stage == "queue")
        worked = sum(spent.values()) - waited
        left = max(0.0, duration - worked)
        for (stage, graph), seconds in spent.items():
            share = left / max(waited, left, 1e-9) if stage == "queue" else min(1.0, duration / max(worked, 1e-9))
            start += seconds * share
            if graph:
                self.spent(stage, graph, seconds * share, start)
            elif seconds:
                self.clock.add(stage, seconds * share, start)

    def stages(self) -> dict[str, float]:
        """Seconds by stage until now, for the head of an answer. That of a stream has the stages of its first line:
        `join` adds those of all parts at the end."""
        seconds = dict(self.clock.stages)
        for stage, more in [*self.head_part.clock.stages.items()] if self.head_part else ():
            seconds[stage] = seconds.get(stage, 0.0) + more
        return seconds

    @asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """Raises `DeadlineExceeded` if the block does not end in the request's time."""
        try:
            async with asyncio.timeout(self.left_s):
                yield
        except TimeoutError:
            raise self.late() from None

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline_s - self.clock.elapsed

    @property
    def until(self) -> float:
        """The deadline on `perf_counter`."""
        return perf_counter() + self.left_s

    @property
    def error_type(self) -> str:
        """The problem's slug, else the status of a request without an answer, "" for a success."""
        return self.problem or (str(self.status) if self.status >= 400 else "")

    @property
    def outcome(self) -> str:
        """How the request ended. ``ok``: it was answered without a problem."""
        if self.shed:
            return "shed"
        if self.status in OUTCOMES:
            return OUTCOMES[self.status]
        return "ok" if not self.problem else "client_error" if 400 <= self.status < 500 else "error"

    def late(self) -> DeadlineExceeded:
        last = next(reversed(self.clock.stages), "")
        return DeadlineExceeded(
            f"the request was not done after {self.deadline_s * 1000:.0f} ms; "
            f"{f'its last stage was {last!r}' if last else 'it was still being read'}. Send less at once, or try later."
        )
