"""The verbs of the export stage: export and recipe. What needs torch is imported after the flags are read."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmclip.export import flags
from calmclip.models.cli import BUNDLES, BUNDLES_VARIABLE, bundles_folder, emit, parser
from calmclip.models.registry import catalog

if TYPE_CHECKING:
    from calmclip.export.nets import Net
    from calmclip.export.recipe import Recipe

WEIGHTS = ("activation", "experts", "text_model", "pool", "attention")  # flags that are fields of `Weights`


def export_command(argv: list[str]) -> int:
    """`calmclip export CHECKPOINT|mini`: seal NAME-int8 (or -mixed, or -float) and, with --keep-float, NAME-float."""
    options = _export_parser("export", "Turn a checkpoint into an INT8 bundle.").parse_args(argv)
    from calmclip.export.checkpoints import hub
    from calmclip.export.pipeline import build
    from calmclip.models.bundle.embedding import embedding_digest
    from calmclip.models.bundle.manifest import REPORT
    from calmclip.models.measure import resident
    from calmclip.models.ops import library

    options.checkpoint = str(hub.locate(options.checkpoint))
    say = lambda line: None if options.json else print(line, flush=True)  # noqa: E731
    recipe, net = _recipe(options, say)
    timings: dict[str, Any] = {}
    sealed = build(recipe, options.out, net=net, release=True, say=say, timings=timings.update)
    report = json.loads((sealed[0].directory / REPORT).read_text(encoding="utf-8"))
    rows = [
        {
            "bundle": bundle.manifest.name,
            "directory": str(bundle.directory),
            "digest": bundle.digest,
            "embedding_digest": embedding_digest(bundle.manifest),
            "megabytes": round(sum(file.bytes for file in bundle.manifest.files.values()) / 1e6, 1),
        }
        for bundle in sealed
    ]
    # Beside the report, like latencies: two exports of one checkpoint measure other bytes.
    memory = {"resident_mb": resident(sealed[0].directory)}
    if library.find():
        memory["resident_mb_without_ops"] = resident(sealed[0].directory, "off")
    timings |= memory
    keys = ("bars", "int8", "inputs", "mixed_because", "accuracy", "adapters")
    emit(options.json, {"sealed": rows, **{key: report[key] for key in keys if key in report}, **timings}, _summary)
    return 0


def recipe_command(argv: list[str]) -> int:
    """`calmclip recipe CHECKPOINT`: the recipe that export would use, as TOML."""
    options = _export_parser("recipe", "Print the recipe that export would use.").parse_args(argv)
    import tomli_w

    from calmclip.export.checkpoints import hub

    options.checkpoint = str(hub.locate(options.checkpoint))
    recipe, net = _recipe(options)
    data = recipe.model_dump(mode="json", exclude_none=True, exclude={"checkpoint", "net", "preset", "replace"})
    data["quantize"] = {
        role: {"name": tower.quantizer, "params": dict(tower.quantizer_params)} for role, tower in net.towers.items()
    } | data["quantize"]
    emit(options.json, data, lambda value: print(tomli_w.dumps(value), end=""))
    return 0


def _export_parser(verb: str, description: str) -> argparse.ArgumentParser:
    options = parser(verb, description)
    options.add_argument("checkpoint", help="a checkpoint: directory, file, hf:owner/name[@revision]; or 'mini'")
    options.add_argument("--recipe", type=Path, help="TOML file; 'calmclip recipe' prints one")
    options.add_argument(
        "--out", type=Path, default=bundles_folder(),
        help=f"where bundles go; default: {BUNDLES_VARIABLE}, else {BUNDLES}",
    )  # fmt: skip
    options.add_argument("--name", help="bundles are called NAME-int8 (or -mixed) and NAME-float")
    options.add_argument("--preset", help="quantizer of every graph that the recipe does not name: paper, fast, …")
    options.add_argument("--images", type=Path, help="pictures to calibrate, search and measure on (a folder)")
    options.add_argument("--texts", type=Path, help="texts for the same (one per line), or vectors (.npy, .npz)")
    options.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="NAME=DIR",
        type=_pair,
        help=f"measured in float and in INT8 for the report: {', '.join(catalog('evals'))}, and its data",
    )
    options.add_argument("--keep-float", action=argparse.BooleanOptionalAction, help="seal the float bundle too")
    options.add_argument(
        "--portable", action="store_true", default=None, help="standard ONNX operators alone, for other engines"
    )
    options.add_argument(
        "--dimensions", type=_numbers, metavar="N,N,…",
        help="prefixes of the vectors that the model was trained for (Matryoshka); requests may then ask for them",
    )  # fmt: skip
    options.add_argument("--activation", choices=("gelu", "gelu_tanh", "quick_gelu"), help="if the checkpoint has none")
    options.add_argument("--experts", choices=("dense", "routed"), help="how a mixture of experts is computed")
    options.add_argument(
        "--pool",
        choices=("last", "first", "mean", "weightedmean"),
        help="the tokens of a language model that make the vector, if no modules.json tells",
    )
    options.add_argument(
        "--attention", choices=("causal", "bidirectional"), help="what a token of a language model sees"
    )
    options.add_argument("--text-model", metavar="NAME", help="the model whose vectors an adaptor reads, to be named")
    flags.declare(options)
    options.add_argument("--replace", action="store_true", default=None, help="replace bundles of the same name")
    return options


def _pair(text: str) -> tuple[str, Path]:
    name, sign, data = text.partition("=")
    if not (name and sign and data):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR, such as zero_shot=./pictures")
    return name, Path(data)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, such as 64,128,256") from None


def _recipe(options: argparse.Namespace, say: Callable[[str], None] = lambda line: None) -> tuple["Recipe", "Net"]:
    from calmclip.export.pipeline import load
    from calmclip.export.recipe import load_adapters, load_recipe, load_weights, recognise

    net_name, _ = recognise(options.checkpoint)
    weights = load_weights(options.recipe, **{name: getattr(options, name) for name in WEIGHTS})
    adapters = flags.merged(load_adapters(options.recipe), options.adapters)
    net = load(net_name, options.checkpoint, weights, adapters, say)
    calibration = {k: v for k, v in (("images", options.images), ("texts", options.texts)) if v is not None}
    recipe = load_recipe(
        options.checkpoint, net_name, net, options.recipe,
        name=options.name, preset=options.preset, keep_float=options.keep_float, replace=options.replace,
        portable=options.portable, dimensions=options.dimensions,
        calibration=calibration or None, weights=weights.model_dump(), evals=dict(options.eval) or None,
        adapters=[adapter.model_dump() for adapter in adapters],
    )  # fmt: skip
    return recipe, net


def _summary(value: dict[str, Any]) -> None:
    from calmclip.models.commands import figures
    from calmclip.models.evals.tables import rounded

    for row in value["sealed"]:
        print(f"{row['bundle']:24s} {row['megabytes']:6.1f} MB  {row['directory']}")
    int8 = value["int8"]
    print(f"  {int8['coverage']:.1%} of the multiply-accumulates in INT8, {int8['size_ratio']:.3f} of the float size")
    for name, bar in value["bars"].items():
        print(f"  {name:20s} {bar['measured']:<10} bar {bar['bar']}  {'passed' if bar['passed'] else 'MISSED'}")
    for name, sides in value["accuracy"].items():
        for key in sides["int8"]:
            pair = [rounded(sides[side][key], "%") for side in ("int8", "float32")]
            print(f"  {name} {key:16s} int8 {pair[0]}, float {pair[1]}")
    for role, pair in value["latency_ms"].items():
        gain = pair["float32"]["p50"] / pair["int8"]["p50"]
        note = "" if gain >= 1 else "   INT8 IS SLOWER THAN FLOAT HERE"
        print(
            f"  {role:10s} int8 {pair['int8']['p50']:.2f} ms, float {pair['float32']['p50']:.2f} ms: {gain:.2f}x{note}"
        )
    if value["resident_mb"]:
        without = value.get("resident_mb_without_ops")
        print(
            f"  its open graphs take {value['resident_mb']:.0f} MB of memory"
            + (f", {without:.0f} without the op library" if without else "")
        )
    for name, facts in value["adapters"].items():
        print(f"  {name}: {figures(facts | value['adapter_times'].get(name, {}))}")
    longest, peak = max(value["seconds"], key=value["seconds"].get), value["peak_rss_mb"]
    print(
        f"  {sum(value['seconds'].values()):.0f} s, of which {longest} {value['seconds'][longest]:.0f} s"
        + (f"; at most {peak:.0f} MB in memory" if peak else "")
    )
