"""Dataset mIoU of ways to segment, INT8 beside float, and their time.

    python -m tests.bench.segment --data FOLDER --bundle mini-int8 [--float mini-float] [--cache FOLDER]
        [--ways crops dense …] [--most N] [--seconds 0]

``--data``: a folder in COCO's form with polygons or runs (`models/evals/outlined.py` defines the figure). Each way
(`tests.bench.label_maps`) gets the names that a photograph shows ("present"), then all names of the set ("all"); each
of both has a threshold of its own, chosen on one half of the photographs for the other. The first row knows the truth.
± is one standard deviation over photographs. Times: processor time of one thread from a decoded picture to a map of
labels with all names, whose vectors are cached; the median of turns over five photographs.

``--cache`` keeps the answers of graphs, so that a rerun costs the rest alone; times never use it.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from calmclip import open_bundle
from calmclip.models.evals.outlined import NONE, Photograph, counted, mean_iou, read
from calmclip.models.flow import Array
from calmclip.models.preprocess.image import load
from calmclip.models.runner import Runner
from tests.bench.alternate import alternate, machine
from tests.bench.label_maps import Recorded, Way, scene, ways
from tests.bench.masks import Figure, enlarged, figure, held_out

TIMED = 5  # photographs
SETS = ("present", "all")
Counts = Mapping[tuple[str, str], Array]  # (way, set of names) -> int64 [photographs, thresholds, 3, classes]


def picture(photograph: Photograph) -> Image.Image:
    return load(photograph.path, max_pixels=photograph.width * photograph.height)


def measured(
    driver: Recorded, chosen: Mapping[str, Way], names: Sequence[str], photographs: Sequence[Photograph]
) -> Counts:
    rows: dict[tuple[str, str], list[Array]] = {(name, each): [] for name in chosen for each in SETS}
    for photograph in photographs:
        image = picture(photograph)
        for each, classes in zip(SETS, (photograph.present, [*range(len(names))]), strict=True):
            if not classes:  # crowds alone: nothing was asked for
                for name in chosen:
                    empty = np.full((1, 1), NONE, np.int16)
                    rows[name, each].append(_scored(photograph, [empty] * len(chosen[name].thresholds), names))
                continue
            index = np.array([*classes, NONE], np.int16)  # NONE is the last
            asked = driver.run(scene(driver.bundle, image, [names[c] for c in classes]))
            for name, way in chosen.items():
                maps = driver.run(way.flow(driver.bundle, asked, way.thresholds))
                rows[name, each].append(_scored(photograph, [index[labels] for labels in maps], names))
    return {key: np.stack(parts) for key, parts in rows.items()}


def _scored(photograph: Photograph, maps: Sequence[Array], names: Sequence[str]) -> Array:
    """-> int64 [maps, 3, classes]."""
    size = photograph.width, photograph.height
    return np.stack([counted(photograph.truth(), enlarged(each, *size), len(names)) for each in maps])


def oracle(names: Sequence[str], photographs: Sequence[Photograph]) -> float:
    """The largest present class fills the picture."""
    rows = []
    for photograph in photographs:
        truth = photograph.truth()
        areas = np.bincount(truth[truth >= 0], minlength=len(names))
        label = np.full((1, 1), areas.argmax() if areas.any() else NONE, np.int16)
        rows.append(_scored(photograph, [label], names))
    return mean_iou(np.stack(rows))


def times(
    runners: Mapping[str, Runner],
    chosen: Mapping[str, Way],
    names: Sequence[str],
    images: Sequence[Image.Image],
    seconds: float,
) -> dict[tuple[str, str], float]:
    """(bundle, way) -> milliseconds of a picture."""

    def side(runner: Runner, way: Way) -> Callable[[], object]:
        asked = [runner.run(scene(runner.bundle, image, names)) for image in images]

        def run() -> None:
            for each in asked:
                runner.run(way.flow(runner.bundle, each, way.thresholds[:1]))

        return run

    sides = {
        (bundle, name): side(runner, way)
        for bundle, runner in runners.items()
        for name, way in chosen.items()
        if way.why_not(runner.bundle.manifest) is None
    }
    spent = alternate({str(key): run for key, run in sides.items()}, seconds=seconds, least=5, clock=time.process_time)
    return {key: 1e3 * spent[str(key)].p50 / len(images) for key in sides}


def cell(value: Figure) -> str:
    return f"{value.value:.1f} ± {value.deviation:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--bundle", type=Path, required=True)
    options.add_argument("--float", type=Path, help="its float bundle")
    options.add_argument("--cache", type=Path)
    options.add_argument("--ways", nargs="+", choices=[*ways()], default=[*ways()])
    options.add_argument("--most", type=int, default=10_000, help="photographs, at most")
    options.add_argument("--seconds", type=float, default=20.0, help="for the times; 0: none are measured")
    given = options.parse_args(arguments)
    names, photographs = read(given.data)
    photographs = photographs[: given.most]
    bundles = {"INT8": given.bundle} | ({"float": given.float} if given.float else {})
    runners = {side: open_bundle(path, threads=1) for side, path in bundles.items()}
    chosen = {name: way for name, way in ways().items() if name in given.ways}
    print(f"{given.data.name}: {len(photographs)} photographs, {len(names)} names; {machine(1)}")
    counts: dict[tuple[str, str, str], Array] = {}
    for side, runner in runners.items():
        fit = {}
        for name, way in chosen.items():
            if lack := way.why_not(runner.bundle.manifest):
                print(f"{name}: {runner.bundle.name} cannot: {lack}")
            else:
                fit[name] = way
        for key, rows in measured(Recorded(runner, given.cache), fit, names, photographs).items():
            counts[side, *key] = rows
    spent = {}
    if given.seconds:
        images = [picture(photograph) for photograph in photographs[:TIMED]]
        spent = times(runners, chosen, names, images, given.seconds)
    columns = [(side, each) for side in bundles for each in SETS]
    heads = ["way", *(f"{side}, {each}" for side, each in columns), *(f"{side}, ms" for side in bundles)]
    print(f"| {' | '.join(heads)} |")
    print("| " + "--- | " * len(heads))
    print(f"| largest present class fills the picture (oracle) | {oracle(names, photographs):.1f} |")
    for name, way in chosen.items():
        figures = {
            (s, e): figure(*held_out(counts[s, name, e], way.thresholds, mean_iou), mean_iou)
            for s, e in columns
            if (s, name, e) in counts
        }
        cells = [cell(figures[key]) if key in figures else "-" for key in columns]
        took = [f"{spent[side, name]:.0f}" if (side, name) in spent else "-" for side in bundles]
        print(f"| {way.title} | " + " | ".join((*cells, *took)) + " |")
        print(f"  thresholds: { {key: each.settings for key, each in figures.items()} }")


if __name__ == "__main__":
    main()
