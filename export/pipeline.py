"""`build(recipe)`: checkpoint -> sealed bundles. The only place that knows the order of the steps.

load -> adapters -> fold
     -> for each tower: trace -> parity (torch against float ONNX), unless the net ships the float graph
     -> for each tower: observe or read ranges -> quantize -> rewrite with our ops -> parity (before against after)
     -> write float and INT8 -> measure one against the other -> bars -> seal

Quantization comes before rewriting: calibration opens sessions on graphs of standard ops, and the quantized graph is
the oracle for the rewritten graph. All towers are traced before the first is quantized, so that torch's weights can be
freed. The graphs stay in memory with each weight once, and at most one session is open beside them.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import onnx

from calmclip.export import borrow, calibrate, parity, report, rewrites, samples, weights
from calmclip.export.adapters import Adapt, Context, adapt
from calmclip.export.checkpoints import Weights
from calmclip.export.checkpoints.locate import one_line
from calmclip.export.graph import cut, fingerprint
from calmclip.export.nets import NETS, Built, Net, Tower, ready
from calmclip.export.portable import is_portable, portable
from calmclip.export.quantizers import QUANTIZERS, Goal, Settled
from calmclip.export.recipe import Quantize, Recipe
from calmclip.export.rewrites import image_to_pixels
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import (
    REPORT,
    Graph,
    ImagePreprocess,
    Manifest,
    Ops,
    Quantization,
    Tensor,
    TextPreprocess,
)
from calmclip.models.bundle.store import Sealed, describe, read, seal, stage
from calmclip.models.errors import BadRequest, BarMissed, BundleError, ExportError
from calmclip.models.flow import Arrays
from calmclip.models.ops.library import Library, find
from calmclip.models.ops.spec import DOMAIN, IMAGE_TO_PIXELS
from calmclip.models.runner import Runner

Say = Callable[[str], None]
Facts = dict[str, Any]  # a part of the report
Feeds = Callable[[str], Iterator[Arrays]]  # one of `calibrate.PARTS` -> feeds of a tower
Bound = Mapping[str, float]  # keyword arguments of `parity.require`
_PARITY_ROWS = 4
_OUTLIER_ROWS = 16
_ROUNDING = {"max_abs": 1e-5, "min_cosine": 0.999999}  # between two ways to compute a graph in float32
# In INT8 an activation at a tie may round to the other side, a step of 1/255 of its range, and later ones follow. After
# sixty convolutions two of three numbers are a step or more off (`regions` of mini). The effect scales with the steps,
# as the loss of INT8 itself does. So the bound is half of that loss in the worst row, and lies between these two.
_TIES, _FEWEST_TIES = 0.95, 0.999


def build(
    recipe: Recipe,
    out: Path,
    *,
    net: Net | None = None,
    release: bool = False,
    say: Say = lambda line: None,
    timings: Callable[[Facts], None] = lambda facts: None,
) -> list[Sealed]:
    """Export ``recipe`` into ``out``; -> the sealed bundles, INT8 first. It is named NAME-int8, or NAME-mixed if it
    lacks coverage, size or accuracy for that (`report.shortfalls`). With nothing in INT8 the only bundle is NAME-float.
    Another export of the same checkpoint differs in `created` of bundle.json alone. ``timings`` receives what belongs
    to this run: latencies and machine (`report.timings`), ``adapter_times``, ``seconds`` of each step, ``peak_rss_mb``.

    ``net``: the result of `load`, if it was called already; with ``release`` its modules are emptied after tracing.
    Raises as `load`; `ParityLost`; `BarMissed` (nothing is sealed, and NAME-int8.report.json is kept for reading);
    `BundleError` if a bundle of that name exists.
    """
    int8_name, mixed_name, float_name = (f"{recipe.name}-{kind}" for kind in ("int8", "mixed", "float"))
    floats_alone = {how.name for how in recipe.quantize.values()} == {"none"}
    possible = [int8_name, mixed_name, *([float_name] if recipe.keep_float or floats_alone else [])]
    if taken := [name for name in possible if (out / name).exists() and not recipe.replace]:
        raise BundleError(
            f"{out / taken[0]} exists, and a sealed bundle never changes; pass --replace or another --name"
        )
    if net is not None and net.adapters != (names := tuple(adapter.name for adapter in recipe.adapters)):
        raise BadRequest(
            f"the net has the adapters {[*net.adapters]}, the recipe {[*names]}; load it with the recipe's adapters"
        )
    say(f"loading {recipe.checkpoint} with the net {recipe.net}")
    step, release = report.Steps(), release or net is None
    with step("load"):
        net = net or load(recipe.net, recipe.checkpoint, recipe.weights, recipe.adapters, say)
    with _scratch(net) as directory:
        inputs = calibrate.inputs(recipe.calibration, net, directory, say)
        converted = _convert(recipe, net, directory, inputs, step, release, say)

    with ExitStack() as stack:
        staged = {name: stack.enter_context(stage(out, name)) for name in (int8_name, float_name)}
        versions = {int8_name: (converted.quantized, _quantization(converted)), float_name: (converted.floats, FLOAT)}
        manifests = {}
        with step("write"):
            for name, (graphs, quantization) in versions.items():
                manifests[name] = _write(
                    net, staged[name], {**graphs, **converted.built}, name, quantization, recipe.dimensions
                )
                graphs.clear()  # they are on disk now
        say("measuring INT8 beside float")
        with step("measure"):
            int8, floats = (Runner(Bundle(read(staged[name]))) for name in (int8_name, float_name))
            figures = report.measure(int8, floats, *inputs.part("certificate"))
            timed = report.timings(int8, floats, samples.pictures()[0])
        figures |= {
            "inputs": inputs.facts(),
            "accuracy": report.accuracy(int8, floats, recipe.evals),
            "int8": report.int8(converted.facts, figures["size_bytes"]),
            "graphs": converted.facts,
            "rewrites": converted.rewrites,
            "adapters": net.facts,
            "recipe": recipe.public(),
        }
        timings({**timed, "adapter_times": net.times, "seconds": step.seconds, "peak_rss_mb": report.peak_rss_mb()})
        figures["bars"] = report.check(figures, recipe.bars)
        kind = report.precision(figures)
        name = {"int8": int8_name, "mixed": mixed_name, "float": float_name}[kind]
        if kind == "mixed":
            figures["mixed_because"] = report.shortfalls(figures)
            say(f"called {name}, not int8: {'; '.join(figures['mixed_because'])}")
        manifests[int8_name] = manifests[int8_name].model_copy(update={"name": name, "precision": kind})
        family = _family(manifests[float_name])
        text = report.text(figures)
        try:
            report.require(figures["bars"], name, converted.facts)
        except BarMissed:
            (out / f"{name}.report.json").write_text(text, encoding="utf-8")
            raise
        # INT8 is sealed last, so that it never lacks its float bundle
        wanted = [float_name] if recipe.keep_float or kind == "float" else []
        wanted += [] if kind == "float" else [int8_name]
        for name in wanted:  # all files that may fill the disk are written before the first bundle is sealed
            (staged[name] / REPORT).write_text(text, encoding="utf-8")
        sealed = []
        for name in wanted:
            manifest = manifests[name].model_copy(update={"family": family})
            sealed.append(seal(staged[name], manifest, replace=recipe.replace))
            say(f"sealed {sealed[-1].directory}")
        return sealed[::-1]


def load(
    name: str, checkpoint: str, weights: Weights, adapters: Sequence[Adapt] = (), say: Say = lambda line: None
) -> Net:
    """The net ``name`` of a checkpoint after its ``adapters``, ready to be traced. Raises as the net and `adapt`."""
    plugin = NETS.get(name)
    for adapter in adapters:
        adapter.checked_params()  # raises before a large checkpoint is read
    read = (adapters and plugin.unfolded) or plugin.load
    with parity.one_thread():
        net = read(checkpoint, weights)
    adapted = adapt(net, adapters, Context(_samples, weights, say)) if adapters else net
    with parity.one_thread():
        return plugin.complete(ready(adapted))


def _samples(net: Net, tower: Tower) -> list[Arrays]:
    """The pictures or texts that ship, as feeds of the tower."""
    with _scratch(net) as directory:
        texts = calibrate.fitting(net, directory, samples.texts())
        return [*calibrate.feeds(tower, directory, samples.pictures(), texts)]


@dataclass
class _Converted:
    """By role: float and INT8 graphs; graphs built without torch; quantizers; and the report's facts."""

    floats: dict[str, onnx.ModelProto] = field(default_factory=dict)
    quantized: dict[str, onnx.ModelProto] = field(default_factory=dict)
    built: dict[str, onnx.ModelProto] = field(default_factory=dict)
    how: dict[str, Quantize] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)
    rewrites: dict[str, Facts] = field(default_factory=dict)


