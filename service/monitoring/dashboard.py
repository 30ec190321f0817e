"""The Grafana dashboards, from the panels below: ``python -m calmclip.service.monitoring.dashboard`` writes `FILES`.

Tests compare the files with this module, compare metrics and labels of the expressions with `calmclip.service.metrics`
and `rules`, and evaluate each expression in a live Prometheus. The runbook, README.md, is a dashboard too: so an alert
links to what to do without a web site, and while the service is away.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calmclip.service.endpoints import registered
from calmclip.service.monitoring import rules
from calmclip.service.monitoring.rules import COUNTED

FOLDER = Path(__file__).with_name("grafana") / "dashboards"
PAGE = Path(__file__).with_name("README.md")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


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


DEPLOYMENT = 'job=~"$job", namespace=~"$namespace"'  # of recorded series
REPLICAS = f'{DEPLOYMENT}, instance=~"$instance"'
OF_MODEL = 'model=~"$model"'
OF_BOTH = f'task=~"$task", {COUNTED}, {OF_MODEL}'  # no probes, scrapes, page
FAILED = f'{OF_BOTH}, outcome=~"error|shed|deadline"'
HITS = f'{OF_MODEL}, outcome="hit"'
OF_STORE = f'task=~"{"|".join(sorted({e.task for e in registered() if "collections" in e.tags}))}", {OF_MODEL}'


def of(metric: str, where: str = "", among: str = REPLICAS) -> str:
    """The series of the replicas that the reader has chosen."""
    return f"{metric}{{{', '.join(filter(None, (where, among)))}}}"


def rate(metric: str, *labels: str, where: str = OF_BOTH) -> str:
    """Per second, summed over all labels but ``labels``."""
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"sum{by} (rate({of(f'calmclip_{metric}', where)}[$__rate_interval]))"


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


GEN_AI = 'gen_ai_request_model=~"$model"'  # of OpenTelemetry's names
TOKENS = "gen_ai_client_embeddings_operation_input_tokens"
OPERATIONS = "gen_ai_server_request_duration_seconds"
COMPUTE = 'stage=~"decode|preprocess|infer|postprocess|search"'
# Of every board. A service is what exports calmclip_build_info, whatever its job is called.
WHERE = {
    "job": "label_values(calmclip_build_info, job)",
    "namespace": 'label_values(calmclip_build_info{job=~"$job"}, namespace)',
    "instance": f"label_values(calmclip_build_info{{{DEPLOYMENT}}}, instance)",
}
MODELS = WHERE | {"model": f"label_values({of('calmclip_bundle_info')}, model)"}
TASKS = {"task": f"label_values({of('calmclip_requests_total')}, task)"}

OVERVIEW = Board(
    "calmclip",
    MODELS | TASKS,
    {
        "Now": [
            Panel(
                "Replicas up",
                {"up": f"sum({of('up')})", "expected": f"max({of('calmclip_replicas_expected')})"},
                kind="stat",
                width=4,
            ),
            Panel("Replicas ready", {"ready": f"sum({of('calmclip_ready')})"}, kind="stat", width=4),
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
            Panel("Version", {"{{version}}": f"sum by (version) ({of('calmclip_build_info')})"}, kind="stat", width=4),
        ],
        "Objectives": [
            Panel(
                "Attained over 1 h and 3 d",
                {
                    "{{slo}}, 1 h": f"1 - {of('calmclip:slo_bad:ratio_rate1h', among=DEPLOYMENT)}",
                    "{{slo}}, 3 d": f"1 - {of('calmclip:slo_bad:ratio_rate3d', among=DEPLOYMENT)}",
                    "objective": f"max({of('calmclip_slo_target_ratio')})",
                },
                unit="percentunit",
                note="Share of requests answered without a failure of the service, and within the declared latency.",
            ),
            Panel(
                "Burn rate",
                {
                    f"{{{{slo}}}}, {window}": f"{of(f'calmclip:slo_bad:ratio_rate{window}', among=DEPLOYMENT)} / "
                    "on (job, namespace) group_left () calmclip:slo_budget:ratio"
                    for window in ("5m", "1h", "6h")
                },
                note="How many times too fast the error budget is used up; at 14.4 over 1 h a page is sent.",
            ),
            Panel(
                "p99 and the declared latency",
                {
                    "declared": f"max({of('calmclip_slo_latency_seconds')})",
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
                {"{{of}} {{instance}}": of("instance:calmclip_saturation:ratio")},
                unit="percentunit",
                note="Work in progress over what is admissible now; at 1, requests are turned away.",
            ),
            Panel(
                "Share turned away",
                {"{{instance}}": of("instance:calmclip_shed:ratio_rate1m")},
                unit="percentunit",
                note="Because of load.",
            ),
            Panel(
                "Turned away, by reason",
                {"{{reason}}": rate("shed_duration_seconds_count", "reason", where="")},
                unit="reqps",
            ),
        ],
        "Admission": [
            Panel(
                "In progress, and admissible now, by task",
                {
                    "{{task}} {{instance}}": of("calmclip_task_requests_pending"),
                    "admissible, {{task}} {{instance}}": of("calmclip_task_requests_admissible"),
                },
                width=12,
            ),
            Panel(
                "Requests finished per busy second, and Retry-After",
                {
                    "finished {{instance}}": of("calmclip_drain_rate"),
                    "Retry-After {{instance}}": of("calmclip_retry_after_seconds"),
                },
                width=12,
            ),
        ],
        "Workload": [
            Panel(
                "Bytes of a picture",
                {f"p{q}": quantile(q / 100, "picture_bytes", where="") for q in (50, 95)},
                unit="bytes",
            ),
            Panel(
                "Pixels of a picture",
                {f"p{q}": quantile(q / 100, "picture_pixels", where="") for q in (50, 95)},
            ),
            Panel(
                "Pictures refused",
                {"{{reason}}": rate("pictures_rejected_total", "reason", where="")},
                unit="reqps",
            ),
        ],
        "Machine": [
            Panel(
                "Processor cores used",
                {"{{instance}}": f"rate({of('process_cpu_seconds_total')}[$__rate_interval])"},
                width=6,
            ),
            Panel(
                "Memory, and its limit",
                {
                    "resident {{instance}}": of("process_resident_memory_bytes"),
                    "container {{instance}}": of("calmclip_memory_bytes"),
                    "limit {{instance}}": of("calmclip_memory_limit_bytes"),
                },
                unit="bytes",
                width=6,
                note="Without a control group, or without a limit, there is the resident memory alone.",
            ),
            Panel(
                "Disk, free",
                {"{{folder}} {{instance}}": f"{of('calmclip_disk_free_bytes')} / {of('calmclip_disk_size_bytes')}"},
                unit="percentunit",
                width=6,
            ),
            Panel(
                "Starts in an hour",
                {"{{instance}}": f"changes({of('process_start_time_seconds')}[1h])"},
                width=6,
            ),
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
                {"bundle": of("calmclip_bundle_info", OF_MODEL)},
                kind="table",
                width=16,
                note="One row per loaded bundle and replica.",
            ),
            Panel("Op library", {"ops": of("calmclip_ops_info")}, kind="table"),
        ],
        "Loading": [
            Panel(
                "Last load",
                {"{{model}} {{instance}}": of("calmclip_bundle_load_seconds", OF_MODEL)},
                unit="s",
                width=6,
            ),
            Panel(
                "Loads of a changed bundle, in an hour",
                {
                    "{{model}} {{outcome}}": "sum by (model, outcome) "
                    f"(increase({of('calmclip_bundle_reloads_total', OF_MODEL)}[1h]))"
                },
                width=6,
            ),
            Panel(
                "Graphs in memory",
                {"{{model}} {{graph}}": f"sum by (model, graph) ({of('calmclip_graph_open', OF_MODEL)})"},
                width=6,
            ),
            Panel(
                "Last opening of a graph",
                {"{{model}} {{graph}}": f"max by (model, graph) ({of('calmclip_graph_open_seconds', OF_MODEL)})"},
                unit="s",
                width=6,
            ),
        ],
        "Outliers": [
            Panel(
                f"{title}, largest and mean over a graph",
                {
                    f"{which} {{{{model}}}} {{{{graph}}}}": "max by (model, graph) ("
                    + of("calmclip_bundle_outliers", f'{OF_MODEL}, statistic="{which}_{what}"')
                    + ")"
                    for which in ("max", "avg")
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
                    "{{model}} {{graph}}": f"sum by (model, graph) ({of('calmclip_queue_depth', OF_MODEL)})",
                    "limit of one": f"max({of('calmclip_queue_limit', OF_MODEL)})",
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
        "Embeddings, by OpenTelemetry's names": [
            Panel(
                "Operations, by error",
                {
                    "{{gen_ai_request_model}} {{error_type}}": "sum by (gen_ai_request_model, error_type) "
                    f"(rate({of(f'{OPERATIONS}_count', GEN_AI)}[$__rate_interval]))"
                },
                unit="reqps",
            ),
            Panel(
                "Operations, p95",
                {
                    "{{gen_ai_request_model}}": "histogram_quantile(0.95, sum by (le, gen_ai_request_model) "
                    f"(rate({of(f'{OPERATIONS}_bucket', GEN_AI)}[$__rate_interval])))"
                },
                unit="s",
            ),
            Panel(
                "Tokens a second",
                {
                    "{{gen_ai_request_model}}": "sum by (gen_ai_request_model) "
                    f"(rate({of(f'{TOKENS}_sum', GEN_AI)}[$__rate_interval]))"
                },
                note="Of texts; a picture has none.",
            ),
        ],
    },
)
OF_ITEMS = Board(
    "calmclip collections",
    MODELS,
    {
        "Collections": [
            Panel("Items", {"{{collection}}": f"max by (collection) ({of('calmclip_collection_items')})"}, width=6),
            Panel(
                "Since the last write",
                {"{{collection}}": f"time() - max by (collection) ({of(rules.LAST_COMMIT, among=DEPLOYMENT)})"},
                unit="s",
                width=6,
                note="A restart of the service does not end it: Prometheus keeps the last write.",
            ),
            Panel("Failing", {"{{kind}} {{instance}}": of("calmclip_failed")}, width=6),
            Panel(
                "Without a bundle",
                {"{{instance}}": of("calmclip_collections_unbound")},
                width=6,
                note="Collections whose embedding no loaded bundle makes.",
            ),
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
RUNBOOK = "calmclip-runbook"  # uid
FILES = {FOLDER / f"{uid}.json": uid for uid in (*BOARDS, RUNBOOK)}


def dashboard(uid: str) -> dict[str, Any]:
    """Grafana's JSON model (schema 39, Grafana 10.4 and later)."""
    return _runbook() if uid == RUNBOOK else _board(uid, BOARDS[uid])


