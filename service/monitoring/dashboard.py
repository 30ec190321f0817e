"""The Grafana dashboards, from the panels below: ``python -m calmclip.service.monitoring.dashboard`` writes `FILES`.

Tests compare the files with this module, compare metrics and labels of the expressions with `calmclip.service.metrics`
and `rules`, and evaluate each expression in a live Prometheus.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calmclip.service.endpoints import registered
from calmclip.service.monitoring.rules import COUNTED

FOLDER = Path(__file__).with_name("grafana") / "dashboards"
SOURCE = {"type": "prometheus", "uid": "prometheus"}  # as in grafana/provisioning/datasources


@dataclass(frozen=True)
class Panel:
    """``queries``: legend -> PromQL. ``width`` in Grafana's 24 columns."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: Literal["timeseries", "stat", "table", "heatmap"] = "timeseries"
    width: int = 8
    stacked: bool = False
    note: str = ""


OF_MODEL = 'model=~"$model"'
OF_BOTH = f'task=~"$task", {COUNTED}, {OF_MODEL}'  # no probes, scrapes, page
FAILED = f'{OF_BOTH}, outcome=~"error|shed|deadline"'
HITS = f'{OF_MODEL}, outcome="hit"'
OF_STORE = f'task=~"{"|".join(sorted({e.task for e in registered() if "collections" in e.tags}))}"'


def rate(metric: str, *labels: str, where: str = OF_BOTH) -> str:
    """Per second, summed over all labels but ``labels``."""
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"sum{by} (rate(calmclip_{metric}{{{where}}}[$__rate_interval]))"


def quantile(q: float, metric: str, *labels: str, where: str = OF_BOTH) -> str:
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', 'le', *labels, where=where)})"


def mean(metric: str, *labels: str, where: str = OF_MODEL) -> str:
    """Mean of a histogram's observations."""
    return f"{rate(f'{metric}_sum', *labels, where=where)} / {rate(f'{metric}_count', *labels, where=where)}"


@dataclass(frozen=True)
class Board:
    """``variables``: name -> Grafana's query for its values. ``rows``: title -> panels side by side."""

    title: str
    variables: dict[str, str]
    rows: dict[str, list[Panel]]


COMPUTE = 'stage=~"decode|preprocess|infer|postprocess|search"'
MODELS = {"model": "label_values(calmclip_bundle_info, model)"}
TASKS = {"task": "label_values(calmclip_requests_total, task)"}

