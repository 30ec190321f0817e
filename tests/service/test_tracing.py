"""Traces at a collector: over HTTP, decoded with OpenTelemetry's protobuf."""

import logging
import re
import sys
import time
from itertools import pairwise

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as genai
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from calmclip.models.errors import ExtraMissing
from calmclip.service import tracing
from calmclip.service.app import create_app
from tests.asking import raw
from tests.otlp import collecting, told

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"  # the example of W3C's Trace Context
OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"  # Prometheus sends it


@pytest.fixture
def collector():
    with collecting() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    """Remove OpenTelemetry variables of the environment that runs the tests."""
    for name in ("OTEL_TRACES_SAMPLER", "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def timing(answer) -> dict[str, float]:
    pairs = (entry.split(";dur=") for entry in answer.headers["server-timing"].split(", "))
    return {stage: float(ms) for stage, ms in pairs}


def ask(client, path: str, request_id: str, picture: bytes, **headers: str):
    return client.post(path, **raw(picture, **{"x-request-id": request_id}, **headers))


def test_a_request_is_a_span_and_its_stages_are_children(settings, serve, picture, collector):
    with serve(settings(otlp_endpoint=collector.url)) as client:
        above = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
        answer = ask(client, "/v1/detect?labels=red", "one", picture("red"), **above)
        assert answer.status_code == 200
    assert {path for path, _ in collector.requests} == {"/v1/traces"}
    assert collector.resource["service.name"] == "calmclip"
    (span,) = collector.server_spans().values()
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "a=b")
    assert span.name == "POST /v1/detect"
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert told(span) == {
        "http.request.method": "POST",
        "http.route": "/v1/detect",
        "http.response.status_code": 200,
        "url.path": "/v1/detect",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "calmclip.request": "one",
        "calmclip.task": "detect",
        "calmclip.bundle": "colours-int8",
    }
    children = [child for child in collector.spans if child.parent_span_id == span.span_id]
    assert len(children) + 1 == len(collector.spans)
    assert {child.trace_id.hex() for child in children} == {TRACE}
    spent: dict[str, float] = {}
    for child in children:
        assert span.start_time_unix_nano <= child.start_time_unix_nano
        assert child.start_time_unix_nano <= child.end_time_unix_nano <= span.end_time_unix_nano
        spent[child.name] = spent.get(child.name, 0.0) + (child.end_time_unix_nano - child.start_time_unix_nano) / 1e6
    header = timing(answer)
    header.pop("total")
    assert spent == pytest.approx(header, abs=0.006)  # two decimals
    runs = {told(child).get("calmclip.graph"): told(child) for child in children if child.name == "infer"}
    assert runs == {graph: {"calmclip.graph": graph, "calmclip.batch": 1} for graph in ("text", "regions", "detect")}


def test_stages_do_not_overlap(settings, serve, picture, collector):
    with serve(settings(otlp_endpoint=collector.url)) as client:
        ask(client, "/v1/classify?labels=red", "one", picture("red"))
    stages = sorted((s for s in collector.spans if s.parent_span_id), key=lambda s: s.start_time_unix_nano)
    working = [s for s in stages if s.name != "queue"]  # a wait's start is exact to one step of the event loop
    assert {s.name for s in working} == {"read", "decode", "preprocess", "infer", "postprocess", "serialize"}
    for before, after in pairwise(working):
        assert before.end_time_unix_nano <= after.start_time_unix_nano + 1000, f"{after.name} overlaps {before.name}"
    assert working[0].name == "read"
    assert [entry.name for entry in working[-2:]] == ["postprocess", "serialize"]
    waits = {told(entry)["calmclip.graph"]: entry for entry in stages if entry.name == "queue" and entry.attributes}
    runs = {told(entry)["calmclip.graph"]: entry for entry in stages if entry.name == "infer"}
    for graph in ("image", "text"):
        assert waits[graph].end_time_unix_nano == pytest.approx(runs[graph].start_time_unix_nano, abs=1000, rel=0)


def test_a_run_has_the_size_of_its_batch(settings, serve, collector):
    texts = {"inputs": [{"text": word} for word in ("red", "green", "blue")]}
    with serve(settings(otlp_endpoint=collector.url)) as client:
        assert client.post("/v1/embed", json=texts).status_code == 200
    (run,) = [told(span) for span in collector.spans if span.name == "infer"]
    assert run["calmclip.batch"] == 3


