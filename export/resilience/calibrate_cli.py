"""The verb `resilience calibrate`. What needs onnx is imported after the flags are read."""

import argparse
from pathlib import Path
from typing import Any

from calmclip.models.cli import bundle_options, emit, parser, positive
from calmclip.models.errors import BadRequest


def calibrate_command(argv: list[str]) -> int:
    """`calmclip resilience calibrate BUNDLE [--out NAME]`: seal the bundle with bounds, beside the old one."""
    args = _parser().parse_args(argv)
    from calmclip.export.resilience.calibrate import SLACK
    from calmclip.export.resilience.sealing import Settings, calibrated
    from calmclip.models.bundle.embedding import embedding_digest
    from calmclip.models.bundle.store import find
    from calmclip.models.files import check_name
    from calmclip.models.runner import open_bundle

    directory = find(args.bundle, args.bundles)
    bundle = open_bundle(directory, threads=args.threads, ops=args.ops).bundle
    name = args.out or _name(bundle.name)
    check_name("bundle", name)
    if (directory.parent / name).exists() and not args.replace:
        raise BadRequest(f"{directory.parent / name} exists; choose another name (--out), or --replace")
    if args.form == "smooth" and args.refine:
        raise BadRequest("--refine moves bounds at which an answer stays; the smooth form changes answers below them")
    settings = Settings(
        graphs=tuple(args.graphs.split(",")) if args.graphs else (),
        method=args.method, form=args.form, slack=SLACK if args.slack is None else args.slack,
        stored=args.stored, refine=args.refine, count=args.count,
        rate=args.rate, faults=args.faults, seed=args.seed, ops=args.ops,
    )  # fmt: skip
    say = lambda line: None if args.json else print(line, flush=True)  # noqa: E731
    sealed, facts = calibrated(bundle, name, directory.parent, settings, args.data, replace=args.replace, say=say)
    value = {
        "bundle": name,
        "directory": str(sealed.directory),
        "digest": sealed.digest,
        "embedding_digest": embedding_digest(sealed.manifest),
        **facts,
    }
    emit(args.json, value, _show)
    return 0


def _name(name: str) -> str:
    """mini-int8 -> mini-bounded-int8, so that a bounded INT8 bundle finds a bounded float one."""
    stem, dash, kind = name.rpartition("-")
    return f"{stem}-bounded-{kind}" if dash and kind in ("int8", "mixed", "float") else f"{name}-bounded"


def _parser() -> argparse.ArgumentParser:
    options = parser("resilience calibrate", "Seal a bundle again, with bounds in its graphs against flipped bits.")
    options.add_argument("bundle")
    options.add_argument("--out", metavar="NAME", help="of the new bundle (default NAME-bounded-int8)")
    options.add_argument(
        "--data", type=Path, help="folder of pictures, and texts.txt with a text per line; default: calmclip's samples"
    )
    options.add_argument("--graphs", help="such as image,text (default: all that read pictures or texts)")
    options.add_argument("--count", type=positive, default=64, help="inputs of each graph (default %(default)s)")
    options.add_argument(
        "--method", choices=("layer", "hybrid"), default="layer",
        help="one bound for each layer; hybrid: one for each neuron of the last activation layer",
    )  # fmt: skip
    options.add_argument(
        "--form", choices=("mixed", "clamp", "zero", "smooth"), default="mixed",
        help="what a number out of range becomes: the bound, 0, or 0 by a smooth step; mixed: the bound behind a "
        "convolution, else 0",
    )  # fmt: skip
    options.add_argument(
        "--slack", type=float,
        help="how much wider than the calibrated range a bound is where a number out of range becomes 0, as a part of "
        "its greater end (default 1)",
    )  # fmt: skip
    options.add_argument(
        "--stored", choices=("none", "vectors", "all"), default="all",
        help="also bound the numbers of the file when it is loaded: biases, scales and zero points, or all of float",
    )  # fmt: skip
    options.add_argument("--refine", action="store_true", help="shrink bounds, last layer first, under drawn faults")
    options.add_argument("--rate", type=float, default=1e-5, help="of these faults, per bit (default %(default)s)")
    options.add_argument("--faults", type=positive, default=4, help="sets of faults (default %(default)s)")
    options.add_argument("--seed", type=int, default=0, help="of their places")
    options.add_argument("--replace", action="store_true", help="replace a bundle of that name")
    bundle_options(options)
    return options


def _show(value: dict[str, Any]) -> None:
    print(f"sealed {value['directory']}")
    for role, facts in value["graphs"].items():
        worst = min(output["cosine_min"] for output in facts["against_unbounded"].values())
        print(
            f"  {role:10s} {facts['layers']} layers and {facts['stored']} stored tensors bounded, by "
            f"{facts['inputs']} inputs; least cosine with the unbounded graph {worst:.6f}"
        )
