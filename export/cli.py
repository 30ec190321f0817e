"""The verbs of the export stage: export, recipe, eval. (`align` lives in export/align.py.)"""

import argparse
import json
from pathlib import Path

import tomli_w

from calmclip.export.checkpoints import Weights, hub
from calmclip.export.nets import Net, NetPlugin
from calmclip.export.recipe import Recipe, load_recipe, load_weights, recognise
from calmclip.models.cli import BUNDLES, bundle_options, emit, parser, positive


def export_command(argv: list[str]) -> int:
    """`calmclip export CHECKPOINT|mini`: seal NAME-int8 (or NAME-mixed) and, where kept, NAME-float."""
    from calmclip.export.pipeline import build

    options = _export_parser("export", "Turn a checkpoint into an INT8 bundle.").parse_args(argv)
    options.checkpoint = str(hub.locate(options.checkpoint))
    net_name, plugin = recognise(options.checkpoint)
    recipe, net = _recipe(options, net_name, plugin)
    say = lambda line: None if options.json else print(line, flush=True)  # noqa: E731
    sealed = build(recipe, options.out, net=net, release=True, say=say)
    report = json.loads((sealed[0].directory / "report.json").read_text(encoding="utf-8"))
    rows = [
        {
            "bundle": s.manifest.name,
            "directory": str(s.directory),
            "digest": s.digest,
            "megabytes": round(sum(f.bytes for f in s.manifest.files.values()) / 1e6, 1),
        }
        for s in sealed
    ]
    keys = ("bars", "latency_ms", "slower_than_float", "int8", "accuracy")
    emit(options.json, {"sealed": rows, **{key: report[key] for key in keys}}, _summary)
    return 0


def recipe_command(argv: list[str]) -> int:
    """`calmclip recipe CHECKPOINT`: the recipe that export would use, as TOML."""
    options = _export_parser("recipe", "Print the recipe that export would use.").parse_args(argv)
    options.checkpoint = str(hub.locate(options.checkpoint))
    net_name, plugin = recognise(options.checkpoint)
    recipe, net = _recipe(options, net_name, plugin)
    data = recipe.model_dump(mode="json", exclude_none=True, exclude={"checkpoint", "net", "preset", "replace"})
    data["quantize"] = {
        role: {"name": tower.quantizer, "params": dict(tower.quantizer_params)} for role, tower in net.towers.items()
    } | data["quantize"]
    emit(options.json, data, lambda value: print(tomli_w.dumps(value), end=""))
    return 0


def eval_command(argv: list[str]) -> int:
    """`calmclip eval BUNDLE EVAL --data DIR [--against BUNDLE]`: accuracy on a data set."""
    from calmclip.export.evals import EVALS
    from calmclip.models.bundle.store import find
    from calmclip.models.runner import open_bundle

    options = parser("eval", "Measure accuracy on a data set.")
    options.add_argument("bundle")
    options.add_argument("eval", help=f"one of {', '.join(EVALS.names())}")
    options.add_argument("--data", type=Path, required=True, help="directory of the data set")
    options.add_argument("--against", help="a second bundle; default: the float one sealed beside an INT8 one")
    options.add_argument("--limit", type=positive, help="at most so many pictures")
    bundle_options(options)
    given = options.parse_args(argv)
    measure = EVALS.get(given.eval).measure
    sides = {given.bundle: find(given.bundle, given.bundles)}
    if given.against:
        sides[given.against] = find(given.against, given.bundles)
    elif sibling := _float_of(sides[given.bundle]):
        sides[sibling.name] = sibling
    table = {}
    for name, directory in sides.items():
        found = measure(open_bundle(directory, threads=given.threads, ops=given.ops), given.data, given.limit)
        table[name] = {key: round(float(value), 2) for key, value in found.items()}
    emit(given.json, {"eval": given.eval, "results": table}, _side_by_side)
    return 0


def _float_of(directory: Path) -> Path | None:
    """NAME-float beside NAME-int8 or NAME-mixed, if it was made of the same weights."""
    from calmclip.models.bundle.store import MANIFEST, read

    other = directory.with_name(directory.name.removesuffix("-int8").removesuffix("-mixed") + "-float")
    if other == directory or not (other / MANIFEST).is_file():
        return None
    same = read(other, verify=False).manifest.source == read(directory, verify=False).manifest.source
    return other if same else None