def _convert(
    recipe: Recipe, net: Net, directory: Path, inputs: calibrate.Inputs, step: report.Steps, release: bool, say: Say
) -> _Converted:
    """Trace every tower and compare it with torch; quantize it and compare it with its float graph; rewrite both."""
    converted = _Converted()
    certificate = inputs.part("certificate")
    few = certificate[0][:_PARITY_ROWS], certificate[1][:_PARITY_ROWS]
    picture_towers = {  # before tracing: it raises if the op cannot prepare these pictures
        role: replace(tower, preprocess=image_to_pixels.inside(tower.preprocess))
        for role, tower in net.towers.items()
        if recipe.picture_input and isinstance(tower.preprocess, ImagePreprocess)
    }
    traced: dict[str, onnx.ModelProto] = {}
    fed: dict[str, Feeds] = {}
    last = [*net.towers][-1]
    for role, tower in net.towers.items():
        fed[role] = _feeds(net, tower, directory, inputs, traced)
        rows = [*islice(fed[role]("certificate"), _PARITY_ROWS)]
        shipped: tuple[onnx.ModelProto, Facts] | None = (tower.graph, {}) if tower.graph else None
        traced[role], converted.facts[role] = shipped or _trace(
            tower, rows, role, recipe.bars.max_float_error, step, say, traced.get(tower.cut_from),
            free=partial(_empty, net) if release and role == last else _nothing,
        )  # fmt: skip
    if release:
        _empty(net)
    lenders: dict[str, tuple[onnx.ModelProto, onnx.ModelProto, str, Settled]] = {}  # graphs that others have a part of
    for role, tower in net.towers.items():
        model, feeds = traced.pop(role), fed.pop(role)
        rows = [*islice(feeds("certificate"), _PARITY_ROWS)]
        how = converted.how[role] = _quantizer(recipe, net, role)
        if tower.borrows:
            quantized = borrow.stored(model, *lenders[tower.borrows][:2])
            _compare(recipe, converted, role, tower, (model, quantized), [*feeds("certificate")], step, say)
            continue
        recorded = _recorded(recipe, net, role, model, how, say)
        least = max(report.COVERAGE, recipe.bars.min_int8_coverage or 0.0)
        mean = max(report.COSINE, recipe.bars.cosine(role))
        goal = Goal(mean, report.WORST, coverage=least, dims=nominal(tower), summary=tower.summary)
        with step(f"{role}: quantize"):
            if tower.cut_from:
                _, quantized, ranges_from, settled = lenders[tower.cut_from]
                quantized = cut(quantized, tower.outputs)
            else:
                quantized, ranges_from, settled = _quantize(role, model, how, goal, feeds, recorded, say)
            if any(role in (other.cut_from, other.borrows) for other in net.towers.values()):
                lenders[role] = model, quantized, ranges_from, settled
        with step(f"{role}: compare"):
            agreement = _against(model, quantized, [*feeds("certificate")], tower)
        with step(f"{role}: layers"):
            outlier_feeds = islice(feeds("calibration"), _OUTLIER_ROWS)
            described = report.graph(model, quantized, rows, outlier_feeds, goal.dims, how, settled)
        converted.facts[role] |= {
            "quantizer": how.name,
            "ranges_from": ranges_from or inputs.describe(tower),
            "int8_against_float": agreement,
            "starved_experts": [*settled.starved],
            **described,
        }
        bound = _ROUNDING if how.name == "none" else _ties(agreement)
        # no graph is also another tower's, the net's, or the other one of this tower
        alone = role not in lenders and tower.graph is None and quantized is not model
        as_float, as_int8 = _swap(
            recipe, converted, role, tower, (model, quantized), rows, bound, step, say, spent=alone
        )
        if role in picture_towers:
            taken = calibrate.feeds(picture_towers[role], directory, *few)
            pairs = [{**prepared, **picture} for prepared, picture in zip(rows, taken, strict=True)]
            sides = (converted.floats, as_float, _ROUNDING), (converted.quantized, as_int8, bound)
            for graphs, facts, limit in sides:
                graphs[role] = _take_pictures(graphs[role], tower, pairs, role, facts, limit)
    for role, part in net.built.items():
        converted.built[role], facts = _rewrite(recipe, part.model, part.examples, part, role)
        converted.rewrites[role] = {"float32": facts}
    return converted


