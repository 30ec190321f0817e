"""What Prometheus sees, read with Prometheus' own parser."""

import re
import shutil
from time import sleep

import pytest
from prometheus_client.parser import text_string_to_metric_families

from calmclip.models.errors import StoreUnavailable
from calmclip.service import resources
from calmclip.service.metrics import EDGES_S, STAGES
from calmclip.service.parts import Service
from calmclip.service.request import Context
from tests.asking import b64, raw


def scrape(client) -> dict[tuple[str, frozenset], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples, name: str, **labels: str) -> float:
    return samples.get((f"calmclip_{name}", frozenset(labels.items())), 0.0)


def test_embeddings_have_the_metrics_of_the_conventions_for_generative_ai(settings, serve):
    """OpenTelemetry's names and edges, as Prometheus spells them: dots are underscores, and the unit is at the end."""
    with serve(settings()) as client:
        client.post("/v1/embed", json={"inputs": [{"text": "a red thing"}, {"text": "green"}]})
        client.post("/v1/embed", json={"inputs": []})
        client.post("/v1/classify", json={"labels": []})
        samples = {k: v for k, v in scrape(client).items() if k[0].startswith("gen_ai_")}
    common = {"gen_ai_operation_name": "embeddings", "gen_ai_provider_name": "calmclip"}
    named = common | {"gen_ai_request_model": "colours-int8"}
    duration, tokens = "gen_ai_server_request_duration_seconds", "gen_ai_client_embeddings_operation_input_tokens"
    answered, refused = (
        named | {"error_type": ""},
        common | {"gen_ai_request_model": "", "error_type": "invalid-request"},
    )
    counts = {(name, labels): v for (name, labels), v in samples.items() if name.endswith("_count")}
    assert counts == {
        (f"{duration}_count", frozenset(answered.items())): 1,
        (f"{duration}_count", frozenset(refused.items())): 1,
        (f"{tokens}_count", frozenset(named.items())): 1,
    }
    assert samples[f"{tokens}_sum", frozenset(named.items())] == 4
    edges: dict[str, list[float]] = {}
    for name, labels in samples:
        about = dict(labels)
        if name.endswith("_bucket") and not about.get("error_type"):
            edges.setdefault(name.removesuffix("_bucket"), []).append(float(about["le"]))
    assert edges[duration] == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48,
                                             40.96, 81.92, float("inf")])  # fmt: skip
    assert edges[tokens] == [1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864,
                             float("inf")]  # fmt: skip


def test_a_request_is_counted_once_with_its_stages(settings, serve, picture):
    with serve(settings()) as client:
        send = raw(picture("red"))
        timing = client.post("/v1/detect?labels=red&min_score=0.5", **send).headers["server-timing"]
        client.post("/v1/detect?labels=red", **raw(b"x"))
        client.post("/v1/detect?labels=red&model=other", **send)
        samples = scrape(client)
        model = {"model": "colours-int8"}
        assert value(samples, "requests_total", task="detect", outcome="ok", **model) == 1
        assert value(samples, "requests_total", task="detect", outcome="client_error", **model) == 1
        assert value(samples, "requests_total", task="detect", outcome="client_error", model="") == 1
        assert value(samples, "rejected_total", reason="unsupported-image") == 1
        assert value(samples, "rejected_total", reason="model-not-found") == 1
        assert value(samples, "request_duration_seconds_count", task="detect", **model) == 2
        for graph in ("text", "regions", "detect"):
            assert value(samples, "batch_size_sum", graph=graph, **model) == 1
            for stage in ("queue", "infer"):
                of = {"task": "detect", "stage": stage, "graph": graph, **model}
                assert value(samples, "stage_duration_seconds_count", **of) == 1
        assert not any(labels >= {("stage", "infer"), ("graph", "")} for _, labels in samples)
        inferred = sum(
            value(samples, "stage_duration_seconds_sum", task="detect", stage="infer", graph=graph, **model)
            for graph in ("text", "regions", "detect")
        )
        durations = dict(entry.split(";dur=") for entry in timing.split(", "))
        assert inferred == pytest.approx(float(durations["infer"]) / 1000, abs=1e-5)
        stages = {dict(labels)["stage"] for name, labels in samples if name == "calmclip_stage_duration_seconds_count"}
        assert stages <= set(STAGES)
        assert value(samples, "detections_kept_sum", **model) == 4
        assert value(samples, "detections_candidates_sum", **model) == 4
        assert ("process_resident_memory_bytes", frozenset()) in samples
        info = [dict(labels) for name, labels in samples if name == "calmclip_bundle_info"]
        assert [(bundle["model"], bundle["precision"]) for bundle in info] == [("colours-int8", "int8")]


