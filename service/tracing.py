"""A trace for each request, sent to a collector by OTLP over HTTP. The only file that imports OpenTelemetry.

A request's span is made when the request is over, with a child for each stage of its clock, so that no answer waits for
it. The SDK itself reads the `OTEL_…` variables: sampler, headers, resource, sizes of batches.

A request that makes vectors has one more child, by the conventions for generative AI: the whole operation.

Source: semantic conventions for HTTP spans 1.27; W3C Trace Context; `docs/gen-ai/client-embeddings.md` of
https://github.com/open-telemetry/semantic-conventions-genai (v0.1.0, status: development).
"""

from collections.abc import Callable
from threading import Thread
from time import perf_counter, time_ns
from typing import NamedTuple

from starlette.types import Scope

import calmclip
from calmclip.models.extras import missing
from calmclip.models.runtime.clock import Stopwatch
from calmclip.service.metrics import PROVIDER
from calmclip.service.request import Context, Operation

UNTRACED = ("health", "metrics")  # scopes of endpoints that machines poll; they are never slow
METHODS = {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
PARENT = (b"traceparent", b"tracestate")
PATH = "/v1/traces"
MAX_PATH = 256  # characters; no route has more
FLUSH_S = 5.0  # at the end, for spans that are not sent yet


class Stage(NamedTuple):
    name: str
    start: float  # on perf_counter
    end: float
    about: dict[str, str | int]


class StageWatch(Stopwatch):
    """A stopwatch that also records when each stage was."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = perf_counter()
        self.spans: list[Stage] = []

    def add(self, name: str, seconds: float, end: float | None = None, **about: str | int) -> None:
        super().add(name, seconds)
        end = perf_counter() if end is None else end
        self.spans.append(Stage(name, end - seconds, end, about))


class Untraced:
    """Tracing without a collector: it records nothing."""

    clock: Callable[[], Stopwatch] = Stopwatch

    def record(self, scope: Scope, context: Context) -> str:
        """Record a request that is over. -> its trace id, "" if it is not traced or not sampled."""
        return ""

    def close(self) -> None:
        """Send the remaining spans; blocks for at most `FLUSH_S`."""


def open_tracing(endpoint: str | None) -> Untraced:
    """``endpoint``: as `OTEL_EXPORTER_OTLP_ENDPOINT`, without `PATH`. Raises `ExtraMissing`."""
    return Traced(endpoint) if endpoint else Untraced()


class Traced(Untraced):
    clock = StageWatch

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
        # The variables win over `named`. The provider is this app's own, not the process's.
        self._provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint.rstrip("/").removesuffix(PATH) + PATH)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("calmclip", calmclip.__version__)
        self._parent = TraceContextTextMapPropagator().extract
        self._within = set_span_in_context
        self._server, self._internal, self._error = SpanKind.SERVER, SpanKind.INTERNAL, StatusCode.ERROR

    def record(self, scope: Scope, context: Context) -> str:
        assert isinstance(context.clock, StageWatch)
        now, epoch = perf_counter(), time_ns()

        def at(moment: float) -> int:
            return epoch - round((now - moment) * 1e9)

        name, attributes = _describe(scope, context)
        span = self._tracer.start_span(
            name, self._parent(_parent(scope)), self._server, attributes, start_time=at(context.clock.begun)
        )
        if not span.is_recording():
            return ""
        within = self._within(span)
        for stage in list(context.clock.spans):  # a thread whose request was given up may still add
            about = {f"calmclip.{key}": value for key, value in stage.about.items()}
            child = self._tracer.start_span(stage.name, within, attributes=about, start_time=at(stage.start))
            child.end(at(stage.end))
        if context.operation:
            name, told = _describe_operation(scope, context, context.operation)
            child = self._tracer.start_span(name, within, self._internal, told, start_time=at(context.clock.begun))
            if context.error_type:
                child.set_status(self._error)
            child.end(at(now))
        if context.status >= 500:
            span.set_status(self._error)
        span.end(at(now))
        return format(span.get_span_context().trace_id, "032x")

    def close(self) -> None:
        # A daemon thread, because the SDK takes half a minute if the collector is gone.
        thread = Thread(target=self._provider.shutdown, name="flush", daemon=True)
        thread.start()
        thread.join(FLUSH_S)


def _describe(scope: Scope, context: Context) -> tuple[str, dict[str, str | int]]:
    """The span's name and attributes; without the query, which may hold labels."""
    method = scope["method"] if scope["method"] in METHODS else "_OTHER"
    route = getattr(scope.get("route"), "path", "")
    verb = "HTTP" if method == "_OTHER" else method
    attributes = {
        "http.request.method": method,
        "http.route": route,
        "http.response.status_code": context.status,
        "url.path": scope["path"][:MAX_PATH],
        "url.scheme": scope["scheme"],
        "network.protocol.version": scope["http_version"],
        "error.type": (context.problem or str(context.status)) if context.status >= 500 else "",
        "calmclip.request": context.id,
        "calmclip.task": context.task,
        "calmclip.bundle": context.model,
        "calmclip.problem": context.problem,
    }
    return f"{verb} {route}".rstrip(), {key: value for key, value in attributes.items() if value}


def _describe_operation(
    scope: Scope, context: Context, operation: Operation
) -> tuple[str, dict[str, str | int | tuple[str, ...]]]:
    """Name and attributes of the span of an operation of generative AI."""
    host, port = scope.get("server") or ("", None)
    attributes: dict[str, str | int | tuple[str, ...] | None] = {
        "gen_ai.operation.name": operation.name,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": context.model or None,
        "gen_ai.response.model": context.model if operation.dimensions else None,
        "gen_ai.embeddings.dimension.count": operation.dimensions or None,
        "gen_ai.request.encoding_formats": operation.formats or None,
        "gen_ai.usage.input_tokens": operation.tokens,
        "server.address": host or None,
        "server.port": port if host else None,
        "error.type": context.error_type or None,
    }
    name = f"{operation.name} {context.model}".rstrip()
    return name, {key: value for key, value in attributes.items() if value is not None}


def _parent(scope: Scope) -> dict[str, str]:
    """The trace headers. Lines of one name are joined, as in HTTP, so two parents are not a valid parent."""
    carrier: dict[str, str] = {}
    for name, value in scope["headers"]:
        if name in PARENT:
            key, text = str(name, "latin-1"), str(value, "latin-1")
            carrier[key] = f"{carrier[key]},{text}" if key in carrier else text
    return carrier