def _compare(
    recipe: Recipe, converted: _Converted, role: str, tower: Tower, graphs: tuple[onnx.ModelProto, onnx.ModelProto],
    feeds: Sequence[Arrays], step: report.Steps, say: Say,
) -> None:  # fmt: skip
    """Compare and rewrite the ``graphs`` of a tower that borrows its weights: in float, and with INT8 weights."""
    with step(f"{role}: compare"):
        agreement = _against(*graphs, feeds, tower)
    converted.facts[role] |= {
        "quantizer": converted.how[role].name,
        "weights_of": tower.borrows,
        "ranges_from": "none needed",
        "int8_against_float": agreement,
    }
    _swap(recipe, converted, role, tower, graphs, feeds[:_PARITY_ROWS], _ROUNDING, step, say)


def _swap(
    recipe: Recipe, converted: _Converted, role: str, tower: Tower, graphs: tuple[onnx.ModelProto, onnx.ModelProto],
    rows: Sequence[Arrays], bound: Bound, step: report.Steps, say: Say, *, spent: bool = False,
) -> tuple[Facts, Facts]:  # fmt: skip
    """Rewrite both ``graphs``, float and INT8, into ``converted``; -> their parts of the report. ``spent``: as in
    `_rewrite`."""
    say(f"{role}: rewriting")
    with step(f"{role}: rewrite"):
        converted.floats[role], as_float = _rewrite(recipe, graphs[0], rows, tower, f"{role} in float", spent=spent)
        converted.quantized[role], as_int8 = _rewrite(
            recipe, graphs[1], rows, tower, f"{role} in INT8", bound, spent=spent
        )
    converted.rewrites[role] = {"float32": as_float, "int8": as_int8}
    return as_float, as_int8


