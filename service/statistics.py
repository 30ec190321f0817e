"""`Statistics`: what the runs of one graph were and took, as Triton's statistics extension counts them.

Source: https://github.com/triton-inference-server/server, `docs/protocol/extension_statistics.md`.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from threading import Lock
from time import time


@dataclass
class Spent:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.ns += round(seconds * 1e9)


@dataclass
class Compute:
    """Of runs: ``input`` joins the rows of several calls, ``infer`` runs the graph, ``output`` parts the rows."""

    input: Spent = field(default_factory=Spent)
    infer: Spent = field(default_factory=Spent)
    output: Spent = field(default_factory=Spent)


class Statistics:
    """All calls of one graph since its bundle was loaded, whatever task made them. Threads may share it.

    ``calls`` that were answered and ``failed`` ones count with all their time. ``rows`` and ``runs`` are those of runs
    that gave an answer; ``sizes``: rows of a run -> its time. ``last_ms``: of the last call, since 1970.
    """

    def __init__(self) -> None:
        self.calls, self.failed, self.queue = Spent(), Spent(), Spent()
        self.compute = Compute()
        self.sizes: defaultdict[int, Compute] = defaultdict(Compute)
        self.rows = self.runs = self.last_ms = 0
        self._lock = Lock()

    def ran(self, rows: int, infer_s: float, input_s: float = 0.0, output_s: float = 0.0) -> None:
        with self._lock:
            self.rows += rows
            self.runs += 1
            for compute in (self.compute, self.sizes[rows]):
                compute.input.add(input_s)
                compute.infer.add(infer_s)
                compute.output.add(output_s)

    def answered(self, seconds: float, queue_s: float) -> None:
        with self._lock:
            self.calls.add(seconds)
            self.queue.add(queue_s)
            self.last_ms = round(time() * 1000)

    def broke(self, seconds: float) -> None:
        with self._lock:
            self.failed.add(seconds)
            self.last_ms = round(time() * 1000)
