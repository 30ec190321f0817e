"""The verb teach. `calmclip.export.teach`, with torch, is imported after the flags are read."""

import argparse
import io
import json
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from calmclip.models.cli import emit, parser

FOLDER = Path("taught")


def teach_command(argv: list[str]) -> int:
    """`calmclip teach DIR`: a detector that knows the user's photographs. Status 1 if it became no better."""
    options = _parser().parse_args(argv)
    from calmclip.export import photographs
    from calmclip.export.teach import teach

    data = photographs.read(options.pictures)
    out = options.out or FOLDER / options.pictures.resolve().name
    report = teach(data, out, options.cache or out / "cache", seed=options.seed, keep=options.keep)
    folder = out if out.is_absolute() else f"./{out}"  # "mini" is the built-in model
    report["export"] = shlex.join(["calmclip", "export", str(folder)]) if report["detector"] else None
    if options.export and report["detector"]:
        from calmclip.export.cli import export_command

        printed = io.StringIO()
        with redirect_stdout(printed):  # one JSON object is printed
            export_command([str(folder), "--json"])
        report["exported"] = json.loads(printed.getvalue())["sealed"]
    emit(options.json, report, _show)
    return 0 if report["improved"] else 1


def _parser() -> argparse.ArgumentParser:
    options = parser("teach", "Teach the built-in detector your own photographs; a fifth of them measures the result.")
    options.add_argument(
        "pictures", type=Path, metavar="DIR",
        help="photographs with boxes (COCO or YOLO layout), with names (a folder for each name, or labels.json), or "
        "alone",
    )  # fmt: skip
    options.add_argument("--out", type=Path, help=f"folder of the result; it names the bundle (default {FOLDER}/DIR)")
    options.add_argument("--cache", type=Path, help="folder from which a stopped run goes on (default OUT/cache)")
    options.add_argument("--seed", type=int, default=0, help="of the draw of the photographs held out, and of training")
    options.add_argument("--keep", action="store_true", help="write the result even if the first figure does not rise")
    options.add_argument("--export", action="store_true", help="export the bundle, too")
    return options


def _show(report: dict[str, Any]) -> None:
    held = report["held_out"]
    print(f"trained on {report['trained']}")
    print(f"  {held['photographs']} photographs held out:  before -> after   95 % of the differences")
    for name, row in held["figures"].items():
        numbers = [row["before"], row["after"], *row["difference_95"]]
        before, after, low, high = ("-" if number is None else f"{number:.1f}" for number in numbers)
        print(f"  {name:26s} {before:>6s} -> {after:>5s}   {low} to {high}")
    print(f"  {report['kept_names']} % of the things in photographs that ship keep their COCO name")
    if not report["improved"]:
        name = next(iter(held["figures"]))
        kept = (
            "it is written because of --keep" if report["detector"] else "nothing is written; --keep writes it anyway"
        )
        print(f"NO BETTER: {name} did not rise on the photographs held out, so {kept}")
    if report["detector"]:
        print(f"wrote {report['detector']}")
        print("".join(f"exported {row['directory']}\n" for row in report.get("exported", ())), end="")
        if "exported" not in report:
            print(f"export it with: {report['export']}")
