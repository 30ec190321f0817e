"""`build(recipe)`: checkpoint -> sealed bundles. The only place that knows the order of the steps.

load -> adapters -> fold -> trace -> parity (torch against float ONNX), tower by tower
     -> observe or read ranges -> quantize -> rewrite with our ops -> parity (standard against rewritten), again so
     -> write float and INT8 side by side -> measure one against the other -> bars -> seal

Quantized before rewritten: calibration opens sessions on graphs of standard ops, and what was quantized is the oracle
for what was rewritten. All towers are traced before the first is quantized, so that torch's weights may go; graphs
stay in memory, each weight once, and no more than one session with it.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from calmclip.export import calibrate, parity, report, rewrites, samples, weights
from calmclip.export.adapters import Adapt, Context, adapt
from calmclip.export.checkpoints import Weights
from calmclip.export.checkpoints.weights import one_line
from calmclip.export.nets import NETS, Built, Net, Tower, ready
from calmclip.export.quantizers import QUANTIZERS, Goal, Settled
from calmclip.export.recipe import Quantize, Recipe
from calmclip.export.rewrites import image_to_pixels
from calmclip.export.trace import fingerprint, to_onnx
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Graph, ImagePreprocess, Manifest, Ops, Quantization, Tensor, TextPreprocess
from calmclip.models.bundle.store import Sealed, describe, read, seal, stage
from calmclip.models.errors import BadRequest, BarMissed, BundleError, ExportError
from calmclip.models.flow import Arrays
from calmclip.models.ops.library import Library, find
from calmclip.models.ops.spec import DOMAIN, IMAGE_TO_PIXELS
from calmclip.models.runner import Runner

Say = Callable[[str], None]
_PARITY_ROWS = 4
_OUTLIER_ROWS = 16
_ROUNDING = {"max_abs": 1e-5, "min_cosine": 0.999999}  # between two ways to compute a graph in float32
# In INT8 an activation at a tie may fall a step, 1/255 of its range, to the other side, and others with it: of sixty
# convolutions the last answers two numbers in three a step or more off (`regions` of mini). How far that shows hangs on
# the steps, as what INT8 itself costs does: half of that in the worst row, and within these two.
_TIES, _FEWEST_TIES = 0.95, 0.999


def build(
    recipe: Recipe, out: Path, *, net: Net | None = None, release: bool = False, say: Say = lambda line: None
) -> list[Sealed]:
    """Export ``recipe`` into ``out``; -> the sealed bundles, INT8 first. It is NAME-int8 or, where too little of it is
    in INT8 (`report.precision`), NAME-mixed.

    ``net``: what `load` answered, where it was called already; with ``release`` its modules are emptied once they are
    traced. Raises as `load`; `ParityLost`; `BarMissed` (nothing is sealed, and NAME-int8.report.json is kept for
    reading); `BundleError` when a bundle of that name exists.
    """
    int8_name, mixed_name, float_name = (f"{recipe.name}-{kind}" for kind in ("int8", "mixed", "float"))
    may_be = [int8_name, mixed_name, *([float_name] if recipe.keep_float else [])]
    if taken := [name for name in may_be if (out / name).exists() and not recipe.replace]:
        raise BundleError(
            f"{out / taken[0]} exists, and a sealed bundle never changes; pass --replace or another --name"
        )
    if net is not None and net.adapters != (named := tuple(one.name for one in recipe.adapters)):
        raise BadRequest(
            f"the net has the adapters {[*net.adapters]}, the recipe {[*named]}; load it with the recipe's"
        )
    say(f"loading {recipe.checkpoint} with the net {recipe.net}")
    step, release = report.Steps(), release or net is None
    with step("load"):
        net = net or load(recipe.net, recipe.checkpoint, recipe.weights, recipe.adapters, say)
    with _scratch(net) as directory:
        shown = samples.pictures(), calibrate.fitting(net, directory, samples.texts())
        made = _convert(recipe, net, directory, shown, step, release, say)

    with ExitStack() as stack:
        staged = {name: stack.enter_context(stage(out, name)) for name in (int8_name, float_name)}
        versions = {int8_name: (made.quantized, _quantization(made)), float_name: (made.floats, FLOAT)}
        manifests = {}
        with step("write"):
            for name, (graphs, quantization) in versions.items():
                manifests[name] = _write(net, staged[name], {**graphs, **made.built}, name, quantization)
                graphs.clear()  # they are on disk now
        say("measuring INT8 beside float")
        with step("measure"):
            pair = _open(staged[int8_name]), _open(staged[float_name])
            figures = report.measure(*pair, *shown)
        figures |= {
            "measured_on": f"{len(shown[0])} pictures and {len(shown[1])} texts that ship with calmclip",
            "accuracy": report.accuracy(*pair, recipe.evals),
            "int8": report.int8(made.facts, figures["size_bytes"]),
            "graphs": made.facts,
            "rewrites": made.rewrites,
            "recipe": recipe.public(),
            "seconds": step.seconds,
            "peak_rss_mb": report.peak_rss_mb(),
        }
        figures["bars"] = report.check(figures, recipe.bars)
        name, kind = int8_name, report.precision(figures["int8"])
        if kind == "mixed":
            name = mixed_name
            say(report.why_mixed(figures["int8"], name))
        manifests[int8_name] = manifests[int8_name].model_copy(update={"name": name, "precision": kind})
        family = _family(manifests[float_name])
        manifests = {which: one.model_copy(update={"family": family}) for which, one in manifests.items()}
        text = report.text(figures)
        try:
            report.require(figures["bars"], name, made.facts)
        except BarMissed:
            (out / f"{name}.report.json").write_text(text, encoding="utf-8")
            raise
        wanted = (
            [float_name, int8_name] if recipe.keep_float else [int8_name]
        )  # sealed last, INT8 never lacks its float
        for which in wanted:  # all that takes room comes before the first is sealed
            (staged[which] / "report.json").write_text(text, encoding="utf-8")
        sealed = []
        for which in wanted:
            sealed.append(seal(staged[which], manifests[which], replace=recipe.replace))
            say(f"sealed {sealed[-1].directory}")
        return sealed[::-1]


def load(
    name: str, checkpoint: str, weights: Weights, adapters: Sequence[Adapt] = (), say: Say = lambda line: None
) -> Net:
    """The net ``name`` of a checkpoint, its ``adapters`` done, ready to be traced. Raises as the net and `adapt`."""
    plugin = NETS.get(name)
    if not adapters:
        return plugin.load(checkpoint, weights)
    for one in adapters:
        one.given()  # said before a large checkpoint is read
    net = (plugin.unfolded or plugin.load)(checkpoint, weights)
    return ready(adapt(net, adapters, Context(_shown, weights, say)))


def _shown(net: Net, tower: Tower) -> list[Arrays]:
    """The pictures or texts that ship, as the tower takes them."""
    with _scratch(net) as directory:
        texts = calibrate.fitting(net, directory, samples.texts())
        return [*calibrate.feeds(tower, directory, samples.pictures(), texts)]


@dataclass
class _Made:
    """By role: float and INT8 graphs, those built without torch, how all came about, and what was found on the way."""

    floats: dict[str, onnx.ModelProto] = field(default_factory=dict)
    quantized: dict[str, onnx.ModelProto] = field(default_factory=dict)
    built: dict[str, onnx.ModelProto] = field(default_factory=dict)
    how: dict[str, Quantize] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    rewrites: dict[str, dict[str, Any]] = field(default_factory=dict)


def _convert(
    recipe: Recipe,
    net: Net,
    directory: Path,
    shown: tuple[list[Path], list[str]],
    step: report.Steps,
    release: bool,
    say: Say,
) -> _Made:
    """Every tower traced, compared with torch, quantized, compared with its float graph, and rewritten."""
    made = _Made()
    pictures, texts = calibrate.inputs(recipe.calibration)
    fitting = calibrate.fitting(net, directory, texts)
    if recipe.calibration.texts and len(fitting) < len(texts):
        say(f"{len(texts) - len(fitting)} calibration texts are longer than the context and left out")
    few = shown[0][:_PARITY_ROWS], shown[1][:_PARITY_ROWS]
    inside = {
        role: replace(tower, preprocess=image_to_pixels.inside(tower.preprocess))
        for role, tower in net.towers.items()
        if recipe.picture_input and isinstance(tower.preprocess, ImagePreprocess)
    }
    traced: dict[str, onnx.ModelProto] = {}
    for role, tower in net.towers.items():
        say(f"{role}: tracing")
        seen = list(calibrate.feeds(tower, directory, *few))
        with step(f"{role}: torch"):
            answers = _answers(tower, seen, role)
        with step(f"{role}: trace"):
            traced[role] = to_onnx(tower)
        with step(f"{role}: parity"):
            found = parity.compare(answers, parity.onnx_run(traced[role]), seen, tower.summary)
        parity.require(found, max_abs=recipe.bars.max_float_error, what=f"{role}: torch against float ONNX")
        made.facts[role] = {"float_against_torch": found}
    if release:
        _empty(net)
        report.trim()
    for role, tower in net.towers.items():
        model = traced.pop(role)
        feeds = partial(calibrate.feeds, tower, directory)
        how = recipe.quantize.get(role) or Quantize(name=tower.quantizer, params=dict(tower.quantizer_params))
        shipped = _shipped(recipe, net, role, model, how, say)
        part = max(report.SHARE, recipe.bars.min_int8_share or 0.0)
        goal = Goal(recipe.bars.cosine(role), share=part, dims=nominal(tower), summary=tower.summary)
        with step(f"{role}: quantize"):
            quantized, recorded_from, settled = _quantize(
                role, model, how, goal, partial(feeds, pictures, fitting), shipped, say
            )
        with step(f"{role}: compare"):
            agreement = _against(model, quantized, list(feeds(*shown)), tower)
        made.how[role] = how
        with step(f"{role}: layers"):
            drawn = feeds(pictures[:_OUTLIER_ROWS], fitting[:_OUTLIER_ROWS])
            described = report.graph(model, quantized, list(feeds(*few)), drawn, goal.dims, how, settled)
        made.facts[role] |= {
            "quantizer": how.name,
            "ranges_from": recorded_from or calibrate.describe(recipe.calibration, pictures, fitting),
            "int8_against_float": agreement,
            **described,
        }
        say(f"{role}: rewriting")
        seen = list(feeds(*few))
        with step(f"{role}: rewrite"):
            made.floats[role], as_float = _rewrite(recipe, model, seen, tower, f"{role} in float")
            bound = _ROUNDING if how.name == "none" else _ties(agreement)
            made.quantized[role], as_int8 = _rewrite(recipe, quantized, seen, tower, f"{role} in INT8", bound)
        made.rewrites[role] = {"float32": as_float, "int8": as_int8}
        if role in inside:
            fed = calibrate.feeds(inside[role], directory, *few)
            pairs = [one | other for one, other in zip(seen, fed, strict=True)]
            for graphs, found, limit in ((made.floats, as_float, _ROUNDING), (made.quantized, as_int8, bound)):
                graphs[role] = _take_pictures(graphs[role], tower, tower.preprocess, pairs, role, found, limit)
    for role, one in net.built.items():
        made.built[role], found = _rewrite(recipe, one.model, one.examples, one, role)
        made.rewrites[role] = {"float32": found}
    return made


def _ties(agreement: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The bound of two ways to compute a graph in INT8, of how that agrees with float."""
    least = min((one["cosine_min"] for one in agreement.values()), default=1.0)
    return {"min_cosine": max(_TIES, min(_FEWEST_TIES, 1 - (1 - least) / 2))}


