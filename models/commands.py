"""The verbs that need neither torch nor HTTP: show, check, run, bench, plugins. What a verb needs beyond its flags is
imported after they are read."""

import argparse
import ast
import json
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmclip.models.cli import bundle_options, bundles_option, emit, ops_mode, parser
from calmclip.models.errors import BadRequest, BundleInvalid, CalmclipError, UnknownName, suggestion
from calmclip.models.extras import extra_of, missing
from calmclip.models.registry import FAMILIES, catalog, sources

if TYPE_CHECKING:
    from calmclip.models.bundle.bundle import Bundle
    from calmclip.models.bundle.store import Sealed
    from calmclip.models.flow import Array, Arrays
    from calmclip.models.runner import Runner
    from calmclip.models.tasks import Task

CHART = "calmclip.export.chart"  # needs matplotlib, of the extra `export`


def show_command(argv: list[str]) -> int:
    """`calmclip show [BUNDLE [--outliers [--plot FILE.png]]]`: manifest and report as a table, or outliers; without
    BUNDLE, the names of all bundles."""
    options = parser("show", "Manifest and report of a bundle.")
    options.add_argument("bundle", nargs="?")
    bundles_option(options)
    options.add_argument("--outliers", action="store_true", help="of the float graphs, for each tensor")
    options.add_argument("--plot", type=Path, metavar="FILE.png", help="with --outliers: also draw them into this file")
    args = options.parse_args(argv)
    if args.plot and not args.outliers:
        options.error("--plot draws outliers; add --outliers")
    from calmclip.models.bundle.embedding import embedding_digest
    from calmclip.models.bundle.manifest import REPORT
    from calmclip.models.bundle.store import find, names, read

    if not args.bundle:
        if args.outliers:
            options.error("--outliers needs a bundle; 'calmclip show' prints the names")
        emit(args.json, {"bundles": names(args.bundles)}, lambda v: print("\n".join(v["bundles"]) or "no bundles yet"))
        return 0
    sealed = read(find(args.bundle, args.bundles), verify=False)
    if args.outliers:
        return _outliers(args.json, sealed, args.plot)
    file = sealed.directory / REPORT
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    value = {
        "digest": sealed.digest,
        "embedding_digest": embedding_digest(sealed.manifest),
        "manifest": sealed.manifest.model_dump(mode="json"),
        "report": report,
    }
    emit(args.json, value, _show)
    return 0


def _outliers(as_json: bool, sealed: "Sealed", plot: Path | None) -> int:
    from calmclip.models.outliers import outliers

    name = sealed.manifest.name
    measured = outliers(sealed.directory, sealed.manifest.graphs)
    if not measured:
        raise BundleInvalid(
            f"the report of {name} has no outliers: an older calmclip exported it, or it is damaged; export the "
            "checkpoint again"
        )
    if plot:
        import_module(CHART).draw(measured, plot, title=name)
    graphs = {
        role: graph.model_dump(mode="json")
        | {"tensors": {tensor: pair._asdict() for tensor, pair in graph.tensors.items()}}
        for role, graph in measured.items()
    }
    emit(as_json, {"bundle": name, "graphs": graphs, "plot": str(plot) if plot else None}, _show_outliers)
    return 0


def check_command(argv: list[str]) -> int:
    """`calmclip check BUNDLE`: every file hashed, every graph run once; exit 1 if a check fails."""
    options = parser("check", "Verify a bundle and run each of its graphs once.")
    options.add_argument("bundle")
    bundle_options(options)
    args = options.parse_args(argv)
    from calmclip.models.bundle.store import find
    from calmclip.models.runner import open_bundle

    directory = find(args.bundle, args.bundles)
    checks: list[dict[str, Any]] = []
    try:
        for check, passed in _checks(open_bundle(directory, threads=args.threads, ops=args.ops)):
            checks.append({"check": check, "passed": passed})
    except (BundleInvalid, UnknownName) as error:
        checks.append({"check": str(error), "passed": False})
    passed = all(check["passed"] for check in checks)
    emit(
        args.json,
        {"bundle": directory.name, "passed": passed, "checks": checks},
        lambda v: print("\n".join(f"{'ok  ' if c['passed'] else 'FAIL'} {c['check']}" for c in v["checks"])),
    )
    return 0 if passed else 1


