"""A real Prometheus evaluates every expression of every panel and rule while a service is under load."""

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from math import isfinite
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from calmclip.service import resources
from calmclip.service.monitoring import dashboard, rules
from tests.asking import raw
from tests.otlp import Collector, collecting
from tests.process import free_port, installed, serving
from tests.service.test_monitoring import PANELS

CLIENTS = 5
SECONDS = 12  # of load
pytestmark = pytest.mark.slow


def load(url: str, picture: bytes, until: float) -> None:
    """Load for every panel: answers, client errors, late and shed requests, writes, searches, uncached texts."""
    numbers = count()
    bodies = {
        "classify?labels=red,blue": picture,
        "detect?labels=red&min_score=0.1": picture,
        "classify?labels=a": b"x",
    }
    with httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
        while time.monotonic() < until:
            n = next(numbers)
            for path, body in bodies.items():
                client.post(f"/v1/{path}", **raw(body))
            client.post("/v1/classify?labels=red", **raw(picture, **{"x-request-deadline-ms": "8"}))
            client.post("/v1/embed", json={"inputs": [{"text": "red"}, {"text": "blue " * (n % 9) + "red"}]})
            client.post("/v1/collections/c/items", json={"items": [{"id": str(n), "text": "red"}]})
            client.post("/v1/collections/c/search", json={"query": {"text": "red"}})


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as opened:
        yield opened


