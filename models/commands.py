"""The verbs that need neither torch nor HTTP: show, check, run, bench, plugins."""

import argparse
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import Sealed, find, names, read
from calmclip.models.cli import BUNDLES, bundle_options, emit, ops_mode, parser
from calmclip.models.errors import BadRequest, BundleInvalid, UnknownName, suggestion
from calmclip.models.extras import extra_of, missing
from calmclip.models.flow import Array, Arrays
from calmclip.models.measure import latency, machine
from calmclip.models.outliers import outliers
from calmclip.models.registry import FAMILIES, catalog
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.tasks import TASKS, Task
from calmclip.models.tasks.detect import Suppression

CHART = "calmclip.export.chart"  # needs matplotlib, which the extra of export brings


def show_command(argv: list[str]) -> int:
    """`calmclip show [BUNDLE [--outliers [--plot FILE.png]]]`: manifest and report as a table, or outliers; without
    BUNDLE, the names there are."""
    options = parser("show", "Manifest and report of a bundle.")
    options.add_argument("bundle", nargs="?")
    options.add_argument("--bundles", type=Path, default=BUNDLES)
    options.add_argument("--outliers", action="store_true", help="of its graphs in float, tensor by tensor")
    options.add_argument("--plot", type=Path, metavar="FILE.png", help="with --outliers: draw them into this file too")
    given = options.parse_args(argv)
    if given.plot and not given.outliers:
        options.error("--plot draws outliers; add --outliers")
    if not given.bundle:
        if given.outliers:
            options.error("--outliers needs a bundle; 'calmclip show' prints the names there are")
        emit(
            given.json, {"bundles": names(given.bundles)}, lambda v: print("\n".join(v["bundles"]) or "no bundles yet")
        )
        return 0
    sealed = read(find(given.bundle, given.bundles), verify=False)
    if given.outliers:
        return _outliers(given.json, sealed, given.plot)
    file = sealed.directory / "report.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    value = {"digest": sealed.digest, "manifest": sealed.manifest.model_dump(mode="json"), "report": report}
    emit(given.json, value, _show)
    return 0


def _outliers(as_json: bool, sealed: Sealed, plot: Path | None) -> int:
    name = sealed.manifest.name
    found = outliers(sealed.directory, sealed.manifest.graphs)
    if not found:
        raise BundleInvalid(
            f"the report of {name} says nothing of outliers: it was exported before they were measured, or is not as "
            "export writes it; export the checkpoint again"
        )
    if plot:
        import_module(CHART).draw(found, plot, title=name)
    graphs = {
        role: one.model_dump(mode="json")
        | {"tensors": {tensor: pair._asdict() for tensor, pair in one.tensors.items()}}
        for role, one in found.items()
    }
    emit(as_json, {"bundle": name, "graphs": graphs, "plot": str(plot) if plot else None}, _show_outliers)
    return 0


def check_command(argv: list[str]) -> int:
    """`calmclip check BUNDLE`: every file hashed, every graph run once; exit 1 when something is not right."""
    options = parser("check", "Verify a bundle and run each of its graphs once.")
    options.add_argument("bundle")
    bundle_options(options)
    given = options.parse_args(argv)
    directory = find(given.bundle, given.bundles)
    checks: list[dict[str, Any]] = []
    try:
        for check, passed in _checks(open_bundle(directory, threads=given.threads, ops=given.ops)):
            checks.append({"check": check, "passed": passed})
    except (BundleInvalid, UnknownName) as error:
        checks.append({"check": str(error), "passed": False})
    passed = all(check["passed"] for check in checks)
    emit(
        given.json,
        {"bundle": directory.name, "passed": passed, "checks": checks},
        lambda v: print("\n".join(f"{'ok  ' if c['passed'] else 'FAIL'} {c['check']}" for c in v["checks"])),
    )
    return 0 if passed else 1


