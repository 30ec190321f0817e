"""The table and the plot of docs/evaluation.md, from samples of the eval robustness.

    calmclip eval mini-int8 robustness --data DATA/cifar10 --full --save cifar10
    calmclip eval mini-int8 robustness --data DATA/natural-images --full --save everyday
    python -m tests.bench.robustness "CIFAR-10=cifar10" "everyday classes=everyday" --plot docs/robustness.png

    python -m tests.bench.robustness --cost DATA/cifar10 --bundles models/bundles/mini-int8 models/bundles/mini-float

Each argument is a title and a folder of --save with the samples of two bundles: the one whose name ends in -int8 or
-mixed first. A cell has both values, the difference and its interval, a paired bootstrap of 1,000 resamples.

--cost prints the CPU time of each corruption and of a view of each bundle, of four pictures, in milliseconds. CPU time
depends less on what else runs than time on the wall does.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from calmclip import open_bundle
from calmclip.models.evals import EVALS, corruptions
from calmclip.models.evals.measure import params_of, predict, read
from calmclip.models.evals.samples import Samples
from calmclip.models.evals.tables import Table, between, rounded, tabulate

Key = tuple[str, str]


def sides_of(folder: Path) -> list[Samples]:
    files = sorted(folder.glob("*.npz"), key=lambda file: "-float" in file.name)
    return [Samples.load(file, "robustness") for file in files]


def markdown(tables: Mapping[str, Table]) -> str:
    cells: dict[Key, dict[str, str]] = {}
    for title, table in tables.items():
        for row in table.rows:
            values = " / ".join(rounded(value.value, value.unit) for value in row.values)
            apart = row.difference
            shown = f"{rounded(apart.value, apart.unit, '+')} {between(apart, '+')}" if apart else ""
            cells.setdefault(row.figure.key, {})[title] = f"{values} | {shown}"
        for figure in table.together:
            sign = "+" if figure.unit == "points" else ""
            shown = f"{rounded(figure.value, figure.unit, sign)} {between(figure, sign)}"
            cells.setdefault(("both", figure.name), {})[title] = f" | {shown}"
    head = ["figure", *(part for title in tables for part in (title, "difference"))]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for (group, name), of_table in cells.items():
        lines.append(f"| {group}: {name} | {' | '.join(of_table.get(title, ' | ') for title in tables)} |")
    return "\n".join(lines)


def draw(sides: Mapping[str, Sequence[Samples]], tables: Mapping[str, Table], file: Path) -> None:
    """A row for each data set: top-1 by severity, and the reliability diagram."""
    from matplotlib.figure import Figure

    measured, params = EVALS.get("robustness"), params_of("robustness")
    assert measured.plots
    figure = Figure(figsize=(9, 3.6 * len(sides)), layout="constrained")
    axes = figure.subplots(len(sides), 2, squeeze=False)
    for row, (title, samples) in zip(axes, sides.items(), strict=True):
        names = [side.name for side in tables[title].sides]
        for place, plot in zip(row, measured.plots(dict(zip(names, samples, strict=True)), params), strict=True):
            for line in plot.lines:
                style = "--" if "float" in line.label else "-"
                place.plot(line.x, line.y, style, marker="o", markersize=3, label=line.label)
            if plot.diagonal:
                place.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle=":")
            else:
                place.set_ylim(bottom=0)
            place.set(title=title, xlabel=plot.x, ylabel=plot.y)
            place.grid(linewidth=0.4)
            place.legend(fontsize=8)
    figure.savefig(file, dpi=70)


def costs(data: Path, bundles: Sequence[Path]) -> None:
    params = EVALS.get("robustness").params()
    pictures = read("robustness", data, {}, 4)
    pixels = corruptions.standard(Image.open(pictures.pictures[0]).convert("RGB"))
    total = 0.0
    for name in corruptions.NAMES:
        corruptions.corrupted(pixels, name, 1)  # compiles, where a corruption does
        corruptions.corrupted(pixels, name, 3)
        start = time.process_time()
        for severity in params.severities:
            corruptions.corrupted(pixels, name, severity)
        spent = (time.process_time() - start) / len(params.severities) * 1000
        total += spent / len(corruptions.NAMES)
        print(f"{name}: {spent:.1f}")
    print(f"mean of the corruptions: {total:.1f}")
    for folder in bundles:
        runner = open_bundle(folder, threads=1)
        predict("robustness", runner, pictures, {"corruptions": ["contrast"], "severities": [1]})  # loads and embeds
        start = time.process_time()
        predict("robustness", runner, pictures)
        views = len(pictures.pictures) * (len(params.views) + 1)
        print(f"{folder.name}, a view with its corruption: {(time.process_time() - start) / views * 1000:.1f}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folders", nargs="*", metavar="TITLE=FOLDER")
    options.add_argument("--plot", type=Path, help="write the plot into this PNG file")
    options.add_argument("--cost", type=Path, metavar="DATA", help="print the CPU time of corruptions and views")
    options.add_argument("--bundles", nargs="+", type=Path, default=[], help="folders of bundles, for --cost")
    args = options.parse_args()
    if args.cost:
        costs(args.cost, args.bundles)
    folders = dict(each.split("=", 1) for each in args.folders)
    sides = {title: sides_of(Path(folder)) for title, folder in folders.items()}
    tables = {title: tabulate(samples) for title, samples in sides.items()}
    if tables:
        print(markdown(tables))
    if tables and args.plot:
        draw(sides, tables, args.plot)


if __name__ == "__main__":
    main()