@pytest.fixture(scope="module")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory, bundle_maker, picture, collector: Collector
) -> Iterator["Prometheus"]:
    """A Prometheus that has scraped a service under load."""
    installed("prometheus", "the expressions are only read, by test_monitoring.py")
    folder = tmp_path_factory.mktemp("live")
    bundle_maker(folder / "bundles")
    settings = {
        "CALMCLIP_QUEUE__MAX_PENDING": str(CLIENTS - 1),
        "CALMCLIP_BATCH__MAX_WAIT_MS": "30",
        "CALMCLIP_RELOAD_S": "0.2",
        "CALMCLIP_SLO__LATENCY_MS": "5",
        "CALMCLIP_OTLP_ENDPOINT": collector.url,
        "OTEL_TRACES_SAMPLER": "traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.2",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    with (
        serving(folder / "bundles", folder / "data", "--threads", "1", **settings) as (_, client, _log),
        Prometheus(folder, client.base_url.port).running() as watching,
    ):
        assert client.put("/v1/collections/c", json={}).status_code == 201
        arguments = (str(client.base_url), picture("red"), time.monotonic() + SECONDS)
        threads = [threading.Thread(target=load, args=arguments) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS / 2)
        reload(folder / "bundles", bundle_maker)
        for thread in threads:
            thread.join()
        time.sleep(2)  # the last scrape, and the rules after it
        yield watching


def reload(bundles: Path, bundle_maker) -> None:
    """Replace the bundle with a version that loads, then with a version that does not."""
    bundle_maker(bundles, note="again", replace=True)
    time.sleep(1.5)
    directory = bundles / "colours-int8"
    manifest = json.loads((directory / "bundle.json").read_text())
    manifest["source"]["notes"] = "broken"
    (directory / "image.onnx").write_bytes(b"broken")
    (directory / "bundle.json").write_text(json.dumps(manifest))


class Prometheus:
    """Prometheus with the repository's configuration, except for target, intervals and Alertmanager."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port  # of the service
        config = yaml.safe_load((rules.FOLDER / "prometheus.yml").read_text())
        del config["alerting"]
        (job,) = config["scrape_configs"]
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "here"}}]
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        for name in config["rule_files"]:
            shutil.copy(rules.FOLDER / name, folder)
        address = f"127.0.0.1:{free_port()}"
        self.command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={address}",
            "--enable-feature=exemplar-storage",
            "--log.level=warn",
        ]
        self.client = httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=20)

    @contextmanager
    def running(self) -> Iterator["Prometheus"]:
        """Yields after the first successful scrape of the service."""
        self.begun = time.monotonic()
        process = subprocess.Popen(self.command)
        try:
            for _ in range(300):
                assert process.poll() is None
                with suppress(httpx.TransportError):
                    if self.client.get("/-/ready").status_code == 200 and self.ask("up == 1"):
                        break
                time.sleep(0.1)
            yield self
        finally:
            self.client.close()
            process.terminate()
            process.wait()

    def get(self, path: str, **query: str) -> Any:
        answer = self.client.get(f"/api/v1/{path}", params=query).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def ask(self, promql: str) -> list[tuple[dict[str, str], float]]:
        return [(series["metric"], float(series["value"][1])) for series in self.get("query", query=promql)["result"]]

    @property
    def seconds(self) -> int:
        """Since before its start, when some series did not exist; a busy machine takes longer than the load."""
        return int(time.monotonic() - self.begun) + 5

    def highest(self, promql: str, within: dict[str, str]) -> list[float]:
        """The maximum of each series with these labels during the load; a gauge may be back at zero now."""
        text = re.sub(r"\$\w+", ".*", promql.replace("$__rate_interval", "10s"))
        maxima = self.ask(f"max_over_time(({text})[{self.seconds}s:1s])")
        return [value for labels, value in maxima if within.items() <= labels.items()]


@dataclass(frozen=True)
class Question:
    promql: str
    within: tuple[tuple[str, str], ...] = ()  # labels of the expected series


QUESTIONS = {
    **{name: Question(expr) for name, _, expr in PANELS},
    **{f"{record.record}{dict(record.labels)}": Question(record.record, record.labels) for record in rules.RECORDS},
    **{f"{rule.name}{dict(rule.more)}: {expr}": Question(expr) for rule in rules.ALERTS for expr in rule.conditions},
}


def test_the_load_gives_data_to_every_expression_of_a_panel_or_a_rule(prometheus: Prometheus) -> None:
    highest = {name: prometheus.highest(question.promql, dict(question.within)) for name, question in QUESTIONS.items()}
    silent = {name for name, values in highest.items() if not values}
    if resources.memory(resources.CGROUPS) is None:  # this machine limits no memory
        silent -= {name for name in silent if QUESTIONS[name].promql.startswith("calmclip_memory_")}
    assert not silent
    zero = [name for name, values in highest.items() if values and not any(v and isfinite(v) for v in values)]
    named = {re.search(r"(calmclip|process)_\w+", QUESTIONS[name].promql)[0] for name in zero}
    # Nothing failed to open, and nothing was started anew.
    assert named == {"calmclip_failed", "calmclip_collections_unbound", "process_start_time_seconds"}


@pytest.mark.parametrize(
    ("name", "query"),
    sorted({pair for board in dashboard.BOARDS.values() for pair in board.variables.items()}),
    ids=lambda value: value.partition("(")[0],
)
def test_each_variable_of_a_dashboard_has_the_values_of_the_service(
    prometheus: Prometheus, name: str, query: str
) -> None:
    """Grafana asks Prometheus for the values of a label. All other variables are at `All`."""
    series, label = re.fullmatch(r"label_values\((\w+(?:{.*})?), (\w+)\)", query).groups()
    values = prometheus.get(f"label/{label}/values", **{"match[]": re.sub(r"\$\w+", ".*", series)})
    wanted = {"job": ["calmclip"], "namespace": ["here"], "model": ["colours-int8"]}
    assert values == wanted.get(name, values)
    assert values
    assert name != "instance" or values == [f"127.0.0.1:{prometheus.port}"]
    assert name != "task" or {"classify", "detect", "embed", "search"} <= set(values)


def test_every_rule_is_evaluated_without_an_error_and_the_broken_bundle_fires_an_alert(prometheus: Prometheus) -> None:
    every = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(every) == len(rules.RECORDS) + len(rules.ALERTS)
    assert {rule["health"] for rule in every} == {"ok"}, [rule.get("lastError") for rule in every]
    assert {rule["name"] for rule in every if rule.get("state") == "firing"} == {
        "CalmclipReloadFailed",
        "CalmclipWatchdog",
    }


def test_exemplars_lead_from_prometheus_to_the_collector(prometheus: Prometheus, collector: Collector) -> None:
    sent = {span.trace_id.hex() for span in collector.spans}
    for name in ("request", "stage"):
        query = f'calmclip_{name}_duration_seconds_bucket{{task="classify"}}'
        series = prometheus.get("query_exemplars", query=query, start=str(time.time() - 60), end=str(time.time()))
        trace_ids = {exemplar["labels"]["trace_id"] for entry in series for exemplar in entry["exemplars"]}
        assert trace_ids
        assert trace_ids <= sent