def test_spans_name_the_problem(settings, serve, picture, collector, monkeypatch):
    from calmclip.service.engine import Engine

    with serve(settings(otlp_endpoint=collector.url)) as client:
        ask(client, "/v1/classify?labels=red", "broken", b"no picture")
        client.get("/v1/secret/path", headers={"x-request-id": "nowhere"})
        monkeypatch.setattr(Engine, "answer", lambda *_: 1 / 0)
        ask(client, "/v1/classify?labels=red", "fault", picture("red"))
    spans = collector.server_spans()
    assert told(spans["broken"])["calmclip.problem"] == "unsupported-image"
    assert spans["broken"].status.code == Status.STATUS_CODE_UNSET  # an error of the client
    assert spans["nowhere"].name == "GET"
    assert "http.route" not in told(spans["nowhere"])
    fault = told(spans["fault"])
    assert (fault["http.response.status_code"], fault["error.type"]) == (500, "internal")
    assert spans["fault"].status.code == Status.STATUS_CODE_ERROR


def test_an_embedding_has_the_span_of_the_conventions_for_generative_ai(settings, serve, picture, collector):
    """Names of attributes are those of OpenTelemetry's package of conventions."""
    body = {"model": "colours-int8", "input": ["a red thing", "green"], "encoding_format": "base64"}
    with serve(settings(otlp_endpoint=collector.url)) as client:
        for name, path, sent in (
            ("one", "/v1/embeddings", body),
            ("two", "/v1/embed", {"inputs": [{"text": "red"}]}),
            ("three", "/v1/embed", {"inputs": [{"text": "red"}], "model": "gpt"}),
            ("four", "/v1/embeddings", {**body, "input": "red " * 20}),
        ):
            client.post(path, json=sent, headers={"x-request-id": name})
        client.post("/v1/classify?labels=red", **raw(picture("red")))
    servers = collector.server_spans()
    spans = [span for span in collector.spans if genai.GEN_AI_OPERATION_NAME in told(span)]
    above = {span.span_id: name for name, span in servers.items()}
    by_request = {above[span.parent_span_id]: span for span in spans}
    assert sorted(by_request) == ["four", "one", "three", "two"]
    span = by_request["one"]
    assert (span.name, span.kind) == ("embeddings colours-int8", span.SPAN_KIND_INTERNAL)
    assert span.start_time_unix_nano == servers["one"].start_time_unix_nano
    assert span.end_time_unix_nano == servers["one"].end_time_unix_nano
    attributes = told(span)
    formats = attributes.pop(genai.GEN_AI_REQUEST_ENCODING_FORMATS)
    assert [value.string_value for value in formats.values] == ["base64"]
    assert attributes == {
        genai.GEN_AI_OPERATION_NAME: "embeddings",
        genai.GEN_AI_PROVIDER_NAME: "calmclip",
        genai.GEN_AI_REQUEST_MODEL: "colours-int8",
        genai.GEN_AI_RESPONSE_MODEL: "colours-int8",
        genai.GEN_AI_EMBEDDINGS_DIMENSION_COUNT: 3,
        genai.GEN_AI_USAGE_INPUT_TOKENS: 4,
        "server.address": client.base_url.host,
        "server.port": client.base_url.port,
    }
    assert genai.GEN_AI_REQUEST_ENCODING_FORMATS not in told(by_request["two"])
    for name, problem, model in (("three", "model-not-found", None), ("four", "text-too-long", "colours-int8")):
        wrong = by_request[name]
        assert (told(wrong)["error.type"], wrong.status.code) == (problem, Status.STATUS_CODE_ERROR)
        assert (told(wrong).get(genai.GEN_AI_REQUEST_MODEL), wrong.name) == (
            model,
            f"embeddings {model or ''}".rstrip(),
        )
        assert genai.GEN_AI_USAGE_INPUT_TOKENS not in told(wrong)
        assert servers[name].status.code == Status.STATUS_CODE_UNSET  # an error of the client


def test_an_unreadable_parent_is_ignored(settings, serve, collector):
    unreadable = [
        ["x"], ["00-0-0-01"], [f"00-{'0' * 32}-{PARENT}-01"], [f"ff-{TRACE}-{PARENT}-01"], ["\xff" * 55], [""],
        [f"00-{TRACE}-{PARENT}-01", f"00-{TRACE[::-1]}-{PARENT}-01"], ["0" * 5000],
    ]  # fmt: skip
    with serve(settings(otlp_endpoint=collector.url)) as client:
        for number, lines in enumerate(unreadable):
            named = [
                ("x-request-id", str(number)),
                ("tracestate", "\xff=,,="),
                *(("traceparent", line) for line in lines),
            ]
            answer = client.get("/v1/models", headers=[(k.encode(), v.encode("latin-1")) for k, v in named])
            assert answer.status_code == 200
    spans = collector.server_spans()
    assert len(spans) == len(unreadable)
    for number, span in spans.items():
        assert (span.parent_span_id, span.trace_state) == (b"", ""), unreadable[int(number)]
        assert span.trace_id.hex() not in (TRACE, TRACE[::-1])