def _checks(runner: "Runner") -> Iterator[tuple[str, bool]]:
    """Each check and whether it passed. The outputs of `regions` and `text` are inputs of `detect`, the
    tokens of `text` and the vector of `image` are inputs of `attribution`."""
    import numpy as np

    from calmclip.models.bundle.manifest import GUIDE
    from calmclip.models.suppression import Suppression

    bundle = runner.bundle
    yield f"{len(bundle.manifest.files)} files hashed", True
    bundle.warm()
    yield "tokenizer and classifier load", True
    known: dict[str, Array] = Suppression(min_score=0.0).tensors()  # with 0, `detect` has boxes to suppress
    graphs = sorted(bundle.manifest.graphs.items(), key=lambda item: GUIDE in item[1].inputs)
    for role, graph in sorted(graphs, key=lambda item: item[1].preprocess is None):
        try:
            session = runner.session(role)
            if bundle.manifest.portable:
                yield _standard(role, runner.bundle.directory / graph.file)
            if graph.preprocess is None and not graph.inputs.keys() <= known.keys():
                yield f"{role}: loads", True  # for the task raw: its inputs are unknown here
                continue
            outputs = session.run(feeds := _feeds(bundle, role, known))
        except Exception as error:  # the types of ONNX Runtime's errors are not public
            yield f"{role}: {error}", False
            continue
        known.update(outputs if role != GUIDE else {GUIDE: outputs["patches"]})
        if graph.preprocess is not None and graph.preprocess.kind == "text":
            known.update(feeds)  # `attribution` reads the same tokens
        for name, promised in graph.outputs.items():
            array = outputs[name]
            fits = array.dtype.name == promised.dtype and len(array.shape) == len(promised.shape)
            title = f"{role}: {name} {list(array.shape)} {array.dtype.name}, finite"
            yield title, fits and bool(np.isfinite(array).all())
            if name.endswith("_embeds"):
                unit = bool(np.allclose(np.linalg.norm(array, axis=-1), 1.0, atol=1e-3))
                yield f"{role}: {name} rows are unit vectors", unit


def _standard(role: str, file: Path) -> tuple[str, bool]:
    """The check of a portable bundle's graph."""
    from calmclip.models.bundle.opsets import opsets

    versions, functions = opsets(file)
    alone = versions.keys() <= {"", "ai.onnx"} and not functions
    listed = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in versions.items())
    return f"{role}: portable: operators of {listed}, {functions} local functions", alone


def _feeds(bundle: "Bundle", role: str, known: "Arrays") -> "Arrays":
    """Noise for a graph of pictures, a sentence or a vector for a graph of texts, else the outputs of other graphs."""
    import numpy as np

    from calmclip.models.bundle.manifest import GUIDE

    graph = bundle.graph(role)
    if graph.preprocess is None:
        return {name: known[name] for name in graph.inputs}
    if graph.preprocess.kind == "text":
        return bundle.text(role).prepare(["a self-test"])
    if graph.preprocess.kind == "vector":
        return bundle.vectors(role).prepare([np.ones(graph.preprocess.dim)])
    guide = {GUIDE: known[GUIDE]} if GUIDE in graph.inputs else {}
    if graph.preprocess.in_graph:
        return {graph.preprocess.input: _noise((48, 64, 3)), **guide}
    shape = [1 if isinstance(d, str) else d for d in graph.inputs[graph.preprocess.input].shape]
    return {graph.preprocess.input: np.random.default_rng(0).standard_normal(shape).astype(np.float32), **guide}


