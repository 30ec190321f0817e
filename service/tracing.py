"""A trace for each request, sent to a collector by OTLP over HTTP. The only file that imports OpenTelemetry.

The span of a request is made when it is over, with a child for each lap of its clock, so that nothing on the way to
an answer waits for it. `OTEL_…` variables are the SDK's own business: sampler, headers, resource, sizes of batches.

Source: semantic conventions for HTTP spans 1.27; W3C Trace Context.
"""

from collections.abc import Callable
from threading import Thread
from time import perf_counter, time_ns
from typing import NamedTuple

from starlette.types import Scope

import calmclip
from calmclip.models.extras import missing
from calmclip.models.runtime.clock import Stopwatch
from calmclip.service.request import Context

UNTRACED = ("health", "metrics")  # scopes of endpoints that machines ask every few seconds, and that are never slow
METHODS = {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
PARENT = (b"traceparent", b"tracestate")
PATH = "/v1/traces"
LONGEST = 256  # characters of a path; no route of ours has more
FLUSH_S = 5.0  # at the end, for what is not sent yet


class Lap(NamedTuple):
    stage: str
    start: float  # on perf_counter
    end: float
    about: dict[str, str | int]


class Laps(Stopwatch):
    """A stopwatch that knows when each lap was."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = perf_counter()
        self.laps: list[Lap] = []

    def add(self, name: str, seconds: float, end: float | None = None, **about: str | int) -> None:
        super().add(name, seconds)
        end = perf_counter() if end is None else end
        self.laps.append(Lap(name, end - seconds, end, about))


class Untraced:
    """What there is without a collector: nothing."""

    clock: Callable[[], Stopwatch] = Stopwatch

    def record(self, scope: Scope, own: Context) -> str:
        """Of a request that is over. -> its trace id, "" where there is none or it is not sampled."""
        return ""

    def close(self) -> None:
        """What is not sent yet is sent; blocks, for `FLUSH_S` at most."""


def open_tracing(endpoint: str | None) -> Untraced:
    """``endpoint``: as `OTEL_EXPORTER_OTLP_ENDPOINT`, so that `PATH` is added. Raises `ExtraMissing`."""
    return Traced(endpoint) if endpoint else Untraced()


class Traced(Untraced):
    clock = Laps

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise missing("CALMCLIP_OTLP_ENDPOINT", "opentelemetry", "otel") from None
        named = Resource.create({"service.name": "calmclip", "service.version": calmclip.__version__})
        # the variables' names win; the provider is this app's, so that two apps in one process do not meet
        self._provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint.rstrip("/").removesuffix(PATH) + PATH)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("calmclip", calmclip.__version__)
        self._parent = TraceContextTextMapPropagator().extract
        self._within = set_span_in_context
        self._server, self._error = SpanKind.SERVER, StatusCode.ERROR

    def record(self, scope: Scope, own: Context) -> str:
        assert isinstance(own.clock, Laps)
        now, epoch = perf_counter(), time_ns()

        def at(moment: float) -> int:
            return epoch - round((now - moment) * 1e9)

        name, attributes = _describe(scope, own)
        span = self._tracer.start_span(
            name, self._parent(_parent(scope)), self._server, attributes, start_time=at(own.clock.begun)
        )
        if not span.is_recording():
            return ""
        within = self._within(span)
        for lap in list(own.clock.laps):  # a thread given up may still add
            about = {f"calmclip.{key}": value for key, value in lap.about.items()}
            child = self._tracer.start_span(lap.stage, within, attributes=about, start_time=at(lap.start))
            child.end(at(lap.end))
        if own.status >= 500:
            span.set_status(self._error)
        span.end(at(now))
        return format(span.get_span_context().trace_id, "032x")

    def close(self) -> None:
        # a thread that ends with the process: with its collector gone the SDK takes half a minute
        thread = Thread(target=self._provider.shutdown, name="flush", daemon=True)
        thread.start()
        thread.join(FLUSH_S)


def _describe(scope: Scope, own: Context) -> tuple[str, dict[str, str | int]]:
    """The span's name and attributes. Of what was asked only the path: the query holds labels."""
    method = scope["method"] if scope["method"] in METHODS else "_OTHER"
    route = getattr(scope.get("route"), "path", "")
    verb = "HTTP" if method == "_OTHER" else method
    attributes = {
        "http.request.method": method,
        "http.route": route,
        "http.response.status_code": own.status,
        "url.path": scope["path"][:LONGEST],
        "url.scheme": scope["scheme"],
        "network.protocol.version": scope["http_version"],
        "error.type": (own.problem or str(own.status)) if own.status >= 500 else "",
        "calmclip.request": own.id,
        "calmclip.task": own.task,
        "calmclip.bundle": own.model,
        "calmclip.problem": own.problem,
    }
    return f"{verb} {route}".rstrip(), {key: value for key, value in attributes.items() if value}


def _parent(scope: Scope) -> dict[str, str]:
    """Lines of one name are one, as HTTP has it; so two parents are none that anybody can read."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        if name in PARENT:
            key = str(name, "latin-1")
            found[key] = f"{found[key]},{str(value, 'latin-1')}" if key in found else str(value, "latin-1")
    return found
