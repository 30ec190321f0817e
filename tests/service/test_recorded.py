"""The rules and the autoscaler's metrics on series recorded from real trouble by `tests/bench/record_series.py`.

promtool evaluates the shipped rules on them. A scene of steady load is repeated until the alerts have had their time,
its counters going on; where something happened, its last state goes on.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, cycle, islice, repeat
from pathlib import Path

import pytest
import yaml

from calmclip.service.monitoring import rules
from tests.service.test_k8s import FOLDER, KINDS, load
from tests.service.test_monitoring import promtool

RECORDED = json.loads(Path(__file__).with_name("recorded.json").read_text())
STEP_S = RECORDED["step_s"]
SCENES = RECORDED["scenes"]
HELD = {"dead-replica", "crash-loop", "full-disk"}  # the other scenes are steady
NONE = ("_", "stale")
MINUTES = 15
# What stood here before: the autoscaler's metric over its target, and the conditions of alerts.
OLD = {
    "hpa": "max(avg_over_time(calmclip_queue_depth[1m]) / calmclip_queue_limit) / 0.3 > 1.1",
    "CalmclipDown": '(sum(up{job="calmclip"}) or vector(0)) < 1',
    "CalmclipReplicaDown": 'up{job="calmclip"} < 1',
    **{
        f"CalmclipSaturated {used}": f"avg_over_time((calmclip_{used} / calmclip_{limit})[5m:15s]) > 0.8"
        for used, limit in (
            ("queue_depth", "queue_limit"),
            ("requests_pending", "requests_limit"),
            ("connections", "connections_limit"),
            ("pending_bytes", "pending_bytes_limit"),
            ("pending_pixels", "pending_pixels_limit"),
        )
    },
}


def samples(notation: str) -> list[str]:
    """Of promtool's notation: `AxN` is A and N more, `_xN` is nothing N times."""
    values: list[str] = []
    for token in notation.split():
        value, times, count = token.partition("x")
        values += [value] * (int(count) + (value != "_") if times else 1)
    return values


def is_counter(series: str) -> bool:
    return re.match(r"\w+_(total|count|sum|bucket)\{", series) is not None


def lasting(scene: str, minutes: float) -> dict[str, list[str]]:
    """The scene's series, for so long."""
    count = round(60 * minutes / STEP_S)
    series = {name: samples(notation) for name, notation in SCENES[scene].items()}
    if scene in HELD:
        return {
            name: [*islice(chain(values, repeat("_" if values[-1] in NONE else values[-1])), count)]
            for name, values in series.items()
        }
    return {name: [*islice(going_on(values, is_counter(name)), count)] for name, values in series.items()}


def going_on(values: list[str], counter: bool) -> Iterator[str]:
    if not counter:
        yield from cycle(values)
    numbers = [float(value) for value in values if value not in NONE]
    base = 0.0
    while True:
        yield from (value if value in NONE else f"{base + float(value):.12g}" for value in values)
        base += numbers[-1] - numbers[0]


def timeline(*parts: tuple[str, float]) -> list[dict[str, str]]:
    """promtool's `input_series`: scenes with their minutes, one after another. Counters go on from scene to scene."""
    made: dict[str, list[str]] = {}
    length = 0
    for scene, minutes in parts:
        part = lasting(scene, minutes)
        for name, values in part.items():
            before = made.setdefault(name, ["_"] * length)
            last = next((value for value in reversed(before) if value not in NONE), None)
            first = next((value for value in values if value not in NONE), None)
            shift = float(last) - float(first) if is_counter(name) and last is not None and first is not None else 0.0
            made[name] = before + [v if v in NONE or not shift else f"{float(v) + shift:.12g}" for v in values]
        length += round(60 * minutes / STEP_S)
        for name, values in made.items():
            if len(values) < length:
                made[name] = values + ["stale" if values[-1] not in NONE else "_"] + ["_"] * (length - len(values) - 1)
    return [{"series": name, "values": " ".join(values)} for name, values in made.items()]


@dataclass(frozen=True)
class Check:
    """``expr`` has a result at every one of ``minutes``, or at none of them."""

    expr: str
    minutes: tuple[float, ...]
    holds: bool


def firing(alert: str, **labels: str) -> str:
    inside = "".join(f', {name}="{value}"' for name, value in labels.items())
    return f'ALERTS{{alertstate="firing", alertname="{alert}"{inside}}}'


def every(first: int, last: int) -> tuple[float, ...]:
    return tuple(map(float, range(first, last + 1)))


def check(tmp_path: Path, parts: tuple[tuple[str, float], ...], checks: list[Check]) -> None:
    tests = [
        {
            "expr": f"group({check.expr})",
            "eval_time": f"{round(60 * minute)}s",
            "exp_samples": [{"labels": "{}", "value": 1}] if check.holds else [],
        }
        for check in checks
        for minute in check.minutes
    ]
    case = {"interval": f"{STEP_S}s", "input_series": timeline(*parts), "promql_expr_test": tests}
    file = {"rule_files": ["rules.json"], "evaluation_interval": "15s", "tests": [case]}
    (tmp_path / "recorded.yml").write_text(yaml.safe_dump(file))
    shutil.copy(rules.FOLDER / "rules.json", tmp_path)
    promtool("test", "rules", tmp_path / "recorded.yml")


