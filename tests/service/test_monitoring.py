"""Prometheus and Grafana name only what exists: metrics and labels of `service.metrics`, files, a data source."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import Histogram

from service.metrics import Metrics
from service.monitoring import dashboard
from service.settings import Settings

FOLDER = Path(dashboard.__file__).parent
SCRAPE_LABELS = {"job", "instance"}  # put on every series by Prometheus itself
GENERAL = {"up", "process_resident_memory_bytes"}  # of Prometheus and of every Python client
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}

QUERIES = [
    (f"{panel.title} [{legend}]", legend, expr)
    for row in dashboard.ROWS.values()
    for panel in row
    for legend, expr in panel.queries.items()
]
EXPRESSIONS = pytest.mark.parametrize(("legend", "expr"), [q[1:] for q in QUERIES], ids=[q[0] for q in QUERIES])


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Series name -> its labels, as /metrics has them."""
    found = dict.fromkeys(GENERAL, SCRAPE_LABELS)
    for collector in vars(Metrics(Settings())).values():
        for family in collector.describe() if hasattr(collector, "_labelnames") else ():
            labels = {*collector._labelnames, *SCRAPE_LABELS, *(["le"] if isinstance(collector, Histogram) else [])}
            found |= {family.name + suffix: labels for suffix in SUFFIXES[family.type]}
    return found


@EXPRESSIONS
def test_an_expression_names_only_series_and_labels_that_exist(
    series: dict[str, set[str]], legend: str, expr: str
) -> None:
    names = re.findall(r"\b(?:calmclip_\w+|process_\w+|up\b)", expr)
    assert names
    assert set(names) <= set(series)
    matched = [
        (name, label)
        for name, matchers in re.findall(r"(\w+)\{(.*?)\}", expr)
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
    ]
    grouped = {
        label.strip() for group in re.findall(r"\b(?:by|ignoring) \((.*?)\)", expr) for label in group.split(",")
    }
    shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
    for name, label in matched:
        assert label in series[name], f"{name} has no label {label}"
    for label in grouped | shown:
        assert any(label in series[name] for name in names), f"none of {names} has a label {label}"
    assert shown <= grouped | SCRAPE_LABELS, "a label that was summed away cannot be shown"


def test_variables_name_series_and_labels_that_exist(series: dict[str, set[str]]) -> None:
    for query in dashboard.VARIABLES.values():
        name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()
        assert label in series[name]


def test_the_file_is_what_the_panels_say() -> None:
    assert dashboard.FILE.read_text(encoding="utf-8") == dashboard.text(), "run: python -m service.monitoring.dashboard"


def test_panels_have_their_own_ids_and_places() -> None:
    panels = json.loads(dashboard.FILE.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for at in (panel["gridPos"] for panel in panels):
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        taken |= cells


def test_grafana_is_provisioned_with_the_source_and_folder_that_the_files_name() -> None:
    provisioning = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "calmclip.yml").read_text())["providers"]
    used = set(re.findall(r'"uid": "(\w+)"', dashboard.text())) - {dashboard.dashboard()["uid"]}
    assert used == {source["uid"]}
    assert source["type"] == "prometheus"
    assert (provider["type"], provider["options"]["path"]) == ("file", "/var/lib/grafana/dashboards")


def test_prometheus_accepts_its_configuration_and_every_expression(tmp_path: Path) -> None:
    """Where promtool is installed, as it must be in CI; elsewhere the YAML is at least read."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert [job["job_name"] for job in config["scrape_configs"]] == ["calmclip"]
    promtool = shutil.which("promtool")
    if promtool is None and os.environ.get("CI") == "true":
        pytest.fail("promtool is not installed; CI checks what Prometheus reads")
    if promtool is None:
        pytest.skip("promtool is not installed: only the YAML was read")
    rules = [
        {"record": f"panel:{i}", "expr": expr.replace("$__rate_interval", "1m")}
        for i, (_, _, expr) in enumerate(QUERIES)
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    for what, file in (("config", FOLDER / "prometheus.yml"), ("rules", tmp_path / "rules.yml")):
        done = subprocess.run([promtool, "check", what, str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
