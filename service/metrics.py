"""Every metric, its labels and its buckets. The only file that imports prometheus_client.

Names follow Prometheus' practice: one prefix, seconds and bytes, labels from small sets (tasks, bundle names,
stages, collections up to their limit; never paths or users). A registry per app, so that two apps in one process
do not meet.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from time import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

import calmclip
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.ops.library import Library
from calmclip.models.outliers import STATISTICS
from calmclip.models.tasks.detect import Detections
from calmclip.service.admission import Admission
from calmclip.service.batching import RELEASES, Release
from calmclip.service.connections import Connections
from calmclip.service.parts import Service
from calmclip.service.request import Context
from calmclip.service.settings import Settings

EDGES_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SHED_EDGES_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0)
BATCH_EDGES = (1, 2, 4, 8, 16, 32, 64, 128)
BYTE_EDGES = tuple(1 << at for at in range(12, 25))  # 4 KiB to 16 MiB
PIXEL_EDGES = (1e4, 3e4, 1e5, 3e5, 1e6, 2e6, 4e6, 8e6, 1.6e7, 4e7)
BOX_EDGES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)

# In the order in which a request goes through them.
STAGES = ("read", "decode", "preprocess", "queue", "infer", "postprocess", "search", "write", "serialize")

# Why a request was turned away: `Overloaded.reason`.
SHED = ("requests", "bytes", "pixels", "deadline", "queue", "writes", "loading", "leaving", "replaced")
# Slugs of the problems that are a picture's fault.
PICTURE_FAULTS = ("unsupported-image", "image-too-large")

# HTTP status -> outcome, of what neither succeeded nor was turned away; what is not here goes by its hundreds.
OUTCOMES = {499: "cancelled", 504: "deadline"}


def outcome(own: Context) -> str:
    """How a request ended. ``ok`` is what came to no problem, also a probe whose answer is no."""
    if own.shed:
        return "shed"
    if own.status in OUTCOMES:
        return OUTCOMES[own.status]
    return "ok" if not own.problem else "client_error" if 400 <= own.status < 500 else "error"


class Metrics:
    """One app's metrics."""

    def __init__(self, settings: Settings) -> None:  # noqa: PLR0915 - one after another
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody reads
        self.registry = CollectorRegistry()
        self.gather: Callable[[], Awaitable[Collector]] = self._own  # of several replicas behind one address, all
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        edges = sorted({*EDGES_S, settings.slo.latency_ms / 1000})
        self.requests = self._make(Counter, "requests", "Requests, by how they ended.", "task", "model", "outcome")
        self.duration = self._make(
            Histogram,
            "request_duration_seconds",
            "From first byte in to last byte out.",
            "task",
            "model",
            buckets=edges,
        )
        self.stages = self._make(
            Histogram,
            "stage_duration_seconds",
            "One stage of a request; `graph` for queue and infer.",
            "model",
            "task",
            "stage",
            "graph",
            buckets=edges,
        )
        self.batches = self._make(
            Histogram, "batch_size", "Rows in one run of a graph.", "model", "graph", buckets=BATCH_EDGES
        )
        self.releases = self._make(
            Counter, "batch_releases", "Runs of a graph, by why they were not held back.", "model", "graph", "reason"
        )
        self.queue_depth = self._make(Gauge, "queue_depth", "Calls that wait for a graph.", "model", "graph")
        self.queue_limit = self._make(Gauge, "queue_limit", "Calls that may wait for a graph.", "model", "graph")
        self.pending = self._make(Gauge, "requests_pending", "Requests under way.")
        self.pending_limit = self._make(Gauge, "requests_limit", "Requests that may be under way.")
        self.pending_bytes = self._make(Gauge, "pending_bytes", "Bodies of requests under way, as announced.")
        self.pending_bytes_limit = self._make(Gauge, "pending_bytes_limit", "What they may have together.")
        self.pending_pixels = self._make(Gauge, "pending_pixels", "Pixels of pictures under way.")
        self.pending_pixels_limit = self._make(Gauge, "pending_pixels_limit", "What they may have together.")
        self.connections = self._make(Gauge, "connections", "Connections that are open.")
        self.connections_limit = self._make(Gauge, "connections_limit", "Connections that may be open.")
        self.connections_crowded = self._make(Counter, "connections_crowded", "Closed to make room for another.")
        self.drain_rate = self._make(Gauge, "drain_rate", "Requests finished per second while some were worked at.")
        self.retry_after = self._make(Gauge, "retry_after_seconds", "What a request turned away now would be told.")
        self.shed = self._make(
            Histogram,
            "shed_duration_seconds",
            "From the headers to the 503, by reason.",
            "reason",
            buckets=SHED_EDGES_S,
        )
        for reason in SHED:
            self.shed.labels(reason)
        self.picture_bytes = self._make(Histogram, "picture_bytes", "Bytes of a picture.", buckets=BYTE_EDGES)
        self.picture_pixels = self._make(Histogram, "picture_pixels", "Pixels of a picture.", buckets=PIXEL_EDGES)
        self.pictures_rejected = self._make(
            Counter, "pictures_rejected", "Requests refused for a picture, by the problem's slug.", "reason"
        )
        for slug in PICTURE_FAULTS:
            self.pictures_rejected.labels(slug)
        self.rejected = self._make(Counter, "rejected", "Requests answered with a problem, by its slug.", "reason")
        self.text_cache = self._make(Counter, "text_cache", "Texts looked up (hit, miss).", "model", "outcome")
        self.kept = self._make(
            Histogram, "detections_kept", "Boxes in an answer of detect.", "model", buckets=BOX_EDGES
        )
        self.candidates = self._make(
            Histogram, "detections_candidates", "Box-label pairs before suppression.", "model", buckets=BOX_EDGES
        )
        self.ready = self._make(Gauge, "ready", "1 when /readyz says 200.")
        self.failed = self._make(Gauge, "failed", "What does not open (bundles, collections).", "kind")
        self.info = self._make(Gauge, "bundle_info", "1 for a loaded bundle.", "model", "sha256", "precision", "ops")
        self.build = self._make(Gauge, "build_info", "1: this version.", "version")
        self.build.labels(calmclip.__version__).set(1)
        self.outliers = self._make(
            Gauge,
            "bundle_outliers",
            "Inside a loaded bundle's graph in float, as its report says.",
            "model",
            "graph",
            "statistic",
        )
        self.load_seconds = self._make(Gauge, "bundle_load_seconds", "The last load, until it was warm.", "model")
        self.reloads = self._make(
            Counter, "bundle_reloads", "Loads of a changed bundle (ok, failed).", "model", "outcome"
        )
        self.graph_open = self._make(Gauge, "graph_open", "1 in memory, 0 at rest.", "model", "graph")
        self.graph_open_seconds = self._make(
            Gauge, "graph_open_seconds", "The last opening of its session.", "model", "graph"
        )
        self.ops_info = self._make(Gauge, "ops_info", "1: the op library in use, or none.", "sha256", "isa")
        self.collection_items = self._make(Gauge, "collection_items", "Items of a collection.", "collection")
        self.last_commit = self._make(
            Gauge, "collection_last_commit_timestamp_seconds", "When it was last written here.", "collection"
        )
        self.slo_latency = self._make(Gauge, "slo_latency_seconds", "The declared objective's latency.")
        self.slo_target = self._make(Gauge, "slo_target_ratio", "The declared share of requests within it.")
        self.slo_latency.set(settings.slo.latency_ms / 1000)
        self.slo_target.set(settings.slo.target)

    def _make(self, kind: Callable[..., Any], name: str, text: str, *labels: str, **how: Any) -> Any:
        return kind(f"calmclip_{name}", text, labels, registry=self.registry, **how)

    def observe(self, own: Context) -> None:
        """One finished request; called by the middleware alone."""
        exemplar = {"trace_id": own.trace} if own.trace else None
        self.requests.labels(own.task, own.model, outcome(own)).inc()
        self.duration.labels(own.task, own.model).observe(own.clock.elapsed, exemplar)
        if own.problem:
            self.rejected.labels(own.problem).inc()
        if own.problem in PICTURE_FAULTS:
            self.pictures_rejected.labels(own.problem).inc()
        if own.shed:
            self.shed.labels(own.shed).observe(own.head_s)
        for size, pixels in own.pictures:
            self.picture_bytes.observe(size)
            self.picture_pixels.observe(pixels)
        graphs = list(own.graphs.items())  # a thread given up may still add
        for (stage, graph), seconds in graphs:
            self.stages.labels(own.model, own.task, stage, graph).observe(seconds, exemplar)
        for stage, seconds in list(own.clock.stages.items()):
            in_graphs = sum(s for (name, _), s in graphs if name == stage)
            if stage != "infer":
                self.stages.labels(own.model, own.task, stage, "").observe(max(0.0, seconds - in_graphs), exemplar)

    def answered(self, model: str, value: object) -> None:
        """What an answer of the engine holds, where that is worth a metric."""
        if isinstance(value, Detections):
            self.kept.labels(model).observe(len(value.detections))
            self.candidates.labels(model).observe(value.candidates)

    def cached(self, model: str, hits: int, misses: int) -> None:
        self.text_cache.labels(model, "hit").inc(hits)
        self.text_cache.labels(model, "miss").inc(misses)

    def batch(self, model: str, graph: str) -> Callable[[int, Release], None]:
        rows = self.batches.labels(model, graph)
        released = {reason: self.releases.labels(model, graph, reason) for reason in RELEASES}

        def observe(count: int, release: Release) -> None:
            rows.observe(count)
            released[release].inc()

        return observe

    def watch_queue(self, model: str, graph: str, depth: Callable[[], int], limit: int) -> None:
        self.queue_depth.labels(model, graph).set_function(depth)
        self.queue_limit.labels(model, graph).set(limit)

    def watch_admission(self, gate: Admission) -> None:
        self.pending.set_function(lambda: gate.pending)
        self.pending_bytes.set_function(lambda: gate.bytes)
        self.pending_pixels.set_function(lambda: gate.pixels)
        self.drain_rate.set_function(lambda: gate.pace.rate)
        self.retry_after.set_function(lambda: gate.pace.retry_after_s)
        self.pending_limit.set(gate.max_pending)
        self.pending_bytes_limit.set(gate.max_bytes)
        self.pending_pixels_limit.set(gate.max_pixels)

    def watch_connections(self, connections: Connections) -> None:
        self.connections.set_function(lambda: connections.open)
        self.connections_limit.set(connections.limit)

    def crowded(self) -> None:
        self.connections_crowded.inc()

    def watch_health(self, parts: Service) -> None:
        self.ready.set_function(lambda: float(parts.ready))
        for kind, failed in (("bundles", parts.hub.failed), ("collections", parts.collections.failed)):
            self.failed.labels(kind).set_function(lambda failed=failed: len(failed))

    def loaded(self, bundles: Sequence[Bundle]) -> None:
        """These and no others are loaded now."""
        self.info.clear()
        self.outliers.clear()
        for bundle in bundles:
            ops = ",".join(bundle.manifest.ops.used)
            self.info.labels(bundle.name, bundle.digest, bundle.manifest.precision, ops).set(1)
            for outcome in ("ok", "failed"):
                self.reloads.labels(bundle.name, outcome)
            for graph, found in bundle.outliers.items():
                for statistic in STATISTICS:
                    self.outliers.labels(bundle.name, graph, statistic).set(getattr(found, statistic))

    def load_time(self, model: str, seconds: float) -> None:
        self.load_seconds.labels(model).set(seconds)

    def renewed(self, model: str, outcome: str) -> None:
        self.reloads.labels(model, outcome).inc()

    def graph_opened(self, model: str, graph: str, seconds: float) -> None:
        self.graph_open.labels(model, graph).set(1)
        self.graph_open_seconds.labels(model, graph).set(seconds)

    def graph_closed(self, model: str, graph: str) -> None:
        self.graph_open.labels(model, graph).set(0)

    def ops(self, library: Library | None) -> None:
        isa = ",".join(sorted({*library.isas.values()})) if library else "none"
        self.ops_info.labels(library.sha256 if library else "", isa).set(1)

    def items(self, collection: str, count: int | None) -> None:
        """``count`` None: the collection is gone."""
        if count is None:
            self.collection_items.remove(collection)
            with suppress(KeyError):  # never written here
                self.last_commit.remove(collection)
        else:
            self.collection_items.labels(collection).set(count)

    def committed(self, collection: str, count: int) -> None:
        self.items(collection, count)
        self.last_commit.labels(collection).set(time())

    def families(self) -> list[Metric]:
        """All of them, with their samples of now."""
        return list(self.registry.collect())

    async def render(self, accept: str = "") -> tuple[bytes, str]:
        """Body and content type: OpenMetrics, which has exemplars, where ``accept`` asks for it; else plain text."""
        encode, content_type = choose_encoder(accept)
        return encode(await self.gather()), content_type

    async def _own(self) -> Collector:
        return self.registry


class Together(Collector):
    """Families of several replicas as one, with the label ``replica``."""

    def __init__(self, replicas: Mapping[str, Sequence[Metric]]) -> None:
        self._replicas = replicas

    def collect(self) -> list[Metric]:
        found: dict[str, Metric] = {}
        for replica, families in self._replicas.items():
            for one in families:
                family = found.setdefault(one.name, Metric(one.name, one.documentation, one.type, one.unit))
                family.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in one.samples]
        return [*found.values()]