def run_command(argv: list[str]) -> int:
    """`calmclip run BUNDLE TASK PICTURE…`: answers of one task without a server; each task has its own flags.

    Each answer is printed when it is there. A picture that is missing or broken is told, the others go on, and the exit
    status is 1. With --json several pictures give a JSON object a line.
    """
    outer = parser("run", "Run a task of a bundle. 'calmclip run BUNDLE TASK --help' lists a task's flags.")
    outer.add_argument("bundle")
    outer.add_argument("task", help="; ".join(_summaries()))
    outer.add_argument("rest", nargs=argparse.REMAINDER, help="pictures, and the task's flags", metavar="…")
    bundle_options(outer)
    first = outer.parse_args(argv)
    from calmclip.models.bundle.store import find
    from calmclip.models.runner import open_bundle

    known = _runnable()
    if first.task not in known:
        raise UnknownName(f"the verb run has no task {first.task!r}; {suggestion(first.task, known)}", known=known)
    command = known[first.task].command
    assert command is not None
    options = parser(f"run {first.bundle} {first.task}", known[first.task].summary)
    options.add_argument("pictures", nargs="*", type=Path)
    command.options(options)
    bundle_options(options, defaults=first)
    args = options.parse_intermixed_args(first.rest)  # pictures may follow flags
    as_json, several = args.json or first.json, len(args.pictures) > 1
    opened = open_bundle(find(first.bundle, args.bundles), threads=args.threads, ops=args.ops)
    runner = _Telling(opened, as_json and several)
    runner.bundle.require(first.task)
    answers: list[dict[str, Any]] = []
    for answer in command.answers(runner, args):
        answers.append(answer if not several else {})
        if several or not as_json:
            print(json.dumps(answer) if as_json else command.line(answer), flush=True)
    if not (answers or runner.failed):
        raise BadRequest(f"{first.task} has no input; 'calmclip run BUNDLE {first.task} --help' lists its arguments")
    if as_json and not several:
        print(json.dumps({"answers": answers}))
    return 1 if runner.failed else 0


class _Telling:
    """The driver of `run`: a `Runner` that goes on after a broken picture. ``failed``: the number of them."""

    def __init__(self, runner: "Runner", as_json: bool) -> None:
        self.bundle = runner.bundle
        self.map = runner.map
        self.failed = 0
        self._as_json = as_json
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        """All else of the runner: a task of another package may call it."""
        return getattr(self._runner, name)

    def broken(self, picture: Path, error: CalmclipError) -> None:
        self.failed += 1
        print(f"calmclip: {picture}: {error}", file=sys.stderr)
        if self._as_json:
            print(json.dumps({"picture": str(picture), "error": str(error)}), flush=True)


def _summaries() -> Iterator[str]:
    """ "name: summary" of each task of ours with a command, from the sources of the tasks."""
    for module in sources("tasks"):
        for node in ast.walk(module):
            match node:
                case ast.Call(func=ast.Name(id="Task"), keywords=keywords):
                    said = {keyword.arg: keyword.value for keyword in keywords}
                    if "command" in said:
                        yield ": ".join(ast.literal_eval(said[key]) for key in ("name", "summary"))


def _runnable() -> dict[str, "Task[Any, Any]"]:
    from calmclip.models.tasks import TASKS

    return {name: TASKS.get(name) for name in TASKS.names() if TASKS.get(name).command}


