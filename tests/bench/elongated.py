"""Detection in elongated pictures, with slices and without: photographs pasted side by side, or one below the other.

    python -m tests.bench.elongated --bundle mini-int8 --coco DIR DIR [--sides 2 3 5 8] [--length 1.5] [--overlap .5]

Bundle and data are folders; the data are COCO's instances.json and images/. The photographs of a picture have one
height in a row and one width in a column. AP50 with all names of the data; "alone" is that of the photographs
themselves. Time is the median of the CPU time of a flow with all names, whose rows are cached: one thread, in turns,
over eight pictures.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import inf
from pathlib import Path
from time import process_time
from typing import TypeVar

import numpy as np
from PIL import Image

from calmclip import open_bundle
from calmclip.models.evals.average_precision import MOST, Boxes
from calmclip.models.evals.detection import FLOOR, Instances
from calmclip.models.preprocess.image import load
from calmclip.models.runner import Runner
from calmclip.models.tasks import elongated
from calmclip.models.tasks.detect import default_suppression
from tests.bench.alternate import alternate, machine
from tests.bench.detector import ap50, coco_sets

SHORT = 480  # pixels of the short side
T = TypeVar("T")
Pasted = tuple[Image.Image, Boxes]


def pasted(data: Instances, chosen: Sequence[int], row: bool) -> Pasted:
    """The photographs ``chosen`` as one picture, with their true boxes."""
    sides, boxes, at = [], [], 0
    for index in chosen:
        photograph = load(Path(str(data.pictures[index])))
        scale = SHORT / (photograph.height if row else photograph.width)
        width, height = (round(side * scale) for side in photograph.size)
        place = (at, 0) if row else (0, at)
        factor = np.array([width / photograph.width, height / photograph.height] * 2)
        sides.append((photograph.resize((width, height), Image.Resampling.BICUBIC), place))
        boxes.append(data.truth[index].boxes * factor + np.array(place * 2))
        at += width if row else height
    picture = Image.new("RGB", (at, SHORT) if row else (SHORT, at))
    for photograph, place in sides:
        picture.paste(photograph, place)
    truth = [data.truth[index] for index in chosen]
    joined = (np.concatenate([getattr(t, key) for t in truth]) for key in ("classes", "crowd"))
    return picture, Boxes.true(np.concatenate(boxes), *joined)


def groups(data: Instances, count: int, row: bool, seed: int = 0) -> list[Pasted]:
    """Each photograph in one group of ``count``; those that remain are left out."""
    order = np.random.default_rng(seed).permutation(len(data.pictures))
    return [pasted(data, order[at : at + count].tolist(), row) for at in range(0, len(order) - count + 1, count)]


def accuracy(runner: Runner, pictures: Sequence[Pasted], names: Sequence[str]) -> float:
    settings = replace(default_suppression(runner.bundle), min_score=FLOOR, max_output=MOST)
    rows = []
    for answer in runner.detect_many((picture for picture, _ in pictures), names, suppression=settings, threads=0):
        boxes = np.array([d.box for d in answer]).reshape(-1, 4)
        classes, scores = (np.array([getattr(d, key) for d in answer]) for key in ("index", "score"))
        rows.append(Boxes.detected(boxes, classes.astype(int), scores))
    return ap50([truth for _, truth in pictures], rows)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--bundle", type=Path, required=True)
    options.add_argument("--coco", type=Path, nargs="+", required=True)
    options.add_argument("--sides", type=int, nargs="+", default=[3, 5, 8], help="photographs in a picture")
    options.add_argument("--length", type=float, default=elongated.LENGTH)
    options.add_argument("--overlap", type=float, default=elongated.OVERLAP)
    arguments = options.parse_args()
    elongated.LENGTH, elongated.OVERLAP = arguments.length, arguments.overlap
    data, runner = coco_sets(arguments.coco), open_bundle(arguments.bundle, threads=1)
    names, ratio = data.names, elongated.ELONGATED

    def measure(slices: bool, use: Callable[[], T]) -> T:
        elongated.ELONGATED = ratio if slices else inf
        try:
            return use()
        finally:
            elongated.ELONGATED = ratio

    def timed(slices: bool, some: Sequence[Image.Image]) -> Callable[[], object]:
        return partial(measure, slices, lambda: [*runner.detect_many(some, names, threads=0)])

    print(machine(1))
    alone = [(load(Path(str(path))), truth) for path, truth in zip(data.pictures, data.truth, strict=True)]
    print(f"alone: AP50 {accuracy(runner, alone, names):.1f}", flush=True)
    for count, row in product(arguments.sides, (False, True)):
        pictures = groups(data, count, row)
        some = [picture for picture, _ in pictures[:8]]
        sides = {"whole": False, "slices": True}
        spent = alternate(
            {side: timed(slices, some) for side, slices in sides.items()}, seconds=0, least=3, clock=process_time
        )
        figures = {side: measure(on, partial(accuracy, runner, pictures, names)) for side, on in sides.items()}
        shape = np.mean([max(picture.size) / SHORT for picture, _ in pictures])
        cells = [f"{side} AP50 {figures[side]:.1f}, {1e3 * spent[side].p50 / len(some):.0f} ms" for side in sides]
        print(f"{count} in a {'row' if row else 'column'}, 1:{shape:.1f}", *cells, sep="   ", flush=True)


if __name__ == "__main__":
    main()