def _quantizer(recipe: Recipe, net: Net, role: str) -> Quantize:
    """Raises `BadRequest` if the recipe has another quantizer for a graph than for the one that has its weights."""
    tower = net.towers[role]
    default = Quantize(name=tower.quantizer, params=dict(tower.quantizer_params))
    if not (source := tower.cut_from or tower.borrows):
        return recipe.quantize.get(role) or default
    whole = _quantizer(recipe, net, source)
    if recipe.quantize.get(role, whole) != whole:
        raise BadRequest(
            f"recipe: quantize.{role} is {recipe.quantize[role].name}, but the graph has the weights of {source}, "
            f"whose quantizer is {whole.name}; leave quantize.{role} out"
        )
    return whole


def _trace(
    tower: Tower,
    rows: Sequence[Arrays],
    role: str,
    max_abs: float,
    step: report.Steps,
    say: Say,
    whole: onnx.ModelProto | None,
    free: Callable[[], None],
) -> tuple[onnx.ModelProto, Facts]:
    """-> the float graph of the tower's module, or its part of the graph ``whole``, and its agreement with torch.
    ``free`` frees the module, which is not needed once it is traced.

    Raises `ParityLost`; as `_answers`.
    """
    from calmclip.export.trace import to_onnx  # needs torch

    say(f"{role}: tracing")
    with step(f"{role}: torch"):
        answers = _answers(tower, rows, role)
    with step(f"{role}: trace"):
        model = cut(whole, tower.outputs) if whole else to_onnx(tower)
        model = borrow.untransposed(model) if tower.borrows else model
    free()
    with step(f"{role}: parity"):
        agreement = parity.compare(answers, parity.onnx_run(model), rows, tower.summary)
    parity.require(agreement, max_abs=max_abs, what=f"{role}: torch against float ONNX")
    return model, {"float_against_torch": agreement}