OVERVIEW = Board(
    "calmclip",
    MODELS | TASKS,
    {
        "Now": [
            Panel("Replicas up", {"up": 'sum(up{job="calmclip"})'}, kind="stat", width=4),
            Panel("Replicas ready", {"ready": "sum(calmclip_ready)"}, kind="stat", width=4),
            Panel("Requests", {"requests": rate("requests_total")}, unit="reqps", kind="stat", width=4),
            Panel(
                "Failed",
                {"failed": f"({rate('requests_total', where=FAILED)} or vector(0)) / {rate('requests_total')}"},
                unit="percentunit",
                kind="stat",
                width=4,
                note="Share of requests that the service failed, shed, or answered too late.",
            ),
            Panel("p95", {"p95": quantile(0.95, "request_duration_seconds")}, unit="s", kind="stat", width=4),
            Panel("Version", {"{{version}}": "sum by (version) (calmclip_build_info)"}, kind="stat", width=4),
        ],
        "Objectives": [
            Panel(
                "Attained over 1 h and 3 d",
                {
                    "{{slo}}, 1 h": "1 - calmclip:slo_bad:ratio_rate1h",
                    "{{slo}}, 3 d": "1 - calmclip:slo_bad:ratio_rate3d",
                    "objective": "max(calmclip_slo_target_ratio)",
                },
                unit="percentunit",
                note="Share of requests answered without a failure of the service, and within the declared latency.",
            ),
            Panel(
                "Burn rate",
                {
                    f"{{{{slo}}}}, {window}": f"calmclip:slo_bad:ratio_rate{window} / "
                    "on () group_left () calmclip:slo_budget:ratio"
                    for window in ("5m", "1h", "6h")
                },
                note="How many times too fast the error budget is used up; at 14.4 over 1 h a page is sent.",
            ),
            Panel(
                "p99 and the declared latency",
                {
                    "declared": "max(calmclip_slo_latency_seconds)",
                    "p99": quantile(0.99, "request_duration_seconds"),
                },
                unit="s",
            ),
        ],
        "Requests": [
            Panel("Requests by task", {"{{task}}": rate("requests_total", "task")}, unit="reqps"),
            Panel(
                "Not answered with success, by task and outcome",
                {"{{task}} {{outcome}}": rate("requests_total", "task", "outcome", where=f'{OF_BOTH}, outcome!="ok"')},
                unit="reqps",
            ),
            Panel(
                "Answered with a problem, by kind",
                {"{{reason}}": rate("rejected_total", "reason", where="")},
                unit="reqps",
            ),
        ],
        "Latency": [
            Panel(
                "Duration",
                {f"p{q:.0f}": quantile(q / 100, "request_duration_seconds") for q in (50, 95, 99)},
                unit="s",
                width=12,
            ),
            Panel(
                "Requests by duration",
                {"{{le}}": rate("request_duration_seconds_bucket", "le")},
                unit="s",
                kind="heatmap",
                width=12,
            ),
        ],
        "Stages": [
            Panel(
                "Mean request, by stage",
                {
                    "{{stage}}": f"{rate('stage_duration_seconds_sum', 'stage')} / ignoring (stage) group_left () "
                    f"{rate('request_duration_seconds_count')}"
                },
                unit="s",
                stacked=True,
                note="Mean seconds per request in each stage; their sum is a mean request's duration.",
            ),
            Panel(
                "p95 of each stage",
                {"{{stage}} {{graph}}": quantile(0.95, "stage_duration_seconds", "stage", "graph")},
                unit="s",
            ),
            Panel(
                "Load ratio",
                {
                    "{{task}}": f"{rate('request_duration_seconds_sum', 'task')} / "
                    f"{rate('stage_duration_seconds_sum', 'task', where=f'{OF_BOTH}, {COMPUTE}')}"
                },
                note="A request's duration over its computing time: 1 is an idle service, at 5 requests mostly wait.",
            ),
        ],
        "Saturation": [
            Panel(
                "Saturation",
                {"{{of}} {{instance}}": "instance:calmclip_saturation:ratio"},
                unit="percentunit",
                note="Depth over limit; at 1, requests are turned away.",
            ),
            Panel(
                "Turned away, by reason",
                {"{{reason}}": rate("shed_duration_seconds_count", "reason", where="")},
                unit="reqps",
            ),
            Panel(
                "Requests finished per busy second, and Retry-After",
                {
                    "finished {{instance}}": "calmclip_drain_rate",
                    "Retry-After {{instance}}": "calmclip_retry_after_seconds",
                },
            ),
        ],
        "Workload": [
            Panel(
                "Bytes of a picture",
                {f"p{q}": quantile(q / 100, "picture_bytes", where="") for q in (50, 95)},
                unit="bytes",
                width=6,
            ),
            Panel(
                "Pixels of a picture",
                {f"p{q}": quantile(q / 100, "picture_pixels", where="") for q in (50, 95)},
                width=6,
            ),
            Panel(
                "Pictures refused",
                {"{{reason}}": rate("pictures_rejected_total", "reason", where="")},
                unit="reqps",
                width=6,
            ),
            Panel("Memory", {"{{instance}}": 'process_resident_memory_bytes{job="calmclip"}'}, unit="bytes", width=6),
        ],
    },
)
OF_GRAPHS = Board(
    "calmclip models",
    MODELS,
    {
        "Bundles": [
            Panel(
                "Bundles",
                {"bundle": f"calmclip_bundle_info{{{OF_MODEL}}}"},
                kind="table",
                width=16,
                note="One row per loaded bundle and replica.",
            ),
            Panel("Op library", {"ops": "calmclip_ops_info"}, kind="table"),
        ],
        "Loading": [
            Panel(
                "Last load",
                {"{{model}} {{instance}}": f"calmclip_bundle_load_seconds{{{OF_MODEL}}}"},
                unit="s",
                width=6,
            ),
            Panel(
                "Loads of a changed bundle, in an hour",
                {
                    "{{model}} {{outcome}}": "sum by (model, outcome) "
                    f"(increase(calmclip_bundle_reloads_total{{{OF_MODEL}}}[1h]))"
                },
                width=6,
            ),
            Panel(
                "Graphs in memory",
                {"{{model}} {{graph}}": f"sum by (model, graph) (calmclip_graph_open{{{OF_MODEL}}})"},
                width=6,
            ),
            Panel(
                "Last opening of a graph",
                {"{{model}} {{graph}}": f"max by (model, graph) (calmclip_graph_open_seconds{{{OF_MODEL}}})"},
                unit="s",
                width=6,
            ),
        ],
        "Outliers": [
            Panel(
                f"{title}, largest and mean over a graph",
                {
                    f"{of} {{{{model}}}} {{{{graph}}}}": "max by (model, graph) "
                    f'(calmclip_bundle_outliers{{{OF_MODEL}, statistic="{of}_{what}"}})'
                    for of in ("max", "avg")
                },
                width=12,
                note=note,
            )
            for what, title, note in (
                ("inf_norm", "Infinity norm", "In the exported float graph; an 8-bit range has to reach this far."),
                ("kurtosis", "Kurtosis", "In the exported float graph; a Gaussian has 3, extreme values give more."),
            )
        ],
        "Batches": [
            Panel("Mean batch size", {"{{model}} {{graph}}": mean("batch_size", "model", "graph")}),
            Panel(
                "Batches, by reason of release",
                {"{{graph}} {{reason}}": rate("batch_releases_total", "graph", "reason", where=OF_MODEL)},
                unit="ops",
            ),
            Panel(
                "Calls in the queue",
                {
                    "{{model}} {{graph}}": f"sum by (model, graph) (calmclip_queue_depth{{{OF_MODEL}}})",
                    "limit of one": f"max(calmclip_queue_limit{{{OF_MODEL}}})",
                },
            ),
        ],
        "Work": [
            Panel(
                "Mean run of a graph",
                {
                    "{{model}} {{graph}}": mean(
                        "stage_duration_seconds", "model", "graph", where=f'{OF_MODEL}, stage="infer"'
                    )
                },
                unit="s",
            ),
            Panel(
                "Text-cache hits",
                {
                    "{{model}}": f"{rate('text_cache_total', 'model', where=HITS)} / "
                    f"{rate('text_cache_total', 'model', where=OF_MODEL)}"
                },
                unit="percentunit",
            ),
            Panel(
                "Boxes per picture",
                {
                    "candidates {{model}}": mean("detections_candidates", "model"),
                    "kept {{model}}": mean("detections_kept", "model"),
                },
            ),
        ],
    },
)
OF_ITEMS = Board(
    "calmclip collections",
    {},
    {
        "Collections": [
            Panel("Items", {"{{collection}}": "max by (collection) (calmclip_collection_items)"}),
            Panel(
                "Since the last write",
                {"{{collection}}": "time() - max by (collection) (calmclip_collection_last_commit_timestamp_seconds)"},
                unit="s",
            ),
            Panel("Failing", {"{{kind}} {{instance}}": "calmclip_failed"}),
        ],
        "Work": [
            Panel(
                "Requests, by task and outcome",
                {"{{task}} {{outcome}}": rate("requests_total", "task", "outcome", where=OF_STORE)},
                unit="reqps",
            ),
            Panel(
                "Duration, p95",
                {"{{task}}": quantile(0.95, "request_duration_seconds", "task", where=OF_STORE)},
                unit="s",
            ),
            Panel(
                "Search and write, mean",
                {"{{stage}}": mean("stage_duration_seconds", "stage", where=f'{OF_STORE}, stage=~"search|write"')},
                unit="s",
            ),
        ],
    },
)
BOARDS = {"calmclip": OVERVIEW, "calmclip-models": OF_GRAPHS, "calmclip-collections": OF_ITEMS}  # by uid
FILES = {FOLDER / f"{uid}.json": uid for uid in BOARDS}


