"""Recording and alerting rules, from the tables below: ``python -m calmclip.service.monitoring.rules`` writes `FILES`.

The objectives come from the service's metrics `calmclip_slo_latency_seconds` and `calmclip_slo_target_ratio`, so a
changed setting changes the alerts. Their tasks come from the endpoints. A burn rate must hold over two windows, as in
Google's SRE Workbook, chapter 5, table 5-8: the long window shows that it matters, the short one that it goes on. Every
alert has a section in README.md.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmclip.service.endpoints import UNCOUNTED, registered

FOLDER = Path(__file__).parent
RUNBOOK = "service/monitoring/README.md"  # in this repository

WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
LEAST = 100  # requests in the long window; with fewer, a share of failures says nothing
LEAST_SHED_RPS = 0.1

COUNTED = f'task!~"{"|".join(UNCOUNTED)}"'  # no probes, scrapes, page
OURS = f'{COUNTED}, outcome!~"client_error|cancelled"'  # an error of the client is not a failure of the service
LOST = f'{COUNTED}, outcome=~"error|shed|deadline"'
SHED = f'{COUNTED}, outcome="shed"'
# Without uploads, which may take long.
INTERACTIVE = f'task=~"{"|".join(sorted({e.task for e in registered() if e.interactive}))}"'

# The objective's bucket edge as a series with that `le`. Prometheus writes 1, the client library 1.0.
OBJECTIVE = 'label_replace(count_values("le", calmclip_slo_latency_seconds), "le", "$1.0", "le", "([0-9]+)")'


def total(metric: str, where: str, window: str, *labels: str) -> str:
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"sum{by} (rate(calmclip_{metric}{{{where}}}[{window}]))"


def unavailable(window: str) -> str:
    return f"({total('requests_total', LOST, window)} or vector(0)) / {total('requests_total', OURS, window)}"


def slow(window: str) -> str:
    metric = "request_duration_seconds"
    within = f"sum ({total(f'{metric}_bucket', INTERACTIVE, window, 'le')} and on (le) {OBJECTIVE})"
    return f"1 - {within} / {total(f'{metric}_count', INTERACTIVE, window)}"


@dataclass(frozen=True)
class Objective:
    """``bad``: window -> share of requests that missed it; ``all``: window -> requests per second."""

    bad: Callable[[str], str]
    all: Callable[[str], str]


OBJECTIVES = {
    "availability": Objective(unavailable, lambda window: total("requests_total", OURS, window)),
    "latency": Objective(slow, lambda window: total("request_duration_seconds_count", INTERACTIVE, window)),
}
# Per replica; 1 means full.
SATURATION = {
    "queue": "max by (instance) (calmclip_queue_depth / calmclip_queue_limit)",
    "requests": "max by (instance) (calmclip_requests_pending / calmclip_requests_limit)",
    "connections": "max by (instance) (calmclip_connections / calmclip_connections_limit)",
    "bytes": "max by (instance) (calmclip_pending_bytes / calmclip_pending_bytes_limit)",
    "pixels": "max by (instance) (calmclip_pending_pixels / calmclip_pending_pixels_limit)",
}


@dataclass(frozen=True)
class Record:
    record: str
    expr: str
    labels: tuple[tuple[str, str], ...] = ()

    def rule(self) -> dict[str, Any]:
        return {"record": self.record, "expr": self.expr} | ({"labels": dict(self.labels)} if self.labels else {})


@dataclass(frozen=True)
class Alert:
    """Fires when every condition has held for ``hold``. ``conditions``: expression -> comparison.

    ``severity``: a `page` calls a person at once; a `ticket` waits for working hours.
    """

    name: str
    conditions: dict[str, str]
    hold: str
    severity: str
    summary: str
    more: tuple[tuple[str, str], ...] = ()

    @property
    def expr(self) -> str:
        return " and ".join(f"({value} {compared})" for value, compared in self.conditions.items())

    def rule(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.hold,
            "labels": {"severity": self.severity, **dict(self.more)},
            "annotations": {"summary": self.summary, "runbook": f"{RUNBOOK}#{self.name.lower()}"},
        }


@dataclass(frozen=True)
class Burn:
    """``factor``: speed of the burn in both windows; 1 uses up the error budget exactly in its period."""

    factor: float
    long: str
    short: str
    seconds: int  # of the long window
    hold: str
    severity: str


BURNS = (
    Burn(14.4, "1h", "5m", 3600, "2m", "page"),
    Burn(6, "6h", "30m", 6 * 3600, "5m", "page"),
    Burn(3, "1d", "2h", 24 * 3600, "15m", "ticket"),
    Burn(1, "3d", "6h", 3 * 24 * 3600, "1h", "ticket"),
)


def burning(burn: Burn) -> Alert:
    over = f"> on () group_left () ({burn.factor:g} * calmclip:slo_budget:ratio)"
    return Alert(
        "CalmclipErrorBudgetBurn",
        {
            f"calmclip:slo_bad:ratio_rate{burn.long}": over,
            f"calmclip:slo_bad:ratio_rate{burn.short}": over,
            f"calmclip:slo_requests:rate{burn.long} * {burn.seconds}": f">= {LEAST}",
        },
        burn.hold,
        burn.severity,
        f"The error budget of {{{{ $labels.slo }}}} burns {burn.factor:g} times too fast: over {burn.long} "
        'a share of {{ printf "%.2f" $value }} of requests missed the objective.',
        (("long", burn.long),),
    )


RECORDS = [
    Record("calmclip:slo_budget:ratio", "1 - max(calmclip_slo_target_ratio)"),
    *(
        Record(f"calmclip:slo_{what}{window}", expr(window), (("slo", slo),))
        for slo, objective in OBJECTIVES.items()
        for window in WINDOWS
        for what, expr in (("bad:ratio_rate", objective.bad), ("requests:rate", objective.all))
    ),
    *(Record("instance:calmclip_saturation:ratio", expr, (("of", of),)) for of, expr in SATURATION.items()),
    Record(
        "calmclip:shed:ratio_rate5m",
        f"({total('requests_total', SHED, '5m')} or vector(0)) / {total('requests_total', COUNTED, '5m')}",
    ),
]
ALERTS = [
    *map(burning, BURNS),
    Alert(
        "CalmclipDown",
        {'(sum(up{job="calmclip"}) or vector(0))': "< 1"},
        "2m",
        "page",
        "No replica answers Prometheus.",
    ),
    Alert(
        "CalmclipReplicaDown",
        {'up{job="calmclip"}': "< 1"},
        "10m",
        "ticket",
        "{{ $labels.instance }} does not answer Prometheus.",
    ),
    Alert(
        "CalmclipNotReady",
        {"calmclip_ready": "< 1"},
        "5m",
        "ticket",
        "{{ $labels.instance }} runs, but is not ready.",
    ),
    Alert(
        "CalmclipSaturated",
        {"avg_over_time(instance:calmclip_saturation:ratio[5m])": "> 0.8"},
        "5m",
        "ticket",
        "{{ $labels.instance }} is {{ $value | humanizePercentage }} full ({{ $labels.of }}).",
    ),
    Alert(
        "CalmclipShedding",
        {
            "calmclip:shed:ratio_rate5m": "> 0.05",
            f"{total('requests_total', COUNTED, '5m')}": f"> {LEAST_SHED_RPS}",
        },
        "5m",
        "ticket",
        "{{ $value | humanizePercentage }} of requests are turned away.",
    ),
    Alert(
        "CalmclipReloadFailed",
        {'increase(calmclip_bundle_reloads_total{outcome="failed"}[1h])': "> 0"},
        "0m",
        "ticket",
        "A changed {{ $labels.model }} did not load on {{ $labels.instance }}; the old one goes on.",
    ),
    Alert(
        "CalmclipBundlesFailing",
        {'calmclip_failed{kind="bundles"}': "> 0"},
        "5m",
        "page",
        "{{ $value }} bundles do not load on {{ $labels.instance }}.",
    ),
    Alert(
        "CalmclipCollectionsFailing",
        {'calmclip_failed{kind="collections"}': "> 0"},
        "5m",
        "page",
        "{{ $value }} collections, or their store, do not open on {{ $labels.instance }}.",
    ),
]


def groups() -> dict[str, Any]:
    """Prometheus' rule file."""
    return {
        "groups": [
            {"name": "calmclip-records", "rules": [record.rule() for record in RECORDS]},
            {"name": "calmclip-alerts", "rules": [alert.rule() for alert in ALERTS]},
        ]
    }


def resource() -> dict[str, Any]:
    """The same rules for the Prometheus Operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "calmclip"},
        "spec": groups(),
    }


# JSON is valid YAML and needs no library.
FILES: dict[Path, Callable[[], dict[str, Any]]] = {
    FOLDER / "rules.json": groups,
    FOLDER.parent / "deploy" / "k8s" / "prometheusrule.json": resource,
}


def text(make: Callable[[], dict[str, Any]]) -> str:
    return json.dumps(make(), indent=2) + "\n"


if __name__ == "__main__":
    for file, make in FILES.items():
        file.write_text(text(make), encoding="utf-8")
        print(file)