def _checks(runner: Runner) -> Iterator[tuple[str, bool]]:
    """What was looked at, and whether it is right. `detect` is fed what `regions` and `text` answered."""
    bundle = runner.bundle
    yield f"{len(bundle.manifest.files)} files hashed", True
    bundle.warm()
    yield "tokenizer and classifier load", True
    known: dict[str, Array] = Suppression(min_score=0.0).tensors()  # so that `detect` has boxes to suppress
    for role, graph in sorted(bundle.manifest.graphs.items(), key=lambda item: item[1].preprocess is None):
        try:
            session = runner.session(role)
            if graph.preprocess is None and not graph.inputs.keys() <= known.keys():
                yield f"{role}: loads", True  # served raw: what it takes, only its caller knows
                continue
            outputs = session.run(_feeds(bundle, role, known))
        except Exception as error:  # also those of ONNX Runtime, whose types are not public
            yield f"{role}: {error}", False
            continue
        known.update(outputs)
        for name, promised in graph.outputs.items():
            found = outputs[name]
            fits = found.dtype.name == promised.dtype and len(found.shape) == len(promised.shape)
            yield (
                f"{role}: {name} {list(found.shape)} {found.dtype.name}, finite",
                fits and bool(np.isfinite(found).all()),
            )
            if name.endswith("_embeds"):
                unit = bool(np.allclose(np.linalg.norm(found, axis=-1), 1.0, atol=1e-3))
                yield f"{role}: {name} rows are unit vectors", unit


