"""Recording and alerting rules, from the tables below: ``python -m calmclip.service.monitoring.rules`` writes `FILES`.

The objectives come from the service's metrics `calmclip_slo_latency_seconds` and `calmclip_slo_target_ratio`, so a
changed setting changes the alerts. Their tasks come from the endpoints. A burn rate must hold over two windows, as in
Google's SRE Workbook, chapter 5, table 5-8: the long window shows that it matters, the short one that it goes on. Every
alert has a section in README.md, which is also a dashboard: an alert's `runbook_url` is its panel there.

No rule names a job: what exports `calmclip_build_info` is a replica. Several deployments under one Prometheus stay
apart by the labels job and namespace, where they exist.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmclip.service.endpoints import UNCOUNTED, registered

FOLDER = Path(__file__).parent
RUNBOOK = "http://127.0.0.1:3000/d/calmclip-runbook"  # compose's Grafana; --runbook names another

WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
LEAST = 100  # requests in the long window; with fewer, a share of failures says nothing
LEAST_SHED_RPS = 0.1

DEPLOYMENT = ("job", "namespace")
REPLICA = (*DEPLOYMENT, "pod", "instance")

COUNTED = f'task!~"{"|".join(UNCOUNTED)}"'  # no probes, scrapes, page
OURS = f'{COUNTED}, outcome!~"client_error|cancelled"'  # an error of the client is not a failure of the service
LOST = f'{COUNTED}, outcome=~"error|shed|deadline"'
SHED = f'{COUNTED}, outcome="shed"'
TOO_MUCH = 'reason=~"requests|bytes|pixels|deadline|queue"'  # refusals that more replicas would spare
# Without uploads, which may take long.
INTERACTIVE = f'task=~"{"|".join(sorted({e.task for e in registered() if e.interactive}))}"'


def grouped(labels: tuple[str, ...]) -> str:
    return f"by ({', '.join(labels)})"


# The objective's bucket edge as a series with that `le`. Prometheus writes 1, the client library 1.0.
OBJECTIVE = (
    f'label_replace(count_values {grouped(DEPLOYMENT)} ("le", calmclip_slo_latency_seconds), '
    '"le", "$1.0", "le", "([0-9]+)")'
)


def total(metric: str, where: str, window: str, labels: tuple[str, ...] = DEPLOYMENT) -> str:
    return f"sum {grouped(labels)} (rate(calmclip_{metric}{{{where}}}[{window}]))"


def share(part: str, whole: str) -> str:
    """0 while there is no part, even before its first series; nothing while there is no whole."""
    return f"({part} or 0 * {whole}) / {whole}"


def unavailable(window: str) -> str:
    return share(total("requests_total", LOST, window), total("requests_total", OURS, window))


def slow(window: str) -> str:
    metric, edge = "request_duration_seconds", (*DEPLOYMENT, "le")
    buckets = total(f"{metric}_bucket", INTERACTIVE, window, edge)
    within = f"sum {grouped(DEPLOYMENT)} ({buckets} and on ({', '.join(edge)}) {OBJECTIVE})"
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
TURNED_AWAY = 0.05  # the share of requests above which a gate is full


def filled(used: str, limit: str) -> str:
    return f"max {grouped(REPLICA)} (calmclip_{used} / calmclip_{limit})"


def tight() -> str:
    """What the deadline's gate would admit now may be one request, which comes and goes between two scrapes. So a gate
    that refuses more than `TURNED_AWAY` is full, whatever a scrape happened to see."""
    refused = total("shed_duration_seconds_count", 'reason="deadline"', "1m", REPLICA)
    full = f"({refused} / {total('requests_total', COUNTED, '1m', REPLICA)} > bool {TURNED_AWAY})"
    load = filled("task_requests_pending", "task_requests_admissible")
    return f"{full} > {load} or {load}"


# Per replica; 1 means full.
SATURATION = {
    "queue": filled("queue_depth", "queue_limit"),
    "requests": filled("requests_pending", "requests_limit"),
    "deadline": tight(),
    "connections": filled("connections", "connections_limit"),
    "bytes": filled("pending_bytes", "pending_bytes_limit"),
    "pixels": filled("pending_pixels", "pending_pixels_limit"),
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

    ``severity``: a `page` calls a person at once; a `ticket` waits for working hours; `none` is no call.
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

    def rule(self, runbook: str) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.hold,
            "labels": {"severity": self.severity, **dict(self.more)},
            "annotations": {"summary": self.summary, "runbook_url": f"{runbook}?viewPanel=panel-{panels()[self.name]}"},
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
    over = f"> on ({', '.join(DEPLOYMENT)}) group_left () ({burn.factor:g} * calmclip:slo_budget:ratio)"
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


LAST_COMMIT = "calmclip:collection_last_commit_timestamp_seconds:max"
REPLICAS = "calmclip:replicas:count"
RECORDS = [
    Record(REPLICAS, f"count {grouped(DEPLOYMENT)} (calmclip_build_info)"),
    Record("calmclip:slo_budget:ratio", f"1 - max {grouped(DEPLOYMENT)} (calmclip_slo_target_ratio)"),
    *(
        Record(f"calmclip:slo_{what}{window}", expr(window), (("slo", slo),))
        for slo, objective in OBJECTIVES.items()
        for window in WINDOWS
        for what, expr in (("bad:ratio_rate", objective.bad), ("requests:rate", objective.all))
    ),
    *(Record("instance:calmclip_saturation:ratio", expr, (("of", of),)) for of, expr in SATURATION.items()),
    Record(
        "calmclip:shed:ratio_rate5m",
        share(total("requests_total", SHED, "5m"), total("requests_total", COUNTED, "5m")),
    ),
    # For the autoscaler: a number for every replica, also for one without requests.
    Record(
        "instance:calmclip_shed:ratio_rate1m",
        "clamp_max({part} / ({whole} > 0) or 0 * {part}, 1)".format(
            part=total("shed_duration_seconds_count", TOO_MUCH, "1m", REPLICA),
            whole=total("requests_total", COUNTED, "1m", REPLICA),
        ),
    ),
    # A restarted service does not know the last write before its start; the rule's own last value does.
    Record(
        LAST_COMMIT,
        f"max {grouped((*DEPLOYMENT, 'collection'))} (calmclip_collection_last_commit_timestamp_seconds "
        f"or last_over_time({LAST_COMMIT}[1d])) "
        f"and on ({', '.join(DEPLOYMENT)}, collection) calmclip_collection_items",
    ),
]
ALERTS = [
    *map(burning, BURNS),
    Alert(
        "CalmclipDown",
        {
            f"(group {grouped(DEPLOYMENT)} (last_over_time({REPLICAS}[1d])) unless {REPLICAS}) "
            f"or absent_over_time({REPLICAS}[1d])": "> 0"
        },
        "2m",
        "page",
        "No replica answers Prometheus.",
    ),
    Alert(
        "CalmclipReplicaDown",
        {"up": "< 1 and on (job, instance) last_over_time(calmclip_build_info[1d])"},
        "10m",
        "ticket",
        "{{ $labels.instance }} does not answer Prometheus.",
    ),
    Alert(
        "CalmclipReplicasMissing",
        {REPLICAS: f"< on ({', '.join(DEPLOYMENT)}) max {grouped(DEPLOYMENT)} (calmclip_replicas_expected)"},
        "5m",
        "ticket",
        "{{ $value }} replicas answer Prometheus, fewer than CALMCLIP_REPLICAS.",
    ),
    Alert(
        "CalmclipRestarting",
        {
            "changes(process_start_time_seconds[30m])": "> 2 and on (job, instance) "
            "last_over_time(calmclip_build_info[30m])"
        },
        "0m",
        "page",
        "{{ $labels.instance }} started {{ $value }} times within half an hour.",
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
            "calmclip:shed:ratio_rate5m": f"> {TURNED_AWAY}",
            f"{total('requests_total', COUNTED, '5m')}": f"> {LEAST_SHED_RPS}",
        },
        "5m",
        "ticket",
        "{{ $value | humanizePercentage }} of requests are turned away.",
    ),
    Alert(
        "CalmclipMemoryHigh",
        {"calmclip_memory_bytes / calmclip_memory_limit_bytes": "> 0.9"},
        "5m",
        "ticket",
        "{{ $labels.instance }} uses {{ $value | humanizePercentage }} of its memory limit.",
    ),
    *(
        Alert(
            "CalmclipDiskFilling",
            {"calmclip_disk_free_bytes / calmclip_disk_size_bytes": f"< {least}"},
            "5m",
            severity,
            "{{ $value | humanizePercentage }} of the disk of {{ $labels.folder }} on {{ $labels.instance }} is free.",
        )
        for least, severity in ((0.1, "ticket"), (0.03, "page"))
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
    Alert(
        "CalmclipCollectionsUnbound",
        {"calmclip_collections_unbound": "> 0"},
        "5m",
        "ticket",
        "{{ $value }} collections on {{ $labels.instance }} have an embedding that no loaded bundle makes.",
    ),
    Alert(
        "CalmclipWatchdog",
        {"vector(1)": "> 0"},
        "0m",
        "none",
        "Always fires. If it stops arriving, alerts do not arrive.",
    ),
]


def panels() -> dict[str, int]:
    """Alert -> id of its panel in the dashboard of the runbook."""
    return {name: at for at, name in enumerate(dict.fromkeys(alert.name for alert in ALERTS), start=1)}


def groups(runbook: str = RUNBOOK) -> dict[str, Any]:
    """Prometheus' rule file. ``runbook``: address of the dashboard that shows README.md."""
    return {
        "groups": [
            {"name": "calmclip-records", "rules": [record.rule() for record in RECORDS]},
            {"name": "calmclip-alerts", "rules": [alert.rule(runbook) for alert in ALERTS]},
        ]
    }


def resource(runbook: str = RUNBOOK) -> dict[str, Any]:
    """The same rules for the Prometheus Operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "calmclip"},
        "spec": groups(runbook),
    }


# JSON is valid YAML and needs no library.
FILES: dict[Path, Callable[[str], dict[str, Any]]] = {
    FOLDER / "rules.json": groups,
    FOLDER.parent / "deploy" / "k8s" / "prometheusrule.json": resource,
}


def text(make: Callable[[str], dict[str, Any]], runbook: str = RUNBOOK) -> str:
    return json.dumps(make(runbook), indent=2) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description="Write the rules for Prometheus and for its Operator.")
    options.add_argument("--runbook", default=RUNBOOK, help="address of the dashboard calmclip-runbook")
    runbook = options.parse_args().runbook
    for file, make in FILES.items():
        file.write_text(text(make, runbook), encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