def _board(uid: str, board: Board) -> dict[str, Any]:
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
    variables = [_source(), *(_variable(name, query) for name, query in board.variables.items())]
    return _shell(uid, board.title, variables, panels)


def _runbook() -> dict[str, Any]:
    """A panel for each alert, with its section of README.md."""
    page, panels = PAGE.read_text(encoding="utf-8"), []
    for name, at in rules.panels().items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0].strip()
        content = re.sub(r"\]\(#(\w+)\)", _link, section)
        panels.append(
            {
                "id": at,
                "type": "text",
                "title": name,
                "options": {"mode": "markdown", "content": content},
                "gridPos": _at(0, 8 * (at - 1), 24, 8),
            }
        )
    return _shell(RUNBOOK, "calmclip runbook", [], panels)


def _link(anchor: re.Match[str]) -> str:
    """A link to another section as a link to its panel."""
    ids = {name.lower(): at for name, at in rules.panels().items()}
    return f"](?viewPanel=panel-{ids[anchor[1]]})"


def _shell(uid: str, title: str, variables: list[dict[str, Any]], panels: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "uid": uid,
        "title": title,
        "tags": ["calmclip"],
        "links": [{"type": "dashboards", "title": "calmclip", "tags": ["calmclip"], "keepTime": True}],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "templating": {"list": variables},
        "panels": panels,
    }


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _source() -> dict[str, Any]:
    """The data source; until one is chosen, Grafana's default."""
    return {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus"}


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # with the time range
        "includeAll": True,
        # Series without the label match too. But all jobs are those of calmclip, not every job of the Prometheus.
        "allValue": None if name == "job" else ".*",
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
    hide = {"id": "organize", "options": {"excludeByName": dict.fromkeys(("Time", "Value", "__name__"), True)}}
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
