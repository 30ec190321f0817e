"""The Grafana dashboard, printed from the panels below: ``python -m service.monitoring.dashboard``.

Writes ``grafana/dashboards/calmclip.json``; a test keeps that file equal to what this module says, and every
metric and label in an expression equal to what `service.metrics` has.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("grafana") / "dashboards" / "calmclip.json"
SOURCE = {"type": "prometheus", "uid": "prometheus"}  # as grafana/provisioning/datasources names it
VARIABLES = {
    "model": "label_values(calmclip_bundle_info, model)",
    "task": "label_values(calmclip_requests_total, task)",
}


@dataclass(frozen=True)
class Panel:
    """``queries``: legend -> PromQL. ``width`` in Grafana's 24 columns."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: Literal["timeseries", "stat", "table"] = "timeseries"
    width: int = 8
    stacked: bool = False
    note: str = ""


OF_MODEL = 'model=~"$model"'
OF_BOTH = f'task=~"$task", task!~"catalog|other", {OF_MODEL}'  # but not probes, scrapes, the page
FAILED = f'{OF_BOTH}, outcome=~"error|shed|deadline"'
HITS = f'{OF_MODEL}, outcome="hit"'


def rate(metric: str, *labels: str, where: str = OF_BOTH) -> str:
    """Per second, summed over all labels but ``labels``."""
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"sum{by} (rate(calmclip_{metric}{{{where}}}[$__rate_interval]))"


def quantile(q: float, metric: str, *labels: str) -> str:
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', 'le', *labels)})"


def mean(metric: str, *labels: str, where: str = OF_MODEL) -> str:
    """Of a histogram's observations."""
    return f"{rate(f'{metric}_sum', *labels, where=where)} / {rate(f'{metric}_count', *labels, where=where)}"


ROWS: dict[str, list[Panel]] = {
    "Now": [
        Panel("Replicas up", {"up": 'sum(up{job="calmclip"})'}, kind="stat", width=4),
        Panel("Requests", {"requests": rate("requests_total")}, unit="reqps", kind="stat", width=4),
        Panel(
            "Failed",
            {"failed": f"({rate('requests_total', where=FAILED)} or vector(0)) / {rate('requests_total')}"},
            unit="percentunit",
            kind="stat",
            width=4,
            note="Share of requests that ended in an error of ours, were shed, or were late.",
        ),
        Panel("p95", {"p95": quantile(0.95, "request_duration_seconds")}, unit="s", kind="stat", width=4),
        Panel(
            "Bundles",
            {"bundle": f"calmclip_bundle_info{{{OF_MODEL}}}"},
            kind="table",
            note="One row per loaded bundle and replica.",
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
            "Duration",
            {f"p{q:.0f}": quantile(q / 100, "request_duration_seconds") for q in (50, 95, 99)},
            unit="s",
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
            width=12,
            stacked=True,
            note="Seconds per request spent in each stage: the stack is as high as a mean request is long.",
        ),
        Panel(
            "p95 of each stage",
            {"{{stage}} {{graph}}": quantile(0.95, "stage_duration_seconds", "stage", "graph")},
            unit="s",
            width=12,
        ),
    ],
    "Batches": [
        Panel("Mean batch size", {"{{model}} {{graph}}": mean("batch_size", "model", "graph")}),
        Panel(
            "Calls in the queue",
            {
                "{{model}} {{graph}}": f"sum by (model, graph) (calmclip_queue_depth{{{OF_MODEL}}})",
                "limit of one": f"max(calmclip_queue_limit{{{OF_MODEL}}})",
            },
        ),
        Panel(
            "Answered with a problem, by kind", {"{{reason}}": rate("rejected_total", "reason", where="")}, unit="reqps"
        ),
    ],
    "Work saved and kept": [
        Panel(
            "Text-cache hits",
            {
                "{{model}}": f"{rate('text_cache_total', 'model', where=HITS)} / "
                f"{rate('text_cache_total', 'model', where=OF_MODEL)}"
            },
            unit="percentunit",
            width=6,
        ),
        Panel(
            "Boxes per picture",
            {
                "candidates {{model}}": mean("detections_candidates", "model"),
                "kept {{model}}": mean("detections_kept", "model"),
            },
            width=6,
        ),
        Panel("Items in collections", {"{{collection}}": "max by (collection) (calmclip_collection_items)"}, width=6),
        Panel("Memory", {"{{instance}}": 'process_resident_memory_bytes{job="calmclip"}'}, unit="bytes", width=6),
    ],
}


def dashboard() -> dict[str, Any]:
    """Grafana's JSON model (schema 39, Grafana 10.4 and later)."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
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
        "uid": "calmclip",
        "title": "calmclip",
        "tags": ["calmclip"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "templating": {"list": [_variable(name, query) for name, query in VARIABLES.items()]},
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
    table = panel.kind == "table"
    targets = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
        | ({"instant": True, "range": False, "format": "table"} if table else {})
        for i, (legend, expr) in enumerate(panel.queries.items())
    ]
    hide = {"id": "organize", "options": {"excludeByName": dict.fromkeys(("Time", "Value", "__name__", "job"), True)}}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.note,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {},
        "targets": targets,
        "transformations": [hide] if table else [],
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(FILE)
