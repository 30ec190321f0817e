"""Every metric, its labels and its buckets. The only file that imports prometheus_client.

Names follow Prometheus' practice: one prefix, seconds and bytes, labels from small sets (tasks, bundle names,
stages, collections up to their limit; never paths or users). A registry per app, so that two apps in one process
do not meet.
"""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from models.bundle.bundle import Bundle
from models.ops.library import Library
from models.tasks.detect import Detections
from service.context import Context
from service.settings import Settings

EDGES_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCH_EDGES = (1, 2, 4, 8, 16, 32, 64, 128)
BOX_EDGES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)

# In the order in which a request goes through them.
STAGES = ("read", "decode", "preprocess", "queue", "infer", "postprocess", "search", "write", "serialize")

# HTTP status -> outcome; what is not here goes by its hundreds.
OUTCOMES = {499: "cancelled", 503: "shed", 504: "deadline"}


def outcome(status: int) -> str:
    return OUTCOMES.get(status) or ("ok" if status < 400 else "client_error" if status < 500 else "error")


class Metrics:
    """One app's metrics."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, settings: Settings) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody reads
        self.registry = CollectorRegistry()
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
        self.queue_depth = self._make(Gauge, "queue_depth", "Calls that wait for a graph.", "model", "graph")
        self.queue_limit = self._make(Gauge, "queue_limit", "Calls that may wait for a graph.", "model", "graph")
        self.pending = self._make(Gauge, "requests_pending", "Requests under way.")
        self.rejected = self._make(Counter, "rejected", "Requests answered with a problem, by its slug.", "reason")
        self.text_cache = self._make(Counter, "text_cache", "Sentences looked up (hit, miss).", "model", "outcome")
        self.kept = self._make(
            Histogram, "detections_kept", "Boxes in an answer of detect.", "model", buckets=BOX_EDGES
        )
        self.candidates = self._make(
            Histogram, "detections_candidates", "Box-label pairs before suppression.", "model", buckets=BOX_EDGES
        )
        self.info = self._make(Gauge, "bundle_info", "1 for a loaded bundle.", "model", "sha256", "precision", "ops")
        self.ops_info = self._make(Gauge, "ops_info", "1: the op library in use, or none.", "sha256", "isa")
        self.collection_items = self._make(Gauge, "collection_items", "Items of a collection.", "collection")
        self.slo_latency = self._make(Gauge, "slo_latency_seconds", "The declared objective's latency.")
        self.slo_target = self._make(Gauge, "slo_target_ratio", "The declared share of requests within it.")
        self.slo_latency.set(settings.slo.latency_ms / 1000)
        self.slo_target.set(settings.slo.target)

    def _make(self, kind: Callable[..., Any], name: str, text: str, *labels: str, **how: Any) -> Any:
        return kind(f"calmclip_{name}", text, labels, registry=self.registry, **how)

    def observe(self, own: Context) -> None:
        """One finished request; called by the middleware alone."""
        self.requests.labels(own.task, own.model, outcome(own.status)).inc()
        self.duration.labels(own.task, own.model).observe(own.clock.elapsed)
        if own.problem:
            self.rejected.labels(own.problem).inc()
        for (stage, graph), seconds in list(own.graphs.items()):
            self.stages.labels(own.model, own.task, stage, graph).observe(seconds)
        for stage, seconds in list(own.clock.stages.items()):  # a thread given up may still add
            in_graphs = sum(s for (name, _), s in own.graphs.items() if name == stage)
            if stage != "infer":
                self.stages.labels(own.model, own.task, stage, "").observe(max(0.0, seconds - in_graphs))

    def answered(self, model: str, value: object) -> None:
        """What an answer of the engine holds, where that is worth a metric."""
        if isinstance(value, Detections):
            self.kept.labels(model).observe(len(value.detections))
            self.candidates.labels(model).observe(value.candidates)

    def cached(self, model: str, *, hits: int, misses: int) -> None:
        self.text_cache.labels(model, "hit").inc(hits)
        self.text_cache.labels(model, "miss").inc(misses)

    def batch(self, model: str, graph: str) -> Callable[[int], None]:
        observe: Callable[[int], None] = self.batches.labels(model, graph).observe
        return observe

    def watch_queue(self, model: str, graph: str, depth: Callable[[], int], limit: int) -> None:
        self.queue_depth.labels(model, graph).set_function(depth)
        self.queue_limit.labels(model, graph).set(limit)

    def watch_pending(self, pending: Callable[[], int]) -> None:
        self.pending.set_function(pending)

    def loaded(self, bundle: Bundle) -> None:
        ops = ",".join(bundle.manifest.ops.used)
        self.info.labels(bundle.name, bundle.digest, bundle.manifest.precision, ops).set(1)

    def ops(self, library: Library | None) -> None:
        isa = ",".join(sorted({*library.isas.values()})) if library else "none"
        self.ops_info.labels(library.sha256 if library else "", isa).set(1)

    def items(self, collection: str, count: int | None) -> None:
        """``count`` None: the collection is gone."""
        if count is None:
            self.collection_items.remove(collection)
        else:
            self.collection_items.labels(collection).set(count)

    def render(self) -> bytes:
        return generate_latest(self.registry)