def test_the_header_lists_all_stages_in_the_order_of_a_request(client, picture):
    assert client.put("/v1/collections/order", json={}).status_code == 201
    shown = [{"image": b64(picture(colour)), "label": colour} for colour in ("red", "blue")]
    answers = [
        client.post("/v1/classify?labels=red", **raw(picture("red"))),
        client.post("/v1/collections/order/items", json={"items": [{"id": "a", "text": "red"}]}),
        client.post("/v1/collections/order/search", json={"query": {"text": "red"}}),
        client.post("/v1/classifiers/order/fit", json={"method": "prototype", "items": shown}),
    ]
    stages: list[set[str]] = []
    for answer in answers:
        names, times = zip(*(s.split(";dur=") for s in answer.headers["server-timing"].split(", ")), strict=True)
        stages.append({*names})
        assert [*names] == [stage for stage in (*STAGES, "total") if stage in names]
        *parts, total = map(float, times)
        assert min(parts) >= 0
        assert sum(parts) <= total + 0.1  # rounded to 0.01 ms each
    assert stages[0] == {"read", "decode", "preprocess", "queue", "infer", "postprocess", "serialize", "total"}
    assert set.union(*stages) == {*STAGES, "total"}
    page = re.search(r"const STAGES = \[(.*?)\]", client.get("/requests.js").text)[1]
    assert set(re.findall(r'"(\w+)"', page)) >= {*STAGES}  # each has a colour in the page


def test_labels_never_hold_text_from_a_request(client, picture):
    client.post("/v1/classify?labels=red&model=secret-model", **raw(picture("red")))
    client.get("/v1/collections/secret-name")
    client.get("/secret/path")
    assert "secret" not in client.get("/metrics").text


def test_the_objective_is_a_bucket_edge(settings, serve):
    with serve(settings(slo={"latency_ms": 80, "target": 0.95})) as client:
        client.get("/healthz")
        samples = scrape(client)
        edges = {dict(labels)["le"] for name, labels in samples if name == "calmclip_request_duration_seconds_bucket"}
        assert edges == {str(edge) for edge in EDGES_S} | {"0.08", "+Inf"}
        assert value(samples, "slo_latency_seconds") == 0.08
        assert value(samples, "slo_target_ratio") == 0.95


def outliers(client) -> dict[tuple[str, str, str], float]:
    series = {labels: number for (name, labels), number in scrape(client).items() if "outliers" in name}
    return {tuple(dict(labels)[key] for key in ("model", "graph", "statistic")): n for labels, n in series.items()}


def test_outliers_of_loaded_bundles_come_from_their_reports_and_change_with_them(
    settings, serve, bundle_maker, tmp_path
):
    """The report in conftest.py: the largest value of the image graph is 40, of the text graph 6."""
    bundle_maker(tmp_path / "bundles")
    numbers = {("image", "max_inf_norm"): 40, ("image", "avg_inf_norm"): 20, ("image", "max_kurtosis"): 80,
               ("image", "avg_kurtosis"): 40, ("text", "max_inf_norm"): 6, ("text", "avg_inf_norm"): 3,
               ("text", "max_kurtosis"): 12, ("text", "avg_kurtosis"): 6}  # fmt: skip
    with serve(settings(bundles_dir=tmp_path / "bundles", reload_s=0.1)) as client:
        assert outliers(client) == {("colours-int8", *key): value for key, value in numbers.items()}
        bundle_maker(
            tmp_path / "bundles", note="another", report='{"graphs": {"text": {"outliers": "none"}}}', replace=True
        )
        while not value(scrape(client), "bundle_reloads_total", model="colours-int8", outcome="ok"):
            sleep(0.05)
        assert outliers(client) == {}


def test_a_deleted_collection_has_no_series(client):
    client.put("/v1/collections/here", json={})
    assert 'collection="here"' in client.get("/metrics").text
    client.delete("/v1/collections/here")
    assert 'collection="here"' not in client.get("/metrics").text


