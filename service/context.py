"""What belongs to one request (`Context`) and to one app (`Service`), and how routes get at both."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from calmclip.models.errors import DeadlineExceeded
from calmclip.models.runtime.clock import Stopwatch

if TYPE_CHECKING:
    from calmclip.service.admission import Admission, Place
    from calmclip.service.collections import Collections
    from calmclip.service.connections import Connections
    from calmclip.service.engine import Engine
    from calmclip.service.fetching import Fetcher
    from calmclip.service.hub import Hub
    from calmclip.service.labels import LabelSets
    from calmclip.service.metrics import Metrics
    from calmclip.service.settings import Settings


# A request -> what it is about; the first that fits.
TASKS = tuple(
    (re.compile(pattern), task)
    for pattern, task in (
        ("[A-Z]+ /v1/classify", "classify"),
        ("[A-Z]+ /v1/detect", "detect"),
        ("[A-Z]+ /v1/(embed|embeddings)", "embed"),
        ("[A-Z]+ /v1/collections/[^/]+/search", "search"),
        ("(POST|DELETE) /v1/collections/[^/]+/items", "index"),
        ("[A-Z]+ /v1/collections(/.*)?", "collections"),
        ("[A-Z]+ /v1/label-sets(/.*)?", "labels"),
        ("[A-Z]+ /v2/models/[^/]+/infer", "infer"),
        (r"[A-Z]+ /(v1/models(/.*)?|v2(/.*)?|problems/.*|[a-z]+(\.[a-z]+)?)?", "catalog"),
    )
)


@dataclass
class Context:
    """One request: who it is, what it has cost so far, when it must be over. Made by the middleware."""

    id: str
    deadline_s: float  # seconds after the start; the caller may ask for less than the service allows
    clock: Stopwatch = field(default_factory=Stopwatch)
    graphs: dict[tuple[str, str], float] = field(default_factory=dict)  # (stage, graph) -> seconds
    task: str = "other"
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


@dataclass(frozen=True)
class Service:
    """The parts of one app, as `create_app` wired them."""

    settings: "Settings"
    metrics: "Metrics"
    admission: "Admission"
    hub: "Hub"
    engine: "Engine"
    collections: "Collections"
    labels: "LabelSets"
    fetcher: "Fetcher"
    connections: "Connections"

    @property
    def failed(self) -> dict[str, str]:
        """What does not open, or why the service is leaving: name -> reason, as `/readyz` says."""
        leaving = {"service": "it is shutting down"} if self.admission.leaving else {}
        return {**self.collections.failed, **self.hub.failed, **leaving}

    @property
    def ready(self) -> bool:
        return self.hub.ready and not self.collections.loading and not self.failed


def context(request: Request) -> Context:
    found: Context = request.scope["calmclip.context"]
    return found


def service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


def task_of(method: str, path: str) -> str:
    """What a request counts as, in metrics and paces."""
    asked = f"{method} {path}"
    return next((task for pattern, task in TASKS if pattern.fullmatch(asked)), "other")


async def _own(request: Request) -> Context:  # async: FastAPI sends plain functions through a thread pool
    return context(request)


async def _parts(request: Request) -> Service:
    return service(request)


Own = Annotated[Context, Depends(_own)]
Parts = Annotated[Service, Depends(_parts)]
