"""The verb `resilience inject`. What needs onnx is imported after the flags are read."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmclip.models.cli import bundle_options, emit, parser, positive
from calmclip.models.errors import BadRequest

if TYPE_CHECKING:
    from calmclip.export.resilience.inject import Settings, Subject
    from calmclip.models.evals.zero_shot import DataSet

_FULL = 100  # repetitions and pictures of --full
_LIMIT = 20  # pictures of --data


def inject_command(argv: list[str]) -> int:
    """`calmclip resilience inject BUNDLE [--against BUNDLE …]`: nothing is written but --plot and --html."""
    args = _parser().parse_args(argv)
    from calmclip.export.resilience import inject

    settings = _settings(args)
    if args.plot or args.html:
        from calmclip.export.resilience import curves

        curves.require()
    subjects = _subjects(args, settings)
    result = inject.run(subjects, settings)
    value: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "pictures": len(subjects[0].truth),
        "bundles": [_stored(subject) for subject in subjects],
        **asdict(result),
    }
    if args.each_bit:
        value["each_bit"] = [asdict(cell) for subject in subjects for cell in inject.bits(subject, settings)]
    if args.plot:
        curves.draw(value, args.plot)
    if args.html:
        curves.page(value, args.html)
    emit(args.json, value, _show)
    return 0


def _settings(args: argparse.Namespace) -> "Settings":
    from pydantic import ValidationError

    from calmclip.export.resilience.inject import RATES, Settings
    from calmclip.models.bundle.manifest import explain

    try:
        return Settings.model_validate(
            {
                "graphs": args.graphs.split(","),
                "kinds": args.bits.split(","),
                "rates": args.rates.split(",") if args.rates else RATES,
                "repeats": args.repeats or (_FULL if args.full else Settings().repeats),
                "count": args.count,
                "apart": args.apart,
                "seed": args.seed,
            }
        )
    except ValidationError as error:
        raise BadRequest(f"--rates, --bits, --graphs or --seed: {explain(error)}") from None


def _subjects(args: argparse.Namespace, settings: "Settings") -> list["Subject"]:
    from calmclip.export.resilience.inject import Subject
    from calmclip.models.bundle.store import find
    from calmclip.models.eval_cli import float_of
    from calmclip.models.runner import open_bundle

    data = _data(args)
    directories = [find(name, args.bundles) for name in (args.bundle, *args.against)]
    if not args.against and (twin := float_of(directories[0])):
        directories.append(twin)
    runners = [open_bundle(directory, threads=args.threads, ops=args.ops) for directory in directories]
    return [Subject(runner, data, settings.graphs, settings.kinds) for runner in runners]


def _data(args: argparse.Namespace) -> "DataSet":
    """The pictures of --data, evenly spread; or those that ship with calmclip, each with its name as its label."""
    from calmclip.export.samples import pictures
    from calmclip.models.evals import zero_shot

    if args.data is None:
        files = pictures()[: args.limit]
        return zero_shot.DataSet(files, [file.stem for file in files], range(len(files)))
    data = zero_shot.read(args.data, zero_shot.Params())
    limit = min(len(data.pictures), args.limit or (_FULL if args.full else _LIMIT))
    places = [place * len(data.pictures) // limit for place in range(limit)]
    return zero_shot.DataSet([data.pictures[i] for i in places], data.labels, [data.truth[i] for i in places])


def _stored(subject: "Subject") -> dict[str, Any]:
    """What a bundle stores, for the report."""
    numbers: dict[str, dict[str, int]] = {}
    for tensor in subject.store.tensors:
        of = numbers.setdefault(tensor.kind, {})
        of[str(tensor.data.dtype)] = of.get(str(tensor.data.dtype), 0) + tensor.data.size
    return {
        "name": subject.name,
        "digest": subject.bundle.digest,
        "bits": subject.store.bits,
        "numbers": numbers,
        "shared": {role: len(names) for role, names in subject.store.shared().items()},
    }


def _parser() -> argparse.ArgumentParser:
    options = parser("resilience inject", "Flip bits of bundles in memory, and measure how many answers stay.")
    options.add_argument("bundle")
    options.add_argument(
        "--against", action="append", default=[], metavar="BUNDLE",
        help="another bundle, many times; default: the float one sealed beside an INT8 one. A bundle that stores the "
        "same tensors, such as one with bounds, gets the same faults",
    )  # fmt: skip
    options.add_argument("--bits", default="weight,bias,scale,zero", help="kinds of numbers (default %(default)s)")
    options.add_argument("--graphs", default="image", help="graphs whose bits flip: image, text (default %(default)s)")
    options.add_argument("--rates", help="flipped bits per bit, such as 1e-6,1e-5 (default 1e-7 to 1e-4)")
    options.add_argument("--repeats", type=positive, help="repetitions at each rate (default 20; with --full 100)")
    options.add_argument(
        "--count", choices=("exact", "binomial"), default="exact",
        help="faults of a repetition: int(bits x rate), or each bit by chance (default %(default)s)",
    )  # fmt: skip
    options.add_argument("--apart", action="store_true", help="also the faults of each kind alone")
    options.add_argument("--each-bit", action="store_true", help="also one fault at a time, by kind and bit")
    options.add_argument("--data", type=Path, help="data set of the eval zero_shot; default: pictures of calmclip")
    options.add_argument("--limit", type=positive, help=f"pictures (default {_LIMIT}; with --full {_FULL})")
    options.add_argument("--full", action="store_true", help="more repetitions and pictures")
    options.add_argument("--seed", type=int, default=0, help="of the places")
    options.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    options.add_argument("--html", type=Path, metavar="FILE", help="write tables and curves as a page")
    bundle_options(options)
    return options


def _show(value: dict[str, Any]) -> None:
    from calmclip.export.resilience.report import text

    print(text(value))