def _feeds(bundle: Bundle, role: str, known: Arrays) -> Arrays:
    """Noise for a graph of pictures, a sentence for one of texts, what others answered for the rest."""
    graph = bundle.graph(role)
    if graph.preprocess is None:
        return {name: known[name] for name in graph.inputs}
    if graph.preprocess.kind == "text":
        return bundle.text(role).prepare(["a self-test"])
    if graph.preprocess.in_graph:
        return {graph.preprocess.input: np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)}
    shape = [1 if isinstance(d, str) else d for d in graph.inputs[graph.preprocess.input].shape]
    return {graph.preprocess.input: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


def run_command(argv: list[str]) -> int:
    """`calmclip run BUNDLE TASK PICTURE…`: answers of one task, no server; every task has its own flags."""
    chosen = parser(
        "run", "Ask a bundle from the command line. 'calmclip run BUNDLE TASK --help' lists a task's flags."
    )
    chosen.add_argument("bundle")
    chosen.add_argument("task", help="; ".join(f"{name}: {task.summary}" for name, task in _runnable().items()))
    chosen.add_argument("rest", nargs=argparse.REMAINDER, help="pictures, and the task's flags", metavar="…")
    bundle_options(chosen)
    first = chosen.parse_args(argv)
    known = _runnable()
    if first.task not in known:
        raise UnknownName(f"no task {first.task!r} is run from here; {suggestion(first.task, known)}", known=known)
    command = known[first.task].command
    assert command is not None
    options = parser(f"run {first.bundle} {first.task}", known[first.task].summary)
    options.add_argument("pictures", nargs="*", type=Path)
    command.options(options)
    bundle_options(options, defaults=first)
    given = options.parse_intermixed_args(first.rest)  # pictures may stand behind options
    runner = open_bundle(find(first.bundle, given.bundles), threads=given.threads, ops=given.ops)
    runner.bundle.require(first.task)
    answers = list(command.answers(runner, given))
    if not answers:
        raise BadRequest(
            f"{first.task} was given nothing; 'calmclip run BUNDLE {first.task} --help' says what it takes"
        )
    shown = {"answers": answers}
    emit(given.json or first.json, shown, lambda value: print("\n".join(map(command.line, value["answers"]))))
    return 0


def _runnable() -> dict[str, Task[Any, Any]]:
    found = {name: TASKS.get(name) for name in TASKS.names()}
    return {name: task for name, task in found.items() if task.command}


def bench_command(argv: list[str]) -> int:
    """`calmclip bench BUNDLE [--against BUNDLE]`: p50 and p95 per graph, taking turns in one run."""
    options = parser("bench", "Latency of a bundle's graphs at batch 1.")
    options.add_argument("bundle")
    options.add_argument("--against")
    options.add_argument("--picture", type=Path, help="default: grey noise of 640 x 480")
    options.add_argument("--rounds", type=int, default=50)
    options.add_argument("--against-ops", type=ops_mode, help="op library of the other side; alone: the same bundle")
    bundle_options(options, threads=1)
    given = options.parse_args(argv)
    sides = [(given.bundle, given.ops)]
    if given.against or given.against_ops:
        sides.append((given.against or given.bundle, given.against_ops or given.ops))
    runners = [open_bundle(find(name, given.bundles), threads=given.threads, ops=ops) for name, ops in sides]
    picture = given.picture.read_bytes() if given.picture else _noise()
    table = latency(runners, picture, given.rounds)
    named = [f"{name} (ops {ops})" if given.against_ops else name for name, ops in sides]
    value = {"machine": machine(given.threads), "bundles": named, "latency_ms": table}
    emit(given.json, value, _bench)
    return 0


def plugins_command(argv: list[str]) -> int:
    """`calmclip plugins [FAMILY]`: the names in each family."""
    options = parser("plugins", "Names in every plug-in family.")
    options.add_argument("family", nargs="?", choices=list(FAMILIES))
    given = options.parse_args(argv)
    found: dict[str, list[str]] = {}
    for family in [given.family] if given.family else FAMILIES:
        try:
            found[family] = catalog(family)
        except ModuleNotFoundError as error:
            extra = extra_of(error.name or "")
            if given.family and extra:
                raise missing(f"calmclip plugins {family}", error.name or "", extra) from None
            if extra is None:
                raise
    emit(given.json, found, lambda v: print("\n".join(f"{k:12s} {', '.join(names)}" for k, names in v.items())))
    return 0


def _show(value: dict[str, Any]) -> None:
    manifest, report = value["manifest"], value["report"]
    print(f"{manifest['name']}   {manifest['precision']}   format {manifest['format']}   {value['digest'][:12]}")
    print(f"tasks    {', '.join(manifest['tasks'])}")
    print(f"source   {manifest['source']['net']} {manifest['source']['model']}, {manifest['source']['license']}")
    for role, graph in manifest["graphs"].items():
        ends = [
            ", ".join(f"{name} {t['dtype']}{list(t['shape'])}" for name, t in graph[side].items())
            for side in ("inputs", "outputs")
        ]
        how = manifest["quantization"]["graphs"].get(role, manifest["quantization"]["name"])
        print(f"{role:8s} {how:10s} {ends[0]} -> {ends[1]}")
    total = sum(file["bytes"] for file in manifest["files"].values())
    print(f"files    {len(manifest['files'])}, {total / 1e6:.1f} MB")
    for role, numbers in report.get("embeddings", {}).items():
        print(f"report   {role} vectors against float: cosine {numbers['cosine_mean']} (least {numbers['cosine_min']})")
    for role, pair in report.get("latency_ms", {}).items():
        print(f"report   {role}: int8 {pair['int8']['p50']} ms, float {pair['float32']['p50']} ms (p50)")


def _show_outliers(value: dict[str, Any]) -> None:
    for role, one in value["graphs"].items():
        width = max(map(len, one["tensors"]))
        print(f"{'graph':8s} {'tensor':{width}s} {'inf norm':>12s} {'kurtosis':>12s}")
        for tensor, pair in one["tensors"].items():
            print(f"{role:8s} {tensor:{width}s} {pair['inf_norm']:12.5g} {pair['kurtosis']:12.5g}")
        for of in ("max", "avg"):
            print(f"{role:8s} {of:{width}s} {one[f'{of}_inf_norm']:12.5g} {one[f'{of}_kurtosis']:12.5g}")
        print(f"{role:8s} worst of {one['inputs']} inputs: {', '.join(one['worst'])}\n")
    if value["plot"]:
        print(f"drawn into {value['plot']}")


def _bench(value: dict[str, Any]) -> None:
    print(", ".join(f"{k} {v}" for k, v in value["machine"].items()))
    for role, sides in value["latency_ms"].items():
        cells = [
            f"{name} {t['p50']:.2f} ms (p95 {t['p95']:.2f})" for name, t in zip(value["bundles"], sides, strict=False)
        ]
        ratio = f"   {sides[1]['p50'] / sides[0]['p50']:.2f}x" if len(sides) == 2 else ""
        print(f"{role:8s} {'   '.join(cells)}{ratio}")


def _noise() -> bytes:
    import io

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()