def _feeds(
    net: Net, tower: Tower, directory: Path, inputs: calibrate.Inputs, traced: Mapping[str, onnx.ModelProto]
) -> Feeds:
    """``traced``: the float graphs of the towers before this one. What a tower reads of them is computed now."""
    if not tower.reads:
        return lambda name: calibrate.feeds(tower, directory, *inputs.part(name))
    read = {source.partition(".")[0] for source in tower.reads.values()}
    sources = {role: (net.towers[role], parity.onnx_run(traced[role])) for role in read}
    parts = ("certificate",) if tower.borrows else calibrate.PARTS  # a borrower has no ranges
    answers = {name: calibrate.chained(tower, sources, directory, *inputs.part(name)) for name in parts}
    return lambda name: iter(answers[name])


def _ties(agreement: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The bound between two ways to compute an INT8 graph, from the graph's agreement with float."""
    least = min((numbers["cosine_min"] for numbers in agreement.values()), default=1.0)
    return {"min_cosine": max(_TIES, min(_FEWEST_TIES, 1 - (1 - least) / 2))}


def _answers(tower: Tower, feeds: Sequence[Arrays], role: str) -> parity.Run:
    """The outputs of the torch module for ``feeds``. This comes before tracing, whose error for a tower that cannot run
    fills pages.

    Raises `ExportError` with the shapes that it cannot run on.
    """
    try:
        with parity.one_thread():
            return parity.stored(parity.torch_run(tower), feeds)
    except (AssertionError, IndexError, RuntimeError) as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds[0].items())
        raise ExportError(
            f"{role}: the tower does not run on {shapes}, the shapes of its configs: {one_line(error)}"
        ) from None


def _against(
    model: onnx.ModelProto, quantized: onnx.ModelProto, feeds: Sequence[Arrays], tower: Tower
) -> dict[str, dict[str, float]]:
    """`parity.compare`, with one graph open at a time."""
    answers = parity.stored(parity.onnx_run(model), feeds)
    return parity.compare(answers, parity.onnx_run(quantized), feeds, tower.summary)


def _empty(net: Net) -> None:
    """Free the modules' weights in place, because torch's exporter keeps the parameters in its caches."""
    for tower in [tower for tower in net.towers.values() if tower.graph is None]:
        for parameter in (*tower.module.parameters(), *tower.module.buffers()):
            parameter.data = parameter.new_empty(0)
    report.trim()


def _nothing() -> None:
    """Frees nothing: towers after this one may share its weights."""


