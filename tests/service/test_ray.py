"""The service under Ray Serve: a local cluster with two replicas, started by the documented command."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from calmclip.models.errors import BadRequest
from calmclip.service.app import create_app
from tests.asking import raw
from tests.otlp import collecting
from tests.process import free_port

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "service" / "deploy" / "ray.yaml"
READY_S, GONE_S = 180, 180
REQUESTS = 24


@contextmanager
def ray(**variables: str):
    """A client of the shipped application with two replicas of one core and the settings of the test."""
    port = free_port()
    config = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    application["args"] = {"min_replicas": 2, "max_replicas": 2}
    application["runtime_env"]["env_vars"] |= variables
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # Ray's socket paths have a maximum length
        file, log = Path(folder) / "ray.yaml", Path(folder) / "log"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder, "HOME": folder, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [Path(sys.executable).with_name("serve"), "run", file],
            env={**os.environ, **environment},
            stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
                until = time.monotonic() + READY_S
                while time.monotonic() < until:
                    assert process.poll() is None, log.read_text(encoding="utf-8")
                    with suppress(httpx.TransportError):
                        if client.get("/readyz").status_code == 200:
                            break
                    time.sleep(0.2)
                yield client
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GONE_S)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def settled(bundles, postgres, tmp_path_factory):
    """Environment variables for Ray and for the plain service."""
    data = tmp_path_factory.mktemp("ray-data")
    return {
        "CALMCLIP_BUNDLES_DIR": str(bundles),
        "CALMCLIP_DATA_DIR": str(data),
        "CALMCLIP_STORE": f"pgvector:{postgres.database()}",
        "CALMCLIP_THREADS": "1",
        "CALMCLIP_MIN_RELEVANCE": "0",
        "CALMCLIP_QUEUE__MAX_PENDING": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "600000",  # no span is sent before the end
    }


@pytest.fixture(scope="module")
def collector():
    with collecting() as opened:
        yield opened


@pytest.fixture(scope="module")
def ending():
    """Ends the cluster; a test may close it early."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def cluster(settled, collector, ending):
    return ending.enter_context(ray(**settled, CALMCLIP_OTLP_ENDPOINT=collector.url))


def counts(client: httpx.Client, task: str, outcome: str = "ok") -> dict[str, float]:
    """Requests by replica."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == "calmclip_requests_total"]
    samples_of_task = [entry for entry in samples if (entry.labels["task"], entry.labels["outcome"]) == (task, outcome)]
    return {entry.labels["replica"]: entry.value for entry in samples_of_task}


def test_two_replicas_answer_what_the_plain_service_answers(cluster, client, picture):
    assert not counts(cluster, "catalog", "shed")  # a replica that is still loading gets no request
    send = raw(picture("red", "green", "blue", "white"))
    requests = [
        ("POST", "/v1/classify?labels=red&labels=yellow", send),
        ("POST", "/v1/detect?labels=red&labels=yellow&min_score=0.1", send),
        ("POST", "/v1/embed", {"json": {"inputs": [{"text": "red"}, {"text": "a photo of a blue thing"}]}}),
        ("GET", "/v1/models", {}),
        ("GET", "/openapi.json", {}),
        ("GET", "/", {}),
        ("POST", "/v1/classify", send),  # no labels: a problem
    ]
    for method, path, body in requests:
        plain = client.request(method, path, **body)
        for _ in range(REQUESTS):
            answer = cluster.request(method, path, **body)
            assert answer.status_code == plain.status_code
            if plain.is_success:
                assert answer.content == plain.content
            else:
                assert {**answer.json(), "request_id": 0} == {**plain.json(), "request_id": 0}
    for task in ("classify", "detect", "embed"):
        by_replica = counts(cluster, task)
        assert len(by_replica) == 2, task
        assert sum(by_replica.values()) == REQUESTS


def test_all_replicas_have_the_same_collections(cluster):
    assert cluster.put("/v1/collections/shared", json={}).status_code == 201
    for at in range(6):
        item = {"id": f"a{at}", "text": "red" if at else "blue"}
        assert cluster.post("/v1/collections/shared/items", json={"items": [item]}).status_code == 200
        counted = [cluster.get("/v1/collections/shared").json()["items"] for _ in range(6)]
        assert counted == [at + 1] * 6
    search = {"query": {"text": "blue"}, "top_k": 1}
    answers = [cluster.post("/v1/collections/shared/search", json=search).json() for _ in range(8)]
    assert [[(hit["id"], hit["score"]) for hit in answer["hits"]] for answer in answers] == [[("a0", 1.0)]] * 8


def test_a_shed_request_has_a_retry_after(cluster, picture):
    send = raw(picture("red", size=(1500, 1500)))
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: cluster.post("/v1/classify?labels=red", **send), range(128)))
    assert {answer.status_code for answer in answers} == {200, 503}
    refused = [answer for answer in answers if answer.status_code == 503]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert "/problems/overloaded" in {a.json()["type"] for a in refused if "json" in a.headers["content-type"]}


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


def test_replicas_refuse_a_store_in_a_folder(quiet, monkeypatch):
    from calmclip.service.deploy.ray_app import Args, build

    monkeypatch.setenv("CALMCLIP_STORE", "lancedb:somewhere")
    with pytest.raises(BadRequest, match=r"2 replicas cannot share a store of lancedb"):
        build(Args(min_replicas=1, max_replicas=2))
    assert build(Args())


def test_a_port_for_metrics_is_refused(quiet, monkeypatch):
    from calmclip.service.deploy.ray_app import Args, build

    monkeypatch.setenv("CALMCLIP_METRICS_PORT", "9100")
    with pytest.raises(BadRequest, match="CALMCLIP_METRICS_PORT is 9100"):
        build(Args())


def test_ray_usage_statistics_must_be_disabled(monkeypatch):
    from calmclip.service.deploy.ray_app import Args, build

    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    with pytest.raises(BadRequest, match="--disable-usage-stats"):
        build(Args())


def test_a_replica_whose_bundles_do_not_load_is_not_healthy(settings, tmp_path):
    from calmclip.service.deploy.ray_app import Replica

    replica = Replica()
    replica.app = create_app(settings(bundles_dir=tmp_path))

    async def ask():
        async with replica.app.router.lifespan_context(replica.app):
            await replica.check_health()

    with pytest.raises(RuntimeError, match="the bundles do not load: none was found"):
        asyncio.run(ask())


def test_replicas_send_their_last_spans_when_they_end(cluster, ending, collector, picture):
    """Each replica sends its unsent spans at the end of its lifespan."""
    for at in range(REQUESTS):
        send = raw(picture("red"), **{"x-request-id": f"last-{at}"})
        assert cluster.post("/v1/classify?labels=red", **send).status_code == 200
    ending.close()
    assert set(collector.server_spans()) >= {f"last-{at}" for at in range(REQUESTS)}
