"""Prometheus, Alertmanager and Grafana name only what exists: metrics and labels, files, a data source, a runbook."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import Histogram

from calmclip.service.metrics import Metrics
from calmclip.service.monitoring import dashboard, rules
from calmclip.service.settings import Slo
from tests.process import installed

FOLDER = Path(dashboard.__file__).parent
RUNBOOK = FOLDER / "README.md"
UNIT_TESTS = Path(__file__).with_name("rules_test.yml")
SCRAPE_LABELS = {"job", "instance", "namespace", "pod"}  # Prometheus, or its Operator, adds them to every series
# Of Prometheus and of every Python client.
GENERAL = {"up", *(f"process_{name}" for name in ("resident_memory_bytes", "cpu_seconds_total", "start_time_seconds"))}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}

PANELS = [
    (f"{board.title}: {panel.title} [{legend}]", legend, expr)
    for board in dashboard.BOARDS.values()
    for row in board.rows.values()
    for panel in row
    for legend, expr in panel.queries.items()
]
QUERIES = [
    *PANELS,
    *((f"{record.record}{dict(record.labels)}", "", record.expr) for record in rules.RECORDS),
    *((f"{alert.name}{dict(alert.more)}", "", expr) for alert in rules.ALERTS for expr in alert.conditions),
]
EXPRESSIONS = pytest.mark.parametrize(("legend", "expr"), [q[1:] for q in QUERIES], ids=[q[0] for q in QUERIES])


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Series name -> its labels, as /metrics has them."""
    names = dict.fromkeys(GENERAL, SCRAPE_LABELS)
    for collector in vars(Metrics(Slo())).values():
        for family in collector.describe() if hasattr(collector, "_labelnames") else ():
            labels = {*collector._labelnames, *SCRAPE_LABELS, *(["le"] if isinstance(collector, Histogram) else [])}
            names |= {family.name + suffix: labels for suffix in SUFFIXES[family.type]}
    for record in rules.RECORDS:
        outer = re.search(r"by \((.+?)\)", record.expr)
        names[record.record] = {*dict(record.labels), *outer[1].split(", ")}
    return names


@EXPRESSIONS
def test_an_expression_names_only_series_and_labels_that_exist(
    series: dict[str, set[str]], legend: str, expr: str
) -> None:
    names = re.findall(r"\b(?:(?:instance:)?calmclip[_:][\w:]+|gen_ai_(?:server|client)_\w+|process_\w+|up\b)", expr)
    assert names or expr == "vector(1)"
    assert set(names) <= set(series)
    matched = [
        (name, label)
        for name, matchers in re.findall(r"([\w:]+)\{(.*?)\}", expr)
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
    ]
    grouped = {
        label.strip() for group in re.findall(r"\b(?:by|ignoring) \((.+?)\)", expr) for label in group.split(",")
    }
    shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
    for name, label in matched:
        assert label in series[name], f"{name} has no label {label}"
    for label in grouped | shown:
        assert any(label in series[name] for name in names), f"none of {names} has a label {label}"
    ungrouped = set() if grouped else set().union(*(series[name] for name in names))
    assert shown <= grouped | ungrouped, "a legend shows a label that the expression aggregates away"


def test_variables_name_series_and_labels_that_exist(series: dict[str, set[str]]) -> None:
    for query in [query for board in dashboard.BOARDS.values() for query in board.variables.values()]:
        name, matchers, label = re.fullmatch(r"label_values\((\w+)(?:\{(.*)\})?, (\w+)\)", query).groups()
        assert {label, *re.findall(r"(\w+)=~", matchers or "")} <= series[name]


def test_the_files_are_generated_from_panels_and_rules() -> None:
    for file, uid in dashboard.FILES.items():
        assert file.read_text(encoding="utf-8") == dashboard.text(uid), (
            "run: python -m calmclip.service.monitoring.dashboard"
        )
    assert set(dashboard.FOLDER.iterdir()) == set(dashboard.FILES)
    for file, make in rules.FILES.items():
        assert file.read_text(encoding="utf-8") == rules.text(make), "run: python -m calmclip.service.monitoring.rules"