def bench_command(argv: list[str]) -> int:
    """`calmclip bench BUNDLE [--against BUNDLE]`: p50 and p95 per graph, in alternation; the memory of open graphs."""
    options = parser("bench", "Latency of a bundle's graphs at batch 1, and their memory.")
    options.add_argument("bundle")
    options.add_argument("--against")
    options.add_argument("--picture", type=Path, help="default: grey noise of 640 x 480")
    options.add_argument("--rounds", type=int, default=50)
    options.add_argument(
        "--against-ops", type=ops_mode, help="op library of the second side; alone: of the same bundle"
    )
    bundle_options(options, cores=1)
    args = options.parse_args(argv)
    from calmclip.models.bundle.store import find
    from calmclip.models.measure import latency, machine, resident
    from calmclip.models.runner import open_bundle

    sides = [(args.bundle, args.ops)]
    if args.against or args.against_ops:
        sides.append((args.against or args.bundle, args.against_ops or args.ops))
    runners = [open_bundle(find(name, args.bundles), threads=args.threads, ops=ops) for name, ops in sides]
    picture = args.picture.read_bytes() if args.picture else _noise((480, 640, 3))
    table = latency(runners, picture, args.rounds)
    named = [f"{name} (ops {ops})" if args.against_ops else name for name, ops in sides]
    memory = [resident(find(name, args.bundles), ops, args.threads) for name, ops in sides]
    value = {"machine": machine(args.threads), "bundles": named, "latency_ms": table, "resident_mb": memory}
    emit(args.json, value, _bench)
    return 0


def plugins_command(argv: list[str]) -> int:
    """`calmclip plugins [FAMILY]`: the names in each family."""
    options = parser("plugins", "Names in every plug-in family.")
    options.add_argument("family", nargs="?", choices=list(FAMILIES))
    args = options.parse_args(argv)
    families: dict[str, list[str]] = {}
    for family in [args.family] if args.family else FAMILIES:
        try:
            families[family] = catalog(family)
        except ModuleNotFoundError as error:
            extra = extra_of(error.name or "")
            if args.family and extra:
                raise missing(f"calmclip plugins {family}", error.name or "", extra) from None
            if extra is None:
                raise
    emit(args.json, families, lambda v: print("\n".join(f"{k:12s} {', '.join(names)}" for k, names in v.items())))
    return 0


def _show(value: dict[str, Any]) -> None:
    manifest, report = value["manifest"], value["report"]
    print(f"{manifest['name']}   {manifest['precision']}   format {manifest['format']}   {value['digest'][:12]}")
    print(f"tasks    {', '.join(manifest['tasks'])}")
    ops = ", ".join(manifest["ops"]["used"])
    print(f"ops      {'standard ONNX operators alone: portable' if manifest['portable'] else ops or 'standard'}")
    if manifest["languages"]:
        print(f"texts in {', '.join(manifest['languages'])}")
    if value["embedding_digest"]:
        print(f"embeds   {value['embedding_digest']}")
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
    for reason in report.get("mixed_because", ()):
        print(f"not int8 {reason}")
    for name, facts in report.get("adapters", {}).items():
        print(f"adapter  {name}: {figures(facts)}")
    for role, numbers in report.get("embeddings", {}).items():
        print(f"report   {role} vectors against float: cosine {numbers['cosine_mean']} (least {numbers['cosine_min']})")


def figures(facts: Mapping[str, Any]) -> str:
    """What an adapter measured, on one line; a list is a number of a number."""
    return ", ".join(f"{k} {' of '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in facts.items())


def _show_outliers(value: dict[str, Any]) -> None:
    for role, graph in value["graphs"].items():
        width = max(map(len, graph["tensors"]))
        print(f"{'graph':8s} {'tensor':{width}s} {'inf norm':>12s} {'kurtosis':>12s}")
        for tensor, pair in graph["tensors"].items():
            print(f"{role:8s} {tensor:{width}s} {pair['inf_norm']:12.5g} {pair['kurtosis']:12.5g}")
        for of in ("max", "avg"):
            print(f"{role:8s} {of:{width}s} {graph[f'{of}_inf_norm']:12.5g} {graph[f'{of}_kurtosis']:12.5g}")
        print(f"{role:8s} worst of {graph['inputs']} inputs: {', '.join(graph['worst'])}\n")
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
    if None not in (sizes := value["resident_mb"]):
        print(
            "memory   " + "   ".join(f"{name} {mb:.0f} MB" for name, mb in zip(value["bundles"], sizes, strict=False))
        )


def _noise(shape: tuple[int, ...]) -> "Array":
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)