def _rewrite(
    recipe: Recipe,
    model: onnx.ModelProto,
    feeds: Sequence[Arrays],
    part: Tower | Built,
    what: str,
    bound: Bound = _ROUNDING,
    *,
    spent: bool = False,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """-> the graph with our ops, and its part of the report. ``spent``: ``model`` is not read afterwards, so its
    weights leave it: two copies of a large graph and a session are more than the machine may have.

    Raises `ParityLost` if its outputs differ from before, by the ops' local functions or by the op library;
    `ExportError` if it holds fewer of an op than the net promised. Ops that are attached change the outputs, so they
    come last and are not compared.
    """
    # between QDQ pairs the runtime replaces Softmax by an integer one, which differs from the graph
    exact = [node.output[0] for node in model.graph.node if node.op_type == "Softmax"]
    compared = feeds if recipe.rewrites else ()
    before = parity.stored(parity.onnx_run(model, apart=exact), compared) if compared else None
    swapped = rewrites.apply(model, recipe.rewrites)
    if spent and swapped.model is not model:
        del model.graph.initializer[:]
    differences = {}
    if before and any(swapped.counts.values()):
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
    facts = {"counts": done.counts, "missed": done.missed, "against_standard": differences}
    return (_portable(done.model, feeds, part, what) if recipe.portable else done.model), facts


def _portable(model: onnx.ModelProto, feeds: Sequence[Arrays], part: Tower | Built, what: str) -> onnx.ModelProto:
    """-> the graph in standard operators of the oldest opset that holds it. Raises `ExportError` as `portable`;
    `ParityLost` if a tower's outputs change. ``feeds`` of a built graph fit it before ops are attached."""
    plain = portable(model, what)
    if isinstance(part, Tower):
        before = parity.stored(parity.onnx_run(model), feeds)
        differences = parity.compare(before, parity.onnx_run(plain), feeds, part.summary)
        parity.require(differences, **_ROUNDING, what=f"{what}: its opset against the oldest that holds it")
    return plain


def _take_pictures(
    model: onnx.ModelProto, tower: Tower, pairs: Sequence[Arrays], role: str, facts: Facts, bound: Bound
) -> onnx.ModelProto:
    """-> the graph with ImageToPixels in front. ``pairs``: feeds of both graphs, merged; ``facts``: the graph's part of
    the report, which is extended. Raises `ParityLost` if the outputs differ from those for prepared pixels.
    """
    name = "image_to_pixels"
    done = rewrites.apply(model, [name], {name: {"preprocess": tower.preprocess}})
    rewrites.require(done, {IMAGE_TO_PIXELS.name: 1}, role)
    facts["counts"] |= done.counts
    for how, library in (("functions", None), ("library", find())):
        if how == "functions" or library:
            before, after = (_select_feeds(graph, library) for graph in (model, done.model))
            agreement = parity.compare(before, after, pairs, tower.summary)
            facts.setdefault("picture_input", {})[how] = agreement
            parity.require(agreement, **bound, what=f"{role}: prepared pixels against pictures, by our {how}")
    return done.model


def _select_feeds(model: onnx.ModelProto, library: Library | None) -> parity.Run:
    """A run of the graph that takes only its own inputs from the feeds."""
    run, names = parity.onnx_run(model, library=library), [value.name for value in model.graph.input]
    return lambda feeds: run({name: feeds[name] for name in names})


def _recorded(
    recipe: Recipe, net: Net, role: str, model: onnx.ModelProto, how: Quantize, say: Say
) -> calibrate.Recorded | None:
    """The ranges that ship with the net; None if they do not fit or if the recipe has its own pictures or texts."""
    if role not in net.ranges or recipe.calibration.images or recipe.calibration.texts:
        return None
    recorded = calibrate.recorded(net.ranges[role], role, fingerprint(model), how, net.source.weights)
    if recorded is None:
        say(
            f"{role}: the ranges that ship are of another graph or other weights; --images and --texts give better ones"
        )
    return recorded


def _quantize(
    role: str,
    model: onnx.ModelProto,
    how: Quantize,
    goal: Goal,
    feeds: Feeds,
    recorded: calibrate.Recorded | None,
    say: Say,
) -> tuple[onnx.ModelProto, str, Settled]:
    """-> the INT8 graph, the source of its activation ranges in words ("" for this export's own inputs), and its
    settings."""
    quantizer = QUANTIZERS.get(how.name)
    params = quantizer.params.model_validate(how.params)
    if unknown := {*getattr(params, "keep", ())} - {node.name for node in model.graph.node}:
        raise BadRequest(
            f"recipe: quantize.{role}: keep: {min(unknown)!r} is no node of the graph; a report's sqnr_db and in_float "
            "name them"
        )
    settled, source = Settled(how.name, params, {}), "none needed"
    say(f"{role}: quantizing ({how.name})")
    if recorded:
        settings = QUANTIZERS.get(recorded.settled.name).params.model_validate(recorded.settled.params)
        settled, source = Settled(recorded.settled.name, settings, recorded.ranges), recorded.source
    elif quantizer.search:
        say(f"{role}: searching for settings that reach a cosine of {goal.cosine} on calibration pictures or texts")
        settled, source = quantizer.search(model, feeds("calibration"), feeds("search"), params, goal), ""
    elif quantizer.observe:
        say(f"{role}: observing activations on calibration pictures or texts")
        observed = chain(feeds("calibration"), feeds("search"))  # nothing is searched, so nothing is held out
        ranges = quantizer.observe(model, observed, params)
        settled, source = Settled(how.name, params, ranges, starved=getattr(ranges, "starved", ())), ""
    if settled.starved:
        experts = ", ".join(settled.starved)
        say(f"{role}: no calibration input reaches {experts}, which takes the ranges of the other experts of its layer")
    return QUANTIZERS.get(settled.quantizer).quantize(model, settled.ranges, settled.params), source, settled


def nominal(tower: Tower) -> dict[str, int]:
    """The sizes at which multiply-accumulates are counted: one picture, or one text of at most CLIP's 77 tokens. A
    graph that takes any size is counted at 512 x 512 pixels."""
    sizes = {"B": 1, "height": 512, "width": 512}
    context = tower.preprocess.context if isinstance(tower.preprocess, TextPreprocess) else 1
    names = {dim for spec in tower.inputs.values() for dim in spec.shape if isinstance(dim, str)}
    return {name: sizes.get(name, min(context, 77)) for name in sorted(names)}


def _write(
    net: Net, directory: Path, graphs: Mapping[str, onnx.ModelProto], name: str, quantization: Quantization,
    dimensions: tuple[int, ...] = (),
) -> Manifest:  # fmt: skip
    """Write everything but the report; -> a manifest of the files, with which the directory opens like a bundle."""
    weights.save(graphs, directory)
    for file, data in net.files.items():
        (directory / file).write_bytes(data)
    parts: dict[str, Tower | Built] = {**net.towers, **net.built}
    manifest = Manifest(
        name=name,
        precision="float" if quantization == FLOAT else "mixed",  # until the bundle is measured
        tasks=net.tasks,
        source=net.source,
        languages=net.languages,
        graphs={
            role: Graph(
                file=f"{role}.onnx",
                inputs=_specs(graphs[role].graph.input, getattr(part, "inputs", {})),
                outputs=_specs(graphs[role].graph.output, getattr(part, "outputs", {})),
                **_feeding(part, graphs[role]),
            )
            for role, part in parts.items()
        },
        portable=all(map(is_portable, graphs.values())),
        ops=Ops(used=tuple(sorted({f.name for m in graphs.values() for f in m.functions if f.domain == DOMAIN}))),
        classifier=net.classifier,
        suppression=net.suppression,
        segmentation=net.segmentation,
        explain=net.explain,
        dimensions=dimensions,
        quantization=quantization,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return describe(directory, manifest)


def _family(floats: Manifest) -> str:
    """sha256 over the float bundle's graphs, weights, tokenizer and preprocessing: all that determines an embedding. It
    is the same for INT8 and float bundles of one export, and for later exports of the same graphs."""
    excluded = {REPORT, *(floats.classifier.paths() if floats.classifier else ())}
    facts = {
        "files": {path: file.sha256 for path, file in sorted(floats.files.items()) if path not in excluded},
        "preprocess": {
            role: spec.model_dump(mode="json")["preprocess"] for role, spec in sorted(floats.graphs.items())
        },
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _specs(values: Iterable[onnx.ValueInfoProto], promised: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs or outputs as the net promises them; those of a rewrite, as the graph declares them."""
    return {value.name: promised.get(value.name) or _spec(value) for value in values}


def _feeding(part: Tower | Built, model: onnx.ModelProto) -> dict[str, Any]:
    """The manifest's fields about feeds: those of the net, unless the graph prepares pictures itself."""
    spec = getattr(part, "preprocess", None)
    if isinstance(spec, ImagePreprocess) and spec.input not in {value.name for value in model.graph.input}:
        return {"batch": False, "preprocess": image_to_pixels.inside(spec)}
    return {"batch": getattr(part, "batch", True), "preprocess": spec}


def _spec(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return Tensor(dtype=dtype, shape=tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim))  # type: ignore[arg-type]


FLOAT = Quantization(name="none")


def _quantization(converted: _Converted) -> Quantization:
    quantizers = {how.name: QUANTIZERS.get(how.name) for how in converted.how.values()}
    return Quantization(
        name=", ".join(sorted(quantizers)),
        weights=", ".join(sorted({q.weights for q in quantizers.values()})),
        activations=", ".join(sorted({q.activations for q in quantizers.values()})),
        graphs={role: how.name for role, how in converted.how.items()},
        calibration={role: facts["ranges_from"] for role, facts in converted.facts.items()},
    )


@contextmanager
def _scratch(net: Net) -> Iterator[Path]:
    """A directory with the net's files, so that preparers find their tokenizer before the bundle exists."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for file, data in net.files.items():
            (directory / file).write_bytes(data)
        yield directory