def _export_parser(verb: str, description: str) -> argparse.ArgumentParser:
    options = parser(verb, description)
    options.add_argument("checkpoint", help="a checkpoint: directory, file, hf:owner/name[@revision]; or 'mini'")
    options.add_argument("--recipe", type=Path, help="TOML file; 'calmclip recipe' prints one")
    options.add_argument("--out", type=Path, default=BUNDLES, help=f"where bundles go (default {BUNDLES})")
    options.add_argument("--name", help="bundles are called NAME-int8 and NAME-float")
    options.add_argument("--preset", help="quantizer of every graph that the recipe names none for: paper, fast, …")
    options.add_argument("--images", type=Path, help="calibration pictures (a folder)")
    options.add_argument("--texts", type=Path, help="calibration texts (one a line)")
    options.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="NAME=DIR",
        type=_pair,
        help="measured in float and in INT8 for the report: zero_shot, retrieval or detection, and its data",
    )
    options.add_argument("--keep-float", action=argparse.BooleanOptionalAction, help="seal the float bundle too")
    options.add_argument(
        "--activation",
        choices=("gelu", "gelu_tanh", "quick_gelu"),
        help="of the blocks, where the checkpoint does not say it",
    )
    options.add_argument("--experts", choices=("dense", "routed"), help="how a mixture of experts is computed")
    options.add_argument("--softmax", help="of attention: vanilla or clipped(gamma:zeta), where the configs lack it")
    options.add_argument("--force", action="store_true", default=None, help="--softmax though it was not trained with")
    options.add_argument("--over", type=Path, help="a checkpoint whose image tower takes the place of this one's")
    options.add_argument("--mix", type=Path, help="a checkpoint of the same shapes to mix with this one, by --alpha")
    options.add_argument("--alpha", type=float, help="the share of --mix: 0 is this checkpoint, 1 the other")
    options.add_argument("--stretch", type=int, help="tokens of context to stretch the table of positions to: 248")
    options.add_argument("--replace", action="store_true", default=None, help="replace bundles of the same name")
    return options


def _pair(given: str) -> tuple[str, Path]:
    name, sign, data = given.partition("=")
    if not (name and sign and data):
        raise argparse.ArgumentTypeError(f"{given!r} is not NAME=DIR, such as zero_shot=./pictures")
    return name, Path(data)


def _recipe(options: argparse.Namespace, net_name: str, plugin: NetPlugin) -> tuple[Recipe, Net]:
    given = {name: getattr(options, name) for name in Weights.model_fields}
    weights = load_weights(options.recipe, **given)
    net = plugin.load(options.checkpoint, weights)
    calibration = {k: v for k, v in (("images", options.images), ("texts", options.texts)) if v is not None}
    recipe = load_recipe(
        options.checkpoint, net_name, net, options.recipe,
        name=options.name, preset=options.preset, keep_float=options.keep_float, replace=options.replace,
        calibration=calibration or None, weights=weights.model_dump(), evals=dict(options.eval) or None,
    )  # fmt: skip
    return recipe, net


def _summary(value: dict) -> None:  # type: ignore[type-arg]
    for row in value["sealed"]:
        print(f"{row['bundle']:24s} {row['megabytes']:6.1f} MB  {row['directory']}")
    found = value["int8"]
    print(f"  {found['share']:.1%} of the multiply-accumulates in INT8, {found['size_ratio']:.3f} of the float size")
    for name, bar in value["bars"].items():
        print(f"  {name:20s} {bar['measured']:<10} bar {bar['bar']}  {'passed' if bar['passed'] else 'MISSED'}")
    for name, sides in value["accuracy"].items():
        for key in sides["int8"]:
            print(f"  {name} {key:16s} int8 {sides['int8'][key]:.2f}, float {sides['float32'][key]:.2f}")
    for role, pair in value["latency_ms"].items():
        gain = pair["float32"]["p50"] / pair["int8"]["p50"]
        note = "" if gain >= 1 else "   INT8 IS SLOWER THAN FLOAT HERE"
        print(
            f"  {role:10s} int8 {pair['int8']['p50']:.2f} ms, float {pair['float32']['p50']:.2f} ms: {gain:.2f}x{note}"
        )


def _side_by_side(value: dict) -> None:  # type: ignore[type-arg]
    names = list(value["results"])
    print(f"{value['eval']:24s} " + " ".join(f"{name:>16s}" for name in names))
    for key in value["results"][names[0]]:
        print(f"{key:24s} " + " ".join(f"{value['results'][name][key]:16.2f}" for name in names))