def dashboard(uid: str) -> dict[str, Any]:
    """Grafana's JSON model (schema 39, Grafana 10.4 and later)."""
    board = BOARDS[uid]
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in board.rows.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": _at(0, y, 24, 1),
            }
        )
        x, height = 0, 4 if row[0].kind == "stat" else 8
        for panel in row:
            panels.append({"id": len(panels) + 1, **_model(panel), "gridPos": _at(x, y + 1, panel.width, height)})
            x += panel.width
        y += 1 + height
    return {
        "uid": uid,
        "title": board.title,
        "tags": ["calmclip"],
        "links": [{"type": "dashboards", "title": "calmclip", "tags": ["calmclip"], "keepTime": True}],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "templating": {"list": [_variable(name, query) for name, query in board.variables.items()]},
        "panels": panels,
    }


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # with the time range
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "sort": 1,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _model(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        defaults["custom"] = {"fillOpacity": 40 if panel.stacked else 8, "stacking": stacking, "showPoints": "never"}
    how: dict[str, dict[str, Any]] = {
        "table": {"instant": True, "range": False, "format": "table"},
        "heatmap": {"format": "heatmap"},  # of cumulative buckets
    }
    table = panel.kind == "table"
    targets = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
        | how.get(panel.kind, {})
        | ({"exemplar": True} if "duration_seconds_bucket" in expr and panel.kind != "stat" else {})  # trace ids
        for i, (legend, expr) in enumerate(panel.queries.items())
    ]
    hide = {"id": "organize", "options": {"excludeByName": dict.fromkeys(("Time", "Value", "__name__", "job"), True)}}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.note,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"calculate": False, "yAxis": {"unit": panel.unit}} if panel.kind == "heatmap" else {},
        "targets": targets,
        "transformations": [hide] if table else [],
    }


def text(uid: str) -> str:
    return json.dumps(dashboard(uid), indent=2) + "\n"


if __name__ == "__main__":
    for file, uid in FILES.items():
        file.write_text(text(uid), encoding="utf-8")
        print(file)
