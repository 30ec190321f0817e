"""A sealed bundle -> another one with bounds in its graphs."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calmclip.export import parity, samples, weights
from calmclip.export import report as reports
from calmclip.export.graph import constants
from calmclip.export.portable import is_portable
from calmclip.export.resilience import refine
from calmclip.export.resilience.bounds import bounded, by_neuron, insert, sites, stored
from calmclip.export.resilience.calibrate import SLACK, bounds, forms, observe
from calmclip.export.resilience.forms import Bound
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import REPORT, Graph, ImagePreprocess, Manifest, TextPreprocess, VectorPreprocess
from calmclip.models.bundle.store import Sealed, seal, stage
from calmclip.models.errors import BadRequest
from calmclip.models.evals.progress import progress
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.library import Library, Mode, find
from calmclip.models.preprocess.image import SUFFIXES, load
from calmclip.models.vector_files import TEXT_VECTORS, read_vectors

STORED = ("none", "vectors", "all")
BOUNDS = "bounds"  # the key in report.json, and in `quantization.calibration` of bundle.json
CLAMP, SMOOTH = "clamp", "smooth"
_LIKE = 0.9999  # the least cosine of a row on calibration inputs between the bounded and the unbounded graph
_REFINED_ON = 12  # inputs, in one feed


@dataclass(frozen=True)
class Settings:
    """``graphs``: their roles, none: all that read pictures or texts. ``method``: of `calibrate.METHODS`;
    ``form``: mixed, or of `forms.FORMS`; ``slack``: see `calibrate.SLACK`; ``stored``: which constants of the file
    are bounded, see `bounds.stored`; ``count``: calibration inputs of each graph; ``rate``, ``faults`` and ``seed``: of
    a refinement."""

    graphs: tuple[str, ...] = ()
    method: str = "layer"
    form: str = "mixed"
    slack: float = SLACK
    stored: str = "all"
    refine: bool = False
    count: int = 64
    rate: float = 1e-5
    faults: int = 4
    seed: int = 0
    ops: Mode = "auto"


def calibrated(
    bundle: Bundle, name: str, out: Path, settings: Settings, data: Path | None = None, *, replace: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Sealed, dict[str, Any]]:  # fmt: skip
    """-> the sealed bundle ``name`` in ``out``, and the part of its report. The source stays as it is.

    Raises `BadRequest` for a bundle that has bounds already, or nothing to bound; `ParityLost` if an answer to a
    calibration input changes; as `seal`.
    """
    graphs = {role: _load(bundle, graph) for role, graph in bundle.manifest.graphs.items()}
    if marked := [role for role, model in graphs.items() if bounded(model)]:
        raise BadRequest(
            f"the graph {marked[0]!r} of {bundle.name} has bounds already; calibrate the bundle that it was made from"
        )
    library = find(settings.ops)
    libraries: list[Library | None] = [None, library] if library else [None]
    facts: dict[str, Any] = {}
    for role in settings.graphs or bundle.manifest.graphs:
        graph = bundle.graph(role)
        if graph.preprocess is None or graph.preprocess.feeds().keys() != graph.inputs.keys():
            say(f"{role}: left as it is, because it reads the answers of other graphs")
            continue
        say(f"{role}: observing activations")
        feeds = [*islice(_feeds(bundle, role, data), settings.count)]
        result = _bounded(role, graphs[role], feeds, libraries, settings, bundle, say)
        if result:
            graphs[role], facts[role] = result
    if not facts:
        raise BadRequest(
            f"{bundle.name} has no graph with float activations or float constants behind pictures or texts, so there "
            "is nothing to bound"
        )
    made = {
        "from": {"name": bundle.name, "digest": bundle.digest},
        "method": settings.method,
        "form": settings.form,
        "slack": settings.slack,
        "stored": settings.stored,
        "refined": settings.refine,
        "data": data.name if data else "samples that ship",
    }
    with stage(out, name) as staged:
        _write(bundle, staged, graphs, {**made, "graphs": facts})
        manifest = _manifest(bundle.manifest, name, graphs, made)
        return seal(staged, manifest, replace=replace), {**made, "graphs": facts}


def _bounded(
    role: str,
    model: onnx.ModelProto,
    feeds: list[Arrays],
    libraries: list[Library | None],
    settings: Settings,
    bundle: Bundle,
    say: Callable[[str], None],
) -> tuple[onnx.ModelProto, dict[str, Any]] | None:
    places = sites(model)
    how = forms(places, settings.form)
    slack = {tensor: 0.0 if form == CLAMP else settings.slack for tensor, form in how.items()}
    limits = bounds(model, places, observe(model, feeds, places, libraries), settings.method, slack)
    edited, count = _edited(model, limits, how, settings)
    if not limits and not count:
        return None
    facts: dict[str, Any] = {"inputs": len(feeds), "layers": len(limits), "stored": count}
    neurons = by_neuron(model, places) if settings.method == "hybrid" else None
    facts |= {"by_neuron": neurons.tensor} if neurons else {}
    if settings.refine and limits:
        say(f"{role}: refining, last layer first")
        limits, steps = _refined(role, edited, limits, libraries[-1], settings, bundle)
        edited, count = _edited(model, limits, how, settings)
        facts["refined"] = [asdict(step) for step in steps if step.factor < 1]
    before, after = (parity.onnx_run(graph, library=libraries[-1]) for graph in (model, edited))
    same = parity.compare(before, after, feeds)
    if settings.form != SMOOTH and not settings.refine:
        parity.require(same, min_cosine=_LIKE, what=f"{role}: without bounds against with bounds")
    facts["against_unbounded"] = same
    facts["bounds"] = {name: [_range(limit.low), _range(limit.high)] for name, limit in limits.items()}
    return edited, facts


def _edited(
    model: onnx.ModelProto, limits: Mapping[str, Bound], how: Mapping[str, str], settings: Settings
) -> tuple[onnx.ModelProto, int]:
    edited = insert(model, limits, how)
    if settings.stored == "none":
        return edited, 0
    return stored(edited, matrices=settings.stored == "all", among=constants(model).keys())


def _refined(
    role: str,
    model: onnx.ModelProto,
    limits: Mapping[str, Bound],
    library: Library | None,
    settings: Settings,
    bundle: Bundle,
) -> tuple[dict[str, Bound], list[refine.Step]]:
    feed = _together(bundle, role)
    output = next(iter(bundle.manifest.graphs[role].outputs))
    clean, faulty = refine.runs(model, output, feed, limits, settings.rate, settings.faults, settings.seed, library)
    return refine.refine(clean, faulty, limits, lambda names: progress(names, f"refine {role}", "layer", len(names)))


def _feeds(bundle: Bundle, role: str, data: Path | None) -> Iterator[Arrays]:
    """One input at a time, as the service prepares it."""
    spec = bundle.graph(role).preprocess
    if isinstance(spec, ImagePreprocess):
        preparer = bundle.image(role)
        for path in _pictures(data):
            yield {spec.input: preparer.prepare(load(path))[0]}
    elif isinstance(spec, TextPreprocess):
        for text in _texts(bundle, role, data):
            yield bundle.text(role).prepare([text])
    elif isinstance(spec, VectorPreprocess):
        for row in _rows(spec, data):
            yield bundle.vectors(role).prepare([row])


def _together(bundle: Bundle, role: str) -> Arrays:
    """A few shipped inputs in one feed."""
    if isinstance(bundle.graph(role).preprocess, TextPreprocess):
        return bundle.text(role).prepare(_texts(bundle, role, None)[:_REFINED_ON])
    rows = [*islice(_feeds(bundle, role, None), _REFINED_ON if bundle.graph(role).batch else 1)]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _rows(spec: VectorPreprocess, data: Path | None) -> Array:
    """Of vectors.npz in ``data``; without it random ones, because no vectors of a language model ship."""
    file = data / TEXT_VECTORS if data else None
    if file and file.is_file():
        return read_vectors(file)
    return np.random.default_rng(0).standard_normal((len(samples.calibration_texts()), spec.dim))


def _pictures(data: Path | None) -> list[Path]:
    if data is None:
        return samples.calibration_pictures()
    if not data.is_dir():
        raise BadRequest(f"--data {data} is no folder; expected one of pictures, and optionally texts.txt")
    pictures = sorted(path for path in data.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not pictures:
        raise BadRequest(f"{data} holds no pictures; expected files ending in {', '.join(SUFFIXES)}")
    return pictures


def _texts(bundle: Bundle, role: str, data: Path | None) -> list[str]:
    file = data / "texts.txt" if data else None
    lines = file.read_text(encoding="utf-8").splitlines() if file and file.is_file() else samples.calibration_texts()
    preparer = bundle.text(role)
    fitting = [line for line in lines if line.strip() and preparer.count(line) <= preparer.spec.context]
    if not fitting:
        raise BadRequest(f"none of the {len(lines)} texts fits the context of {preparer.spec.context} tokens")
    return fitting


def _load(bundle: Bundle, graph: Graph) -> onnx.ModelProto:
    """With its weights in memory, as `weights.save` expects them."""
    return onnx.load(bundle.directory / graph.file)


def _write(bundle: Bundle, staged: Path, graphs: Mapping[str, onnx.ModelProto], facts: Mapping[str, Any]) -> None:
    weights.save(graphs, staged)
    kept = bundle.manifest.named_files() - {graph.file for graph in bundle.manifest.graphs.values()}
    for file in sorted(kept):
        (staged / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.directory / file, staged / file)
    source = bundle.directory / REPORT
    report = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    (staged / REPORT).write_text(reports.text({**report, BOUNDS: facts}), encoding="utf-8")


def _manifest(old: Manifest, name: str, graphs: Mapping[str, onnx.ModelProto], made: Mapping[str, Any]) -> Manifest:
    """`family` and `source` stay: the bundle is of the same export, so it finds its float twin and its classifiers."""
    calibration = {**old.quantization.calibration, BOUNDS: dict(made)}
    return old.model_copy(
        update={
            "name": name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "portable": old.portable and all(map(is_portable, graphs.values())),
            "graphs": {role: graph.model_copy(update={"file": f"{role}.onnx"}) for role, graph in old.graphs.items()},
            "quantization": old.quantization.model_copy(update={"calibration": calibration}),
            "files": {},
        }
    )


def _range(limit: Any) -> float | list[float]:
    """One number, or the least and the greatest of a layer's neurons."""
    ends = {float(f"{value:.6g}") for value in (np.min(limit), np.max(limit))}
    return ends.pop() if len(ends) == 1 else sorted(ends)