def _answers(tower: Tower, feeds: Sequence[Arrays], role: str) -> parity.Run:
    """What torch makes of ``feeds``; before anything is traced, for a tower that cannot run fills pages there.

    Raises `ExportError` with the shapes that it cannot run on.
    """
    try:
        return parity.kept(parity.torch_run(tower), feeds)
    except (AssertionError, IndexError, RuntimeError) as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds[0].items())
        raise ExportError(
            f"{role}: the tower does not run on {shapes}, which its configs ask for: {one_line(error)}"
        ) from None


def _against(
    model: onnx.ModelProto, quantized: onnx.ModelProto, feeds: Sequence[Arrays], tower: Tower
) -> dict[str, dict[str, float]]:
    """`parity.compare`, with one graph open at a time."""
    whole = parity.kept(parity.onnx_run(model), feeds)
    return parity.compare(whole, parity.onnx_run(quantized), feeds, tower.summary)


def _empty(net: Net) -> None:
    """Let go of the modules' weights in place: torch's exporter keeps the parameters themselves in its caches."""
    for tower in net.towers.values():
        for parameter in (*tower.module.parameters(), *tower.module.buffers()):
            parameter.data = parameter.new_empty(0)


def _rewrite(
    recipe: Recipe,
    model: onnx.ModelProto,
    feeds: Sequence[Arrays],
    part: Tower | Built,
    what: str,
    bound: Mapping[str, float] = _ROUNDING,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """-> the graph with our ops, and what the report says of it.

    Raises `ParityLost` when it answers otherwise than before, by the ops' local functions or by the op library;
    `ExportError` when it holds fewer of an op than the net promised. What is attached changes the outputs, so it
    comes last and is not compared.
    """
    swapped = rewrites.apply(model, recipe.rewrites)
    differences = {}
    if feeds and any(swapped.counts.values()):
        # between 8 bits the runtime's own Softmax is one in integers, which is not what the graph says
        exact = [node.output[0] for node in model.graph.node if node.op_type == "Softmax"]
        before = parity.kept(parity.onnx_run(model, apart=exact), feeds)
        summary = getattr(part, "summary", None)
        for name, library in (("functions", None), ("library", find())):
            if name == "functions" or library:
                differences[name] = parity.compare(
                    before, parity.onnx_run(swapped.model, library=library), feeds, summary
                )
                parity.require(differences[name], **bound, what=f"{what}: standard ops against our {name}")
    attached = rewrites.apply(swapped.model, getattr(part, "attach", ()))
    done = rewrites.Applied(
        attached.model, {**swapped.counts, **attached.counts}, {**swapped.missed, **attached.missed}
    )
    rewrites.require(done, part.promises, what)
    return done.model, {"counts": done.counts, "missed": done.missed, "against_standard": differences}


def _take_pictures(
    model: onnx.ModelProto,
    tower: Tower,
    spec: ImagePreprocess,
    pairs: Sequence[Arrays],
    role: str,
    facts: dict[str, Any],
    bound: Mapping[str, float],
) -> onnx.ModelProto:
    """-> the graph with ImageToPixels in front. ``pairs``: feeds of both graphs in one; ``facts``: its part of the
    report, in which this is entered. Raises `ParityLost` when it answers otherwise than for prepared pixels.
    """
    name = "image_to_pixels"
    done = rewrites.apply(model, [name], {name: {"preprocess": spec}})
    rewrites.require(done, {IMAGE_TO_PIXELS.name: 1}, role)
    facts["counts"] |= done.counts
    for how, library in (("functions", None), ("library", find())):
        if how == "functions" or library:
            before, after = (_fed(one, library) for one in (model, done.model))
            found = parity.compare(before, after, pairs, tower.summary)
            facts.setdefault("picture_input", {})[how] = found
            parity.require(found, **bound, what=f"{role}: prepared pixels against pictures, by our {how}")
    return done.model


def _fed(model: onnx.ModelProto, library: Library | None) -> parity.Run:
    """The graph, fed with what it takes out of what there is."""
    run, names = parity.onnx_run(model, library=library), [value.name for value in model.graph.input]
    return lambda feeds: run({name: feeds[name] for name in names})


def _shipped(
    recipe: Recipe, net: Net, role: str, model: onnx.ModelProto, how: Quantize, say: Say
) -> calibrate.Recorded | None:
    """The ranges that ship with the net, unless the recipe brings its own pictures or texts, or they do not fit."""
    if role not in net.ranges or recipe.calibration.images or recipe.calibration.texts:
        return None
    found = calibrate.recorded(net.ranges[role], role, fingerprint(model), how, net.source.weights)
    if found is None:
        say(
            f"{role}: the ranges that ship are of another graph or other weights; --images and --texts give better ones"
        )
    return found


def _quantize(
    role: str,
    model: onnx.ModelProto,
    how: Quantize,
    goal: Goal,
    feeds: Callable[[], Iterator[Arrays]],
    shipped: calibrate.Recorded | None,
    say: Say,
) -> tuple[onnx.ModelProto, str, Settled]:
    """-> the INT8 graph, in words where its activation ranges came from ("" for this export's own inputs), and the
    settings it was made with."""
    quantizer = QUANTIZERS.get(how.name)
    params = quantizer.params.model_validate(how.params)
    if unknown := {*getattr(params, "keep", ())} - {node.name for node in model.graph.node}:
        raise BadRequest(
            f"recipe: quantize.{role}: keep: {min(unknown)!r} is no node of the graph; a report's sqnr_db and in_float "
            "name them"
        )
    settled, source = Settled(how.name, params, {}), "none needed"
    say(f"{role}: quantizing ({how.name})")
    if shipped:
        chosen = QUANTIZERS.get(shipped.settled.name)
        settings = chosen.params.model_validate(shipped.settled.params)
        settled, source = Settled(shipped.settled.name, settings, shipped.ranges), shipped.source
    elif quantizer.search:
        say(f"{role}: searching settings that reach a cosine of {goal.cosine} on calibration pictures or texts")
        settled, source = quantizer.search(model, feeds(), params, goal), ""
    elif quantizer.observe:
        say(f"{role}: observing activations on calibration pictures or texts")
        settled, source = Settled(how.name, params, quantizer.observe(model, feeds(), params)), ""
    made = QUANTIZERS.get(settled.quantizer).quantize(model, settled.ranges, settled.params)
    return made, source, settled


def nominal(tower: Tower) -> dict[str, int]:
    """The sizes at which multiply-accumulates are counted: one picture, or one text of CLIP's 77 tokens at most."""
    context = tower.preprocess.context if isinstance(tower.preprocess, TextPreprocess) else 1
    names = {dim for spec in tower.inputs.values() for dim in spec.shape if isinstance(dim, str)}
    return {name: 1 if name == "B" else min(context, 77) for name in sorted(names)}


def _write(
    net: Net, directory: Path, graphs: Mapping[str, onnx.ModelProto], name: str, quantization: Quantization
) -> Manifest:
    """Everything but the report, and a manifest that lists it, so that the directory opens like a sealed one."""
    weights.save(graphs, directory)
    for file, data in net.files.items():
        (directory / file).write_bytes(data)
    parts = {**net.towers, **net.built}
    manifest = Manifest(
        name=name,
        precision="float32" if quantization == FLOAT else "mixed",  # until it is measured
        tasks=net.tasks,
        source=net.source,
        graphs={
            role: Graph(
                file=f"{role}.onnx",
                inputs=_specs(graphs[role].graph.input, getattr(part, "inputs", {})),
                outputs=_specs(graphs[role].graph.output, getattr(part, "outputs", {})),
                **_feeding(part, graphs[role]),
            )
            for role, part in parts.items()
        },
        ops=Ops(used=tuple(sorted({f.name for m in graphs.values() for f in m.functions if f.domain == DOMAIN}))),
        classifier=net.classifier,
        suppression=net.suppression,
        quantization=quantization,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return describe(directory, manifest)


def _family(floats: Manifest) -> str:
    """sha256 of what embeds: the float graphs, their weights, tokenizer and preprocessing, of a manifest that lists
    them. INT8 and float bundles of one export have the same, and so has each later export of the same graphs."""
    apart = floats.classifier.paths() if floats.classifier else set()
    said = {
        "files": {path: file.sha256 for path, file in sorted(floats.files.items()) if path not in apart},
        "preprocess": {role: one.model_dump(mode="json")["preprocess"] for role, one in sorted(floats.graphs.items())},
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _specs(values: Iterable[onnx.ValueInfoProto], promised: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs or outputs as the net promised them; those that a rewrite attached, as the graph declares them."""
    return {value.name: promised.get(value.name) or _spec(value) for value in values}


def _feeding(part: Tower | Built, model: onnx.ModelProto) -> dict[str, Any]:
    """The manifest's words on how the graph is fed: as the net says, unless it prepares pictures itself."""
    spec = getattr(part, "preprocess", None)
    if isinstance(spec, ImagePreprocess) and spec.input not in {value.name for value in model.graph.input}:
        return {"batch": False, "preprocess": image_to_pixels.inside(spec)}
    return {"batch": getattr(part, "batch", True), "preprocess": spec}


def _spec(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return Tensor(dtype=dtype, shape=tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim))  # type: ignore[arg-type]


FLOAT = Quantization(name="none")


def _quantization(made: _Made) -> Quantization:
    quantizers = {one.name: QUANTIZERS.get(one.name) for one in made.how.values()}
    return Quantization(
        name=", ".join(sorted(quantizers)),
        weights=", ".join(sorted({q.weights for q in quantizers.values()})),
        activations=", ".join(sorted({q.activations for q in quantizers.values()})),
        graphs={role: one.name for role, one in made.how.items()},
        calibration={role: facts["ranges_from"] for role, facts in made.facts.items()},
    )


def _open(staged: Path) -> Runner:
    return Runner(Bundle(read(staged)))


@contextmanager
def _scratch(net: Net) -> Iterator[Path]:
    """A directory with the net's own files, so that preparers find their tokenizer before there is a bundle."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for file, data in net.files.items():
            (directory / file).write_bytes(data)
        yield directory