def wants_more() -> str:
    """Whether the autoscaler adds a replica: it does if a metric's mean is a tenth over its target."""
    made = {rule["name"]["as"]: rule for rule in load(FOLDER / "prometheus-adapter.yml")[0]["rules"]["custom"]}
    wishes = []
    for metric in KINDS["HorizontalPodAutoscaler"]["spec"]["metrics"]:
        query = made[metric["pods"]["metric"]["name"]]["metricsQuery"]
        query = query.replace("<<.GroupBy>>", "instance").replace("<<.LabelMatchers>>", 'job="calmclip"')
        target = int(metric["pods"]["target"]["averageValue"].removesuffix("m")) / 1000
        wishes.append(f"(avg({query}) / {target} > 1.1)")
    return " or ".join(wishes)


@pytest.mark.parametrize("scene", ["overload-by-deadline", "overload-by-queue"])
def test_overload_scales_and_alerts_and_its_end_is_noticed(scene: str, tmp_path: Path) -> None:
    """Ten minutes without load, 15 of overload, 15 without. Before, overload by deadline was invisible."""
    shown = scene == "overload-by-queue"
    checks = [
        Check(wants_more(), (*every(2, 10), *every(28, 40)), False),
        Check(wants_more(), every(12, 25), True),
        *(Check(firing(name), (*every(0, 10), 39.0), False) for name in ("CalmclipSaturated", "CalmclipShedding")),
        *(Check(firing(name), every(22, 25), True) for name in ("CalmclipSaturated", "CalmclipShedding")),
        Check(firing("CalmclipWatchdog"), every(1, 40), True),
        Check(" or ".join(f"({expr})" for name, expr in OLD.items() if "Saturated" in name), every(17, 25), shown),
    ]
    if not shown:
        checks.append(Check(OLD["hpa"], every(2, 40), False))
    check(tmp_path, (("no-load", 10), (scene, 15), ("no-load", 15)), checks)


@pytest.mark.parametrize("scene", ["no-load", "below-capacity"])
def test_without_overload_nothing_scales_and_only_the_watchdog_fires(scene: str, tmp_path: Path) -> None:
    others = 'ALERTS{alertstate="firing", alertname!="CalmclipWatchdog"}'
    checks = [Check(wants_more(), every(2, MINUTES), False), Check(others, every(1, MINUTES), False)]
    check(tmp_path, ((scene, MINUTES + 1),), checks)


def test_a_dead_replica_is_missing_though_its_series_are_gone(tmp_path: Path) -> None:
    """It is killed after 50 s. Before, one replica of two was as good as two."""
    old = f"({OLD['CalmclipDown']}) or ({OLD['CalmclipReplicaDown']})"
    checks = [
        Check(firing("CalmclipReplicasMissing"), every(1, 5), False),
        Check(firing("CalmclipReplicasMissing", severity="ticket", job="calmclip"), every(8, MINUTES), True),
        Check(firing("CalmclipDown"), every(1, MINUTES), False),
        Check(old, every(2, MINUTES), False),
    ]
    check(tmp_path, (("dead-replica", MINUTES + 1),), checks)


def test_a_crash_loop_pages(tmp_path: Path) -> None:
    checks = [
        Check(firing("CalmclipRestarting"), (0.5,), False),
        Check(firing("CalmclipRestarting", severity="page"), (4.0, 10.0, 20.0), True),
        Check(firing("CalmclipRestarting"), (60.0,), False),
    ]
    check(tmp_path, (("crash-loop", 61),), checks)


def test_a_disk_that_fills_is_a_ticket_and_then_a_page(tmp_path: Path) -> None:
    checks = [
        Check(firing("CalmclipDiskFilling"), every(0, 5), False),
        Check(firing("CalmclipDiskFilling", folder="data", severity="ticket"), every(8, MINUTES), True),
        Check(firing("CalmclipDiskFilling", folder="data", severity="page"), every(8, MINUTES), True),
        Check(firing("CalmclipDiskFilling", folder="bundles"), every(0, MINUTES), False),
    ]
    check(tmp_path, (("full-disk", MINUTES + 1),), checks)


def test_a_database_that_is_away_pages(tmp_path: Path) -> None:
    checks = [
        Check(firing("CalmclipCollectionsFailing"), every(0, 4), False),
        Check(firing("CalmclipCollectionsFailing", severity="page"), every(6, MINUTES), True),
        Check(firing("CalmclipDown"), every(1, MINUTES), False),
    ]
    check(tmp_path, (("database-away", MINUTES + 1),), checks)
