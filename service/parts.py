"""`Service`: the parts of one app, and how a request gets at them."""

from dataclasses import dataclass

from fastapi import Request

from calmclip.service.admission import Admission
from calmclip.service.classifiers import Classifiers
from calmclip.service.collections import Collections
from calmclip.service.connections import Connections
from calmclip.service.engine import Engine
from calmclip.service.fetching import Fetcher
from calmclip.service.hub import Hub
from calmclip.service.metrics import Metrics
from calmclip.service.settings import Settings


@dataclass(frozen=True)
class Service:
    """The parts of one app, as `create_app` wired them."""

    settings: Settings
    metrics: Metrics
    admission: Admission
    hub: Hub
    engine: Engine
    collections: Collections
    classifiers: Classifiers
    fetcher: Fetcher
    connections: Connections

    @classmethod
    def of(cls, request: Request) -> "Service":
        parts: Service = request.app.state.service
        return parts

    @property
    def failed(self) -> dict[str, str]:
        """Name -> reason, for all that keeps the service from being ready; `/readyz` shows it."""
        leaving = {"service": "it is shutting down"} if self.admission.leaving else {}
        return {**self.collections.failed, **self.hub.failed, **leaving}

    @property
    def ready(self) -> bool:
        return self.hub.ready and not self.collections.loading and not self.failed

    def watch(self) -> None:
        """Let the gauges of `metrics` read the other parts at each scrape."""
        metrics, gate, connections = self.metrics, self.admission, self.connections
        metrics.pending.set_function(lambda: gate.pending)
        metrics.pending_limit.set(gate.max_pending)
        metrics.pending_bytes.set_function(lambda: gate.bytes)
        metrics.pending_bytes_limit.set(gate.max_bytes)
        metrics.pending_pixels.set_function(lambda: gate.pixels)
        metrics.pending_pixels_limit.set(gate.max_pixels)
        metrics.drain_rate.set_function(lambda: gate.throughput.rate)
        metrics.retry_after.set_function(lambda: gate.throughput.retry_after_s)
        metrics.connections.set_function(lambda: connections.open)
        metrics.connections_limit.set(connections.limit)
        metrics.ready.set_function(lambda: float(self.ready))
        metrics.failed.labels("bundles").set_function(lambda: len(self.hub.failed))
        metrics.failed.labels("collections").set_function(lambda: len(self.collections.failed))
