"""Every metric, its labels and its buckets. The only file that imports prometheus_client.

Names follow Prometheus' practice: one prefix (but for OpenTelemetry's names), seconds and bytes, labels from small sets
(tasks, bundle names, stages, collections up to their limit; never paths or users). Each app has its own registry.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from time import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

import calmclip
from calmclip.service.request import Context
from calmclip.service.settings import Slo

EDGES_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SHED_EDGES_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0)
BATCH_EDGES = (1, 2, 4, 8, 16, 32, 64, 128)
BYTE_EDGES = tuple(1 << at for at in range(12, 25))  # 4 KiB to 16 MiB
PIXEL_EDGES = (1e4, 3e4, 1e5, 3e5, 1e6, 2e6, 4e6, 8e6, 1.6e7, 4e7)
# Of OpenTelemetry's conventions for generative AI, as are the names that begin with gen_ai, in Prometheus' spelling.
OPERATION_EDGES_S = tuple(0.01 * 2**at for at in range(14))  # 10 ms to 82 s
TOKEN_EDGES = tuple(4**at for at in range(14))  # 1 to 67 million
OPERATION = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
PROVIDER = "calmclip"
BOX_EDGES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)

# In the order of a request.
STAGES = ("read", "decode", "preprocess", "queue", "infer", "postprocess", "fit", "search", "write", "serialize")

# Values of `Overloaded.reason`.
SHED = ("requests", "bytes", "pixels", "deadline", "queue", "writes", "loading", "leaving", "replaced")
# Slugs of the problems that a picture causes.
PICTURE_FAULTS = ("unsupported-image", "image-too-large")


class Metrics:
    """One app's metrics. It knows numbers and names alone; `parts.watch` hands over the functions that gauges read."""

    def __init__(self, slo: Slo) -> None:  # noqa: PLR0915 - one statement per metric
        disable_created_metrics()  # type: ignore[no-untyped-call]  # else each counter has a second series
        self.registry = CollectorRegistry()
        self.gather: Callable[[], Awaitable[Collector]] = self._own  # behind Ray: of all replicas
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        counter, gauge, histogram = (partial(self._make, kind) for kind in (Counter, Gauge, Histogram))
        slo_s = slo.latency_ms / 1000
        edges = sorted({*EDGES_S, slo_s})

        self.requests = counter("requests", "Requests, by outcome.", "task", "model", "outcome")
        text = "Seconds from the first byte in to the last byte out."
        self.duration = histogram("request_duration_seconds", text, "task", "model", buckets=edges)
        text = "Seconds of one stage of a request; `graph` is set for queue and infer."
        self.stages = histogram("stage_duration_seconds", text, "model", "task", "stage", "graph", buckets=edges)
        self.batches = histogram("batch_size", "Rows in one run of a graph.", "model", "graph", buckets=BATCH_EDGES)
        text = "Runs of a graph, by the reason that ended the wait for more calls."
        self.releases = counter("batch_releases", text, "model", "graph", "reason")
        self.queue_depth = gauge("queue_depth", "Calls that wait for a graph.", "model", "graph")
        self.queue_limit = gauge("queue_limit", "Limit of queue_depth.", "model", "graph")
        self.pending = gauge("requests_pending", "Requests in flight.")
        self.pending_limit = gauge("requests_limit", "Limit of requests_pending.")
        text = "Requests of a task in flight; one with many pictures counts each."
        self.task_pending = gauge("task_requests_pending", text, "task")
        text = "Requests of a task that would be admitted at once at the present rate."
        self.task_admissible = gauge("task_requests_admissible", text, "task")
        self.pending_bytes = gauge("pending_bytes", "Bytes of the bodies of requests in flight, as announced.")
        self.pending_bytes_limit = gauge("pending_bytes_limit", "Limit of pending_bytes.")
        self.pending_pixels = gauge("pending_pixels", "Pixels of the pictures of requests in flight.")
        self.pending_pixels_limit = gauge("pending_pixels_limit", "Limit of pending_pixels.")
        self.connections = gauge("connections", "Open connections.")
        self.connections_limit = gauge("connections_limit", "Limit of connections.")
        self.connections_crowded = counter("connections_crowded", "Connections closed because of the limit.")
        self.drain_rate = gauge("drain_rate", "Requests finished per second of busy time.")
        self.retry_after = gauge("retry_after_seconds", "Retry-After of a request that is turned away now.")
        text = "Seconds from the headers to the 503, by reason."
        self.shed = histogram("shed_duration_seconds", text, "reason", buckets=SHED_EDGES_S)
        for reason in SHED:
            self.shed.labels(reason)
        self.picture_bytes = histogram("picture_bytes", "Bytes of a picture.", buckets=BYTE_EDGES)
        self.picture_pixels = histogram("picture_pixels", "Pixels of a picture.", buckets=PIXEL_EDGES)
        text = "Pictures refused, by the problem's slug."
        self.pictures_rejected = counter("pictures_rejected", text, "reason")
        for slug in PICTURE_FAULTS:
            self.pictures_rejected.labels(slug)
        self.rejected = counter("rejected", "Requests answered with a problem, by its slug.", "reason")
        self.text_cache = counter("text_cache", "Look-ups of texts (hit, miss).", "model", "outcome")
        self.kept = histogram("detections_kept", "Boxes in an answer of detect.", "model", buckets=BOX_EDGES)
        text = "Box-label pairs before suppression."
        self.candidates = histogram("detections_candidates", text, "model", buckets=BOX_EDGES)
        text = "Seconds of an operation of generative AI, such as embeddings."
        operation = partial(Histogram, labelnames=OPERATION, registry=self.registry)
        self.operations = operation(
            "gen_ai_server_request_duration_seconds",
            text,
            labelnames=(*OPERATION, "error_type"),
            buckets=OPERATION_EDGES_S,
        )
        text = "Tokens of the texts of one embeddings operation that was answered."
        name = "gen_ai_client_embeddings_operation_input_tokens"
        self.input_tokens = operation(name, text, buckets=TOKEN_EDGES)
        self.ready = gauge("ready", "1 if /readyz answers 200.")
        text = "Replicas that this deployment should have at least."
        self.replicas_expected = gauge("replicas_expected", text)
        self.failed = gauge("failed", "Bundles or collections that do not open.", "kind")
        text = "Collections whose embedding no loaded bundle has."
        self.collections_unbound = gauge("collections_unbound", text)
        self.info = gauge("bundle_info", "1 for a loaded bundle.", "model", "sha256", "precision", "ops")
        self.build = gauge("build_info", "1 for this version.", "version")
        self.build.labels(calmclip.__version__).set(1)
        text = "Outliers in the float graph of a loaded bundle, from its report."
        self.outliers = gauge("bundle_outliers", text, "model", "graph", "statistic")
        self.load_seconds = gauge("bundle_load_seconds", "Seconds of the last load, with warm-up.", "model")
        self.reloads = counter("bundle_reloads", "Loads of a changed bundle (ok, failed).", "model", "outcome")
        self.graph_open = gauge("graph_open", "1 for a graph in memory, 0 for an unloaded one.", "model", "graph")
        self.graph_open_seconds = gauge("graph_open_seconds", "Seconds of its last opening.", "model", "graph")
        self.op_left = gauge("op_left", "1 for an operator of the library that is left to ONNX Runtime.", "op")
        self.ops_info = gauge("ops_info", "1 for the op library in use, or for none.", "sha256", "isa")
        self.collection_items = gauge("collection_items", "Items of a collection.", "collection")
        text = "Time of this service's last write."
        self.last_commit = gauge("collection_last_commit_timestamp_seconds", text, "collection")
        text = "Memory of the service's control group, without files that the kernel may drop."
        self.memory = gauge("memory_bytes", text, "source")
        self.memory_limit = gauge("memory_limit_bytes", "Limit of memory_bytes.", "source")
        self.disk_free = gauge("disk_free_bytes", "Bytes that the service may still write to a folder.", "folder")
        self.disk_size = gauge("disk_size_bytes", "Bytes of the folder's file system.", "folder")
        self.slo_latency = gauge("slo_latency_seconds", "The objective's latency.")
        self.slo_target = gauge("slo_target_ratio", "The objective's share of requests within that latency.")
        self.slo_latency.set(slo_s)
        self.slo_target.set(slo.target)

    def _make(self, kind: Callable[..., Any], name: str, text: str, *labels: str, **options: Any) -> Any:
        return kind(f"calmclip_{name}", text, labels, registry=self.registry, **options)

    def observe(self, context: Context) -> None:
        """Count one finished request; the middleware calls it."""
        exemplar = {"trace_id": context.trace} if context.trace else None
        self.requests.labels(context.task, context.model, context.outcome).inc()
        self.duration.labels(context.task, context.model).observe(context.clock.elapsed, exemplar)
        if context.problem:
            self.rejected.labels(context.problem).inc()
        for slug in context.faults or [context.problem]:
            if slug in PICTURE_FAULTS:
                self.pictures_rejected.labels(slug).inc()
        if context.shed:
            self.shed.labels(context.shed).observe(context.head_s)
        for size, pixels in context.pictures:
            self.picture_bytes.observe(size)
            self.picture_pixels.observe(pixels)
        if operation := context.operation:
            labels = (operation.name, PROVIDER, context.model)
            self.operations.labels(*labels, context.error_type).observe(context.clock.elapsed)
            if operation.tokens is not None:
                self.input_tokens.labels(*labels).observe(operation.tokens)
        graphs = list(context.graphs.items())  # a thread whose request was given up may still add
        for (stage, graph), seconds in graphs:
            self.stages.labels(context.model, context.task, stage, graph).observe(seconds, exemplar)
        for stage, seconds in list(context.clock.stages.items()):
            in_graphs = sum(s for (name, _), s in graphs if name == stage)
            if stage != "infer":
                self.stages.labels(context.model, context.task, stage, "").observe(
                    max(0.0, seconds - in_graphs), exemplar
                )

    def detected(self, model: str, kept: int, candidates: int) -> None:
        self.kept.labels(model).observe(kept)
        self.candidates.labels(model).observe(candidates)

    def cached(self, model: str, hits: int, misses: int) -> None:
        self.text_cache.labels(model, "hit").inc(hits)
        self.text_cache.labels(model, "miss").inc(misses)

    def batch(self, model: str, graph: str, reasons: Iterable[str]) -> Callable[[int, str], None]:
        """-> a function that counts one run: its rows, and one of ``reasons``."""
        rows = self.batches.labels(model, graph)
        released = {reason: self.releases.labels(model, graph, reason) for reason in reasons}

        def observe(count: int, reason: str) -> None:
            rows.observe(count)
            released[reason].inc()

        return observe

    def watch_queue(self, model: str, graph: str, depth: Callable[[], int], limit: int) -> None:
        self.queue_depth.labels(model, graph).set_function(depth)
        self.queue_limit.labels(model, graph).set(limit)

    def clear_bundles(self) -> None:
        """Before `loaded` is called for each bundle."""
        self.info.clear()
        self.outliers.clear()

    def loaded(
        self, model: str, sha256: str, precision: str, ops: str, outliers: Mapping[str, Mapping[str, float]]
    ) -> None:
        """``outliers``: graph -> statistic -> value."""
        self.info.labels(model, sha256, precision, ops).set(1)
        for outcome in ("ok", "failed"):
            self.reloads.labels(model, outcome)
        for graph, statistics in outliers.items():
            for statistic, value in statistics.items():
                self.outliers.labels(model, graph, statistic).set(value)

    def load_time(self, model: str, seconds: float) -> None:
        self.load_seconds.labels(model).set(seconds)

    def reloaded(self, model: str, outcome: str) -> None:
        self.reloads.labels(model, outcome).inc()

    def graph_opened(self, model: str, graph: str, seconds: float) -> None:
        self.graph_open.labels(model, graph).set(1)
        self.graph_open_seconds.labels(model, graph).set(seconds)

    def graph_closed(self, model: str, graph: str) -> None:
        self.graph_open.labels(model, graph).set(0)

    def ops(self, sha256: str, isa: str, left: Sequence[str] = ()) -> None:
        self.ops_info.labels(sha256, isa).set(1)
        for op in left:
            self.op_left.labels(op).set(1)

    def items(self, collection: str, count: int | None) -> None:
        """``count`` None: the collection was deleted."""
        if count is None:
            self.collection_items.remove(collection)
            with suppress(KeyError):  # this service never wrote to it
                self.last_commit.remove(collection)
        else:
            self.collection_items.labels(collection).set(count)

    def committed(self, collection: str, count: int) -> None:
        self.items(collection, count)
        self.last_commit.labels(collection).set(time())

    def families(self) -> list[Metric]:
        """All families with their current samples."""
        return list(self.registry.collect())

    async def render(self, accept: str = "") -> tuple[bytes, str]:
        """Body and content type: OpenMetrics, which has exemplars, if ``accept`` asks for it; else plain text."""
        encode, content_type = choose_encoder(accept)
        return encode(await self.gather()), content_type

    async def _own(self) -> Collector:
        return self.registry


class Replicas(Collector):
    """Metrics of several replicas as one registry, with the label ``replica``."""

    def __init__(self, replicas: Mapping[str, Sequence[Metric]]) -> None:
        self._replicas = replicas

    def collect(self) -> list[Metric]:
        merged: dict[str, Metric] = {}
        for replica, families in self._replicas.items():
            for part in families:
                family = merged.setdefault(part.name, Metric(part.name, part.documentation, part.type, part.unit))
                family.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in part.samples]
        return [*merged.values()]