def test_probes_and_scrapes_are_not_traced(settings, serve, collector):
    with serve(settings(otlp_endpoint=collector.url)) as client:
        for path in ("/healthz", "/readyz", "/metrics", "/v1/models"):
            assert client.get(path).status_code == 200
    assert [span.name for span in collector.server_spans().values()] == ["GET /v1/models"]


def test_exemplars_name_sampled_traces(settings, serve, picture, collector):
    with serve(settings(otlp_endpoint=collector.url)) as client:
        assert ask(client, "/v1/classify?labels=red", "one", picture("red")).status_code == 200
        unsampled = f"00-{'1' * 32}-{PARENT}-00"
        assert ask(client, "/v1/detect?labels=red", "two", picture("red"), traceparent=unsampled).status_code == 200
        answer = client.get("/metrics", headers={"accept": OPENMETRICS})
        plain = client.get("/metrics")
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    (span,) = collector.server_spans().values()
    trace_ids: dict[str, set[str]] = {}
    tasks = set()
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.exemplar:
                trace_ids.setdefault(family.name, set()).add(sample.exemplar.labels["trace_id"])
                tasks.add(sample.labels["task"])
    wanted = {span.trace_id.hex()}
    assert trace_ids == {"calmclip_request_duration_seconds": wanted, "calmclip_stage_duration_seconds": wanted}
    assert tasks == {"classify"}
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "trace_id" not in plain.text


def test_the_log_names_the_trace(settings, serve, collector, caplog):
    with (
        caplog.at_level(logging.INFO, "calmclip.access"),
        serve(settings(otlp_endpoint=collector.url)) as client,
    ):
        client.get("/v1/models", headers={"x-request-id": "one"})
    (fields,) = [record.fields for record in caplog.records if getattr(record, "fields", {}).get("id") == "one"]
    assert fields["trace_id"] == collector.server_spans()["one"].trace_id.hex()


def test_opentelemetrys_variables_apply(settings, serve, collector, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=here")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with serve(settings(otlp_endpoint=f"{collector.url}/v1/traces")) as client:  # the full URL is accepted too
        client.get("/v1/models", headers={"x-request-id": "left-out"})
        client.get("/v1/models", headers={"x-request-id": "asked-for", "traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert set(collector.server_spans()) == {"asked-for"}
    assert {path for path, _ in collector.requests} == {"/v1/traces"}
    assert collector.resource["service.name"] == "pictures"
    assert collector.resource["deployment.environment.name"] == "here"


def test_a_collector_that_never_answers_delays_no_request(settings, serve, picture, monkeypatch):
    """It accepts connections and sends nothing. Requests are answered as usual, and the service ends in time."""
    import socket

    monkeypatch.setattr(tracing, "FLUSH_S", 0.5)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as deaf:
        with serve(settings(otlp_endpoint=f"http://127.0.0.1:{deaf.getsockname()[1]}")) as client:
            for _ in range(20):
                start = time.perf_counter()
                assert ask(client, "/v1/classify?labels=red", "one", picture("red")).status_code == 200
                assert time.perf_counter() - start < 5  # the SDK would wait for 10
            leaving = time.perf_counter()
        assert 0.5 <= time.perf_counter() - leaving < 5


def test_a_collector_that_is_down_loses_only_spans(settings, serve, picture, monkeypatch):
    monkeypatch.setattr(tracing, "FLUSH_S", 0.5)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "20")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    with collecting() as gone:
        pass
    with serve(settings(otlp_endpoint=gone.url)) as client:
        for _ in range(20):
            assert ask(client, "/v1/classify?labels=red", "one", picture("red")).status_code == 200


def test_without_an_address_no_span_is_recorded():
    assert type(tracing.open_tracing(None).clock()).__name__ == "Stopwatch"


def test_a_missing_extra_stops_the_start(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ExtraMissing, match=re.escape("pip install -e '.[otel]'")):
        create_app(settings(otlp_endpoint="http://127.0.0.1:1"))