@pytest.mark.parametrize(
    ("status", "problem", "shed", "wanted"),
    [(200, "", "", "ok"), (204, "", "", "ok"), (404, "not-found", "", "client_error"), (499, "", "", "cancelled"),
     (422, "invalid-request", "", "client_error"), (503, "overloaded", "queue", "shed"), (503, "", "", "ok"),
     (503, "store-unavailable", "", "error"), (504, "deadline-exceeded", "", "deadline"),
     (500, "internal", "", "error"), (200, "internal", "", "error")],  # the last one failed within its answer
)  # fmt: skip
def test_outcomes(status, problem, shed, wanted):
    assert Context("id", 1.0, status=status, problem=problem, shed=shed).outcome == wanted


def test_probes_are_counted_as_catalog_and_not_ready_is_an_answer(settings, serve, monkeypatch):
    """A service that shuts down answers probes with "not ready"; that is an answer, and not a rejected request."""
    with serve(settings()) as client:
        monkeypatch.setattr(Service, "ready", False)
        assert client.get("/readyz").status_code == 503
        assert client.get("/v2/health/ready").status_code == 400
        for path in ("/healthz", "/v2/health/live", "/v2", "/v2/models/colours-int8.text"):
            assert client.get(path).status_code == 200
        counted = [dict(labels) for name, labels in scrape(client) if name == "calmclip_requests_total"]
        assert {(series["task"], series["outcome"]) for series in counted} == {("catalog", "ok")}


def test_a_store_that_does_not_answer_is_an_error_of_the_service_and_not_a_shed_request(settings, serve, monkeypatch):
    def away(*_):
        raise StoreUnavailable("the database does not answer")

    with serve(settings()) as client:
        monkeypatch.setattr("calmclip.service.collections.Collections.all", away)
        answer = client.get("/v1/collections")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        samples = scrape(client)
        assert value(samples, "requests_total", task="collections", model="", outcome="error") == 1
        assert value(samples, "requests_total", task="collections", model="", outcome="shed") == 0
        assert value(samples, "rejected_total", reason="store-unavailable") == 1
        assert sum(value for (name, _), value in samples.items() if name == "calmclip_shed_duration_seconds_count") == 0


V2 = {"memory.max": "1000000\n", "memory.current": "600000\n", "memory.stat": "anon 1\ninactive_file 100000\n"}
V1 = {
    "memory/memory.limit_in_bytes": "1000000\n",
    "memory/memory.usage_in_bytes": "600000\n",
    "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 100000\n",
}


@pytest.mark.parametrize("files", [V2, V1], ids=["v2", "v1"])
def test_the_memory_of_the_control_group_is_read_at_each_scrape(settings, serve, monkeypatch, tmp_path, files):
    """What is used is what Kubernetes calls the working set: usage without inactive files."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    limit = next(iter(files))
    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    with serve(settings()) as client:
        samples = scrape(client)
        assert value(samples, "memory_bytes", source="cgroup") == 500_000
        assert value(samples, "memory_limit_bytes", source="cgroup") == 1_000_000
        (tmp_path / limit).write_text("2000000\n")
        assert value(scrape(client), "memory_limit_bytes", source="cgroup") == 2_000_000


@pytest.mark.parametrize(
    ("name", "text"), [("memory.max", "max\n"), ("memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")]
)
def test_without_a_limit_there_are_no_series_of_memory(settings, serve, monkeypatch, tmp_path, name, text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    with serve(settings()) as client:
        assert not [sample for sample, _ in scrape(client) if sample.startswith("calmclip_memory")]


def test_free_bytes_are_those_of_the_folders_file_system(settings, serve, tmp_path):
    with serve(settings(data_dir=tmp_path / "not" / "made" / "yet")) as client:
        samples = scrape(client)
        usage = shutil.disk_usage(tmp_path)
        assert value(samples, "disk_free_bytes", folder="data") == pytest.approx(usage.free, rel=0.05)
        assert value(samples, "disk_size_bytes", folder="data") == usage.total
        assert value(samples, "replicas_expected") == 1


def test_a_task_says_how_many_requests_it_would_admit(settings, serve, picture):
    with serve(settings(queue={"max_pending": 7})) as client:
        assert value(scrape(client), "task_requests_admissible", task="classify") == 7
        client.post("/v1/classify?labels=red", **raw(picture("red")))
        for _ in range(10):
            client.post("/v1/classify?labels=red", **raw(picture("red"), **{"x-request-deadline-ms": "1"}))
        samples = scrape(client)
        assert value(samples, "task_requests_admissible", task="classify") < 7
        assert value(samples, "task_requests_admissible", task="detect") == 7
        assert value(samples, "task_requests_pending", task="classify") == 0
