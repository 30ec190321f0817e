"""`Service`: the parts of one app, and how a request gets at them."""

from dataclasses import dataclass
from functools import partial

from fastapi import Request

from calmclip.models.errors import BadRequest
from calmclip.service import resources
from calmclip.service.admission import Admission
from calmclip.service.classifiers import Classifiers
from calmclip.service.collections import Collections
from calmclip.service.connections import Connections
from calmclip.service.endpoints import READING, UNCOUNTED, registered
from calmclip.service.engine import Engine
from calmclip.service.fetching import Fetcher
from calmclip.service.hub import Hub
from calmclip.service.metrics import Metrics
from calmclip.service.relevance import Relevance
from calmclip.service.settings import Settings
from calmclip.service.stores import STORES


@dataclass(frozen=True)
class Service:
    """The parts of one app, as `create_app` wired them."""

    settings: Settings
    metrics: Metrics
    admission: Admission
    hub: Hub
    engine: Engine
    collections: Collections
    relevance: Relevance
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
        return {**self.hub.failed, **leaving}

    @property
    def degraded(self) -> dict[str, str]:
        """Name -> reason, for the collections that are not served. The service is ready for all other requests."""
        return {**self.collections.degraded, **self.unbound}

    @property
    def unbound(self) -> dict[str, str]:
        """The collections whose bundle is not loaded; none while bundles are loading."""
        if self.hub.loading:
            return {}
        return self.collections.unbound([loaded.embedding_digest for loaded in self.hub.all()])

    @property
    def ready(self) -> bool:
        return self.hub.ready and not self.collections.delays_ready and not self.failed

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
        metrics.collections_unbound.set_function(lambda: len(self.unbound))
        metrics.replicas_expected.set(self.settings.replicas)
        for task in sorted({e.task for e in registered() if e.method not in READING and e.task not in UNCOUNTED}):
            metrics.task_pending.labels(task).set_function(partial(gate.task_pending, task))
            metrics.task_admissible.labels(task).set_function(partial(gate.task_admissible, task))
        if group := resources.memory(resources.CGROUPS):
            metrics.memory.labels("cgroup").set_function(group.used)
            metrics.memory_limit.labels("cgroup").set_function(group.limit)
        for name, folder in (("data", self.settings.data_dir), ("bundles", self.settings.bundles_dir)):
            metrics.disk_free.labels(name).set_function(lambda folder=folder: resources.disk(folder)[0])
            metrics.disk_size.labels(name).set_function(lambda folder=folder: resources.disk(folder)[1])


def check_replicas(settings: Settings, replicas: int) -> None:
    """Raises `BadRequest` if so many replicas would each have collections of its own."""
    kind = settings.store_url.partition(":")[0]
    if replicas > 1 and not getattr(STORES.get(kind), "shared", True):
        raise BadRequest(
            f"{replicas} replicas cannot share a store of {kind}, which belongs to one process; "
            "set CALMCLIP_STORE to pgvector:postgresql://…, or run one replica"
        )