@pytest.mark.parametrize("file", dashboard.FILES, ids=lambda file: file.stem)
def test_panels_have_distinct_ids_and_cells_and_use_the_variables_of_their_board(file: Path) -> None:
    board = json.loads(file.read_text(encoding="utf-8"))
    panels = board["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    used = set(re.findall(r"\$\{?(\w+)", " ".join(expressions) + json.dumps([p.get("datasource") for p in panels])))
    assert used - {"__rate_interval"} == {variable["name"] for variable in board["templating"]["list"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for at in (panel["gridPos"] for panel in panels):
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        taken |= cells


def promtool(*arguments: str | Path) -> None:
    command = [installed("promtool", "only the files were read"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_accepts_its_configuration_and_rules_and_every_expression(tmp_path: Path) -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert [job["job_name"] for job in config["scrape_configs"]] == ["calmclip"]
    assert [(FOLDER / file).resolve() for file in config["rule_files"]] == [next(iter(rules.FILES)).resolve()]
    panels = [
        {"record": f"panel:{i}", "expr": expr.replace("$__rate_interval", "1m")}
        for i, (_, _, expr) in enumerate(QUERIES)
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": panels}]}))
    promtool("check", "config", FOLDER / "prometheus.yml")
    promtool("check", "rules", tmp_path / "rules.yml")


def test_the_rules_pass_their_unit_tests_and_every_alert_fires_in_one(tmp_path: Path) -> None:
    cases = yaml.safe_load(UNIT_TESTS.read_text())["tests"]
    fires = {test["alertname"] for case in cases for test in case.get("alert_rule_test", ()) if test["exp_alerts"]}
    assert fires == {alert.name for alert in rules.ALERTS}
    for file in (UNIT_TESTS, FOLDER / "rules.json"):
        shutil.copy(file, tmp_path)
    promtool("test", "rules", tmp_path / UNIT_TESTS.name)


def test_every_alert_links_to_its_section_of_the_runbook_which_has_no_other_section() -> None:
    """The section is a panel of a dashboard, which Grafana shows alone for such an address."""
    sections = dict(re.findall(r"^## (\w+)\n\n(\S[\s\S]*?)(?=\n## |\Z)", RUNBOOK.read_text("utf-8"), re.MULTILINE))
    assert sorted(sections) == sorted({alert.name for alert in rules.ALERTS})
    board = json.loads((dashboard.FOLDER / "calmclip-runbook.json").read_text("utf-8"))
    panels = {panel["id"]: panel for panel in board["panels"]}
    for alert in rules.ALERTS:
        url = alert.rule("https://grafana.example.org/d/calmclip-runbook")["annotations"]["runbook_url"]
        at = re.fullmatch(r"https://grafana\.example\.org/d/(\S+)\?viewPanel=panel-(\d+)", url)
        assert at[1] == board["uid"]
        panel = panels[int(at[2])]
        assert (panel["type"], panel["title"]) == ("text", alert.name)
        words = re.sub(r"\]\(\S+\)", "]", sections[alert.name]).split()
        assert re.sub(r"\]\(\S+\)", "]", panel["options"]["content"]).split() == words
    links = re.findall(r"\]\((\S+?)\)", json.dumps(board))
    assert links
    assert set(links) <= {f"?viewPanel=panel-{at}" for at in panels}


def test_no_rule_or_panel_assumes_the_name_of_a_job() -> None:
    assert not [expr for _, _, expr in QUERIES if 'job="' in expr]
    for name, _, expr in PANELS:
        assert 'job=~"$job", namespace=~"$namespace"' in expr, name


def test_burn_rates_are_those_of_the_workbook() -> None:
    """Google, The Site Reliability Workbook, chapter 5, table 5-8. A short window is a twelfth of the long window."""
    assert [(burn.factor, burn.long, burn.short, burn.severity) for burn in rules.BURNS] == [
        (14.4, "1h", "5m", "page"),
        (6, "6h", "30m", "page"),
        (3, "1d", "2h", "ticket"),
        (1, "3d", "6h", "ticket"),
    ]
    hours = {"m": 1 / 60, "h": 1, "d": 24}
    for burn in rules.BURNS:
        long, short = (int(text[:-1]) * hours[text[-1]] for text in (burn.long, burn.short))
        assert long == pytest.approx(12 * short)
        assert burn.seconds == long * 3600


def test_alertmanager_names_existing_receivers_and_notifies_nobody_by_default() -> None:
    config = yaml.safe_load((FOLDER / "alertmanager.yml").read_text())
    assert config["receivers"] == [{"name": config["route"]["receiver"]}]
    severities = {alert.severity for alert in rules.ALERTS}
    names = {alert.name for alert in rules.ALERTS}
    labels = {"alertname", "severity", "folder", *SCRAPE_LABELS, *(la for r in rules.RECORDS for la in dict(r.labels))}
    assert set(config["route"]["group_by"]) <= labels
    for rule in config["inhibit_rules"]:
        assert set(rule["equal"]) <= labels
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            label, values = re.fullmatch(r'(\w+)=~?"([\w|]+)"', matcher).groups()
            assert {*values.split("|")} <= {"severity": severities, "alertname": names}[label]
