"""`build(recipe)`: checkpoint -> sealed bundles. The only place that knows the order of the steps.

load -> trace -> parity (torch against float ONNX) -> observe or read ranges -> quantize
     -> write float and INT8 side by side -> measure one against the other -> bars -> seal
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx

from export import calibrate, parity, report, samples, weights
from export.nets import NETS, Net
from export.quantizers import QUANTIZERS
from export.recipe import Quantize, Recipe
from export.trace import fingerprint, to_onnx
from models.bundle.bundle import Bundle
from models.bundle.manifest import Graph, Manifest, Ops, Quantization
from models.bundle.store import Sealed, describe, read, seal, stage
from models.errors import BundleError
from models.flow import Arrays
from models.ops.spec import DOMAIN
from models.runner import Runner

Say = Callable[[str], None]
_PARITY_ROWS = 4


def build(recipe: Recipe, out: Path, *, net: Net | None = None, say: Say = lambda line: None) -> list[Sealed]:
    """Export ``recipe`` into ``out``; -> the sealed bundles, INT8 first.

    Raises `ParityLost`, `BarMissed` (nothing is sealed; the report's figures are in the message), `BundleError`
    when a bundle of that name exists.
    """
    names = [f"{recipe.name}-int8"] + ([f"{recipe.name}-float"] if recipe.keep_float else [])
    if taken := [name for name in names if (out / name).exists() and not recipe.replace]:
        raise BundleError(
            f"{out / taken[0]} exists, and a sealed bundle never changes; pass --replace or another --name"
        )
    say(f"loading {recipe.checkpoint} with the net {recipe.net}")
    net = net or NETS.get(recipe.net).load(recipe.checkpoint)
    pictures, texts = calibrate.inputs(recipe.calibration)
    shown_pictures, shown_texts = samples.pictures(), samples.texts()

    floats: dict[str, onnx.ModelProto] = {}
    quantized: dict[str, onnx.ModelProto] = {}
    facts: dict[str, dict[str, Any]] = {}
    how: dict[str, Quantize] = {}
    with _scratch(net) as directory:
        texts, shown_texts = (calibrate.fitting(net, directory, some) for some in (texts, shown_texts))
        for role, tower in net.towers.items():
            say(f"{role}: tracing")
            floats[role] = to_onnx(tower)
            few = calibrate.feeds(tower, directory, shown_pictures[:_PARITY_ROWS], shown_texts[:_PARITY_ROWS])
            found = parity.compare(parity.torch_run(tower), parity.onnx_run(floats[role]), few, tower.summary)
            parity.require(found, max_abs=recipe.bars.max_float_error, what=f"{role}: torch against float ONNX")
            how[role] = recipe.quantize.get(role) or Quantize(name=tower.quantizer, params=dict(tower.quantizer_params))
            facts[role] = {"quantizer": how[role].name, "float_against_torch": found}
            feeds = partial(calibrate.feeds, tower, directory, pictures, texts)
            shipped = None if recipe.calibration.images else net.ranges.get(role)
            quantized[role], recorded_from = _quantize(role, floats[role], how[role], feeds, shipped, say)
            facts[role]["ranges_from"] = recorded_from or calibrate.describe(recipe.calibration, pictures, texts)
            few = calibrate.feeds(tower, directory, shown_pictures, shown_texts)
            facts[role]["int8_against_float"] = parity.compare(
                parity.onnx_run(floats[role]), parity.onnx_run(quantized[role]), few, tower.summary
            )

    with ExitStack() as stack:
        float_name = f"{recipe.name}-float"
        staged = {name: stack.enter_context(stage(out, name)) for name in (f"{recipe.name}-int8", float_name)}
        built = {role: one.model for role, one in net.built.items()}
        versions = ((names[0], quantized, _quantization(how, facts)), (float_name, floats, FLOAT))
        manifests = {
            name: _write(net, staged[name], {**graphs, **built}, name, quantization)
            for name, graphs, quantization in versions
        }
        say("measuring INT8 beside float")
        runners = [_open(staged[name]) for name in (names[0], float_name)]
        figures = {"graphs": facts, **report.measure(*runners, shown_pictures, shown_texts)}
        figures["measured_on"] = f"{len(shown_pictures)} pictures and {len(shown_texts)} texts that ship with calmclip"
        figures["bars"] = report.check(figures, recipe.bars)
        figures["recipe"] = recipe.public()
        report.require(figures["bars"], names[0])
        sealed = []
        for name in names:
            (staged[name] / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            sealed.append(seal(staged[name], manifests[name], replace=recipe.replace))
            say(f"sealed {sealed[-1].directory}")
        return sealed


def _quantize(
    role: str,
    model: onnx.ModelProto,
    how: Quantize,
    feeds: Callable[[], Iterator[Arrays]],
    shipped: Path | None,
    say: Say,
) -> tuple[onnx.ModelProto, str]:
    """-> the INT8 graph, and in words where its activation ranges came from; "" for this export's own inputs."""
    quantizer = QUANTIZERS.get(how.name)
    params = quantizer.params.model_validate(how.params)
    say(f"{role}: quantizing ({how.name})")
    if quantizer.observe is None:
        return quantizer.quantize(model, {}, params), "none needed"
    if shipped and (recorded := calibrate.recorded(shipped, role, fingerprint(model), how)):
        return quantizer.quantize(model, recorded.ranges, params), recorded.source
    say(f"{role}: observing activations on calibration pictures or texts")
    ranges = quantizer.observe(model, feeds(), params)
    return quantizer.quantize(model, ranges, params), ""


def _write(
    net: Net, directory: Path, graphs: Mapping[str, onnx.ModelProto], name: str, quantization: Quantization
) -> Manifest:
    """Everything but the report, and a manifest that lists it, so that the directory opens like a sealed one."""
    copies = {role: onnx.ModelProto.FromString(model.SerializeToString()) for role, model in graphs.items()}
    weights.save(copies, directory)
    for file, data in net.files.items():
        (directory / file).write_bytes(data)
    parts = {**net.towers, **net.built}
    manifest = Manifest(
        name=name,
        precision=_precision(quantization),
        tasks=net.tasks,
        source=net.source,
        graphs={
            role: Graph(
                file=f"{role}.onnx",
                batch=getattr(part, "batch", True),
                inputs=dict(part.inputs),
                outputs=dict(part.outputs),
                preprocess=getattr(part, "preprocess", None),
            )
            for role, part in parts.items()
        },
        ops=Ops(used=tuple(sorted({f.name for m in graphs.values() for f in m.functions if f.domain == DOMAIN}))),
        prompts=net.prompts,
        head=net.head,
        labels=net.labels,
        quantization=quantization,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return describe(directory, manifest)


FLOAT = Quantization(name="none")


def _quantization(how: Mapping[str, Quantize], facts: Mapping[str, Mapping[str, Any]]) -> Quantization:
    quantizers = {one.name: QUANTIZERS.get(one.name) for one in how.values()}
    return Quantization(
        name=", ".join(sorted(quantizers)),
        weights=", ".join(sorted({q.weights for q in quantizers.values()})),
        activations=", ".join(sorted({q.activations for q in quantizers.values()})),
        graphs={role: one.name for role, one in how.items()},
        calibration={role: facts[role]["ranges_from"] for role in how},
    )


def _precision(quantization: Quantization) -> Literal["int8", "float32", "mixed"]:
    """A bundle with a tower left in float is not called int8."""
    if quantization == FLOAT:
        return "float32"
    return "mixed" if "none" in quantization.graphs.values() else "int8"


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
