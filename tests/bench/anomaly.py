"""Damaged and normal views told apart: the task anomaly beside nearest neighbours of colours and of pixels.

    python -m tests.bench.anomaly --bundle mini-int8 --float mini-float [--tuning] [--scenes 20] [--method memory]

Bundles are folders. Each scene (`tests.bench.anomaly_scenes`) has 4 normal references, 20 normal and 20 damaged views.
A row has the AUROC of the pictures, its least over the scenes, the AUROC of the pixels of all views of a scene, and the
AUROC of the pictures by kind of fault, each a mean over the scenes. Of a fitted classifier: normal views above its
threshold, and damaged ones.

mean colour, raw pixels: the distance to the nearest reference, of the mean colour, and of 32 x 32 pixels. The same of
cells: as the memory, but a patch is the mean colour of a cell or its 8 x 8 pixels. The AUROC is scikit-learn's.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from calmclip import open_bundle
from calmclip.models.flow import Array
from calmclip.models.runner import Runner
from calmclip.models.tasks.anomaly import Anomaly
from tests.bench.anomaly_scenes import KINDS, Scene, reported, tuning

TRUTH = np.repeat([0, 1], 20)
CELL = 32  # a cell of a picture that is scaled to 416 pixels
Judged = tuple[float, Array | None]  # the score of a view, and a map of any size


@dataclass
class Row:
    """Of one method, a value for each scene."""

    image: list[float] = field(default_factory=list)
    pixel: list[float] = field(default_factory=list)
    kinds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    above: list[Array] = field(default_factory=list)

    def add(self, scene: Scene, judged: Sequence[Judged]) -> None:
        scores = np.array([score for score, _ in judged])
        self.image.append(float(roc_auc_score(TRUTH, scores)))
        for kind, values in self.kinds.items():
            some = np.array([True] * 20 + [drawn == kind for _, _, drawn in scene.damaged])
            values.append(float(roc_auc_score(TRUTH[some], scores[some])))
        if judged[0][1] is not None:
            blank = [np.zeros((view.height, view.width), bool) for view in scene.normal]
            masks = [*blank, *(mask for _, mask, _ in scene.damaged)]
            planes = [enlarged(plane, mask) for (_, plane), mask in zip(judged, masks, strict=True)]
            flat = (np.concatenate([*map(np.ravel, arrays)]) for arrays in (masks, planes))
            self.pixel.append(float(roc_auc_score(*flat)))

    def line(self, name: str) -> str:
        pixel = f"{np.mean(self.pixel):.3f}" if self.pixel else "  -  "
        kinds = "  ".join(f"{kind} {np.mean(values):.2f}" for kind, values in self.kinds.items())
        text = f"{name:34} image {np.mean(self.image):.3f} (least {min(self.image):.2f})  pixel {pixel}   {kinds}"
        if self.above:
            normal, damaged = np.mean(self.above, axis=0).reshape(2, 20).mean(axis=1)
            text += f"   above the threshold: {normal:.0%} normal, {damaged:.0%} damaged"
        return text


def enlarged(plane: Array | None, mask: Array) -> Array:
    """``plane`` in the size of ``mask``."""
    height, width = mask.shape
    picture = Image.fromarray(np.asarray(plane, np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def views(scene: Scene) -> list[Image.Image]:
    return [*scene.normal, *(view for view, _, _ in scene.damaged)]


def nearest_picture(feature: Callable[[Image.Image], Array]) -> Callable[[Scene], list[Judged]]:
    def judge(scene: Scene) -> list[Judged]:
        known = [feature(view) for view in scene.references]
        return [(min(float(np.linalg.norm(feature(view) - row)) for row in known), None) for view in views(scene)]

    return judge


def nearest_cell(pixels: int) -> Callable[[Scene], list[Judged]]:
    """Each cell beside all cells of the references, as ``pixels`` x ``pixels`` means."""

    def cells(view: Image.Image) -> Array:
        ratio = 416 / max(view.size) / CELL
        columns, rows = (max(1, round(ratio * side)) for side in view.size)
        small = np.asarray(view.resize((columns * pixels, rows * pixels), Image.Resampling.BOX), np.float32)
        return small.reshape(rows, pixels, columns, pixels, 3).swapaxes(1, 2).reshape(rows, columns, -1)

    def judge(scene: Scene) -> list[Judged]:
        memory = np.concatenate([cells(view).reshape(-1, 3 * pixels**2) for view in scene.references])
        lengths = (memory**2).sum(axis=1)
        judged: list[Judged] = []
        for view in views(scene):
            patches = cells(view)
            squares = (patches**2).sum(axis=-1) + (lengths - 2 * patches @ memory.T).min(axis=-1)
            plane = np.sqrt(np.maximum(squares, 0))
            judged.append((float(plane.max()), plane))
        return judged

    return judge


def mean_colour(view: Image.Image) -> Array:
    colour: Array = np.asarray(view, np.float32).mean(axis=(0, 1))
    return colour


def raw_pixels(view: Image.Image) -> Array:
    return np.asarray(view.resize((32, 32), Image.Resampling.BOX), np.float32)


BASELINES: dict[str, Callable[[Scene], list[Judged]]] = {
    "mean colour": nearest_picture(mean_colour),
    "raw pixels": nearest_picture(raw_pixels),
    "mean colour of cells": nearest_cell(1),
    "raw pixels of cells": nearest_cell(8),
}


CROPS = {"memory": 0, "memory, 6 crops": 6, "both, 6 crops": 6}  # of each reference
NAMES = ("text", *CROPS)


def answers(runner: Runner, scene: Scene, names: Sequence[str]) -> Iterator[tuple[str, list[Anomaly]]]:
    """Of each method."""
    for name in names:
        classifier = None
        if name in CROPS:
            classifier, _ = runner.fit(scene.references, ["normal"] * 4, "memory", augment=CROPS[name])
        method: Any = name.split(",")[0]
        yield name, [runner.anomaly(view, classifier=classifier, method=method) for view in views(scene)]


def measure(scenes: Sequence[Scene], runners: Sequence[Runner], names: Sequence[str]) -> None:
    for name, judge in BASELINES.items():
        row = Row()
        for scene in scenes:
            row.add(scene, judge(scene))
        print(row.line(name), flush=True)
    for runner in runners:
        rows: dict[str, Row] = {}
        for scene in scenes:
            for method, judged in answers(runner, scene, names):
                row = rows.setdefault(method, Row())
                row.add(scene, [(answer.score, answer.map) for answer in judged])
                if judged[0].threshold is not None:
                    row.above.append(np.array([bool(answer.is_damaged) for answer in judged]))
        for method, row in rows.items():
            print(row.line(f"{runner.bundle.name} {method}"), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--bundle", type=Path, required=True)
    options.add_argument("--float", type=Path, help="its float bundle, to compare INT8 with")
    options.add_argument("--tuning", action="store_true", help="the other photographs, with the other seed")
    options.add_argument("--scenes", type=int, help="at most so many")
    options.add_argument("--every", type=int, default=1, help="every so many scenes")
    options.add_argument("--method", choices=NAMES, action="append", help="may be given many times; default: all")
    given = options.parse_args(arguments)
    scenes = [*islice(tuning() if given.tuning else reported(), 0, given.scenes, given.every)]
    print(f"{len(scenes)} scenes: {', '.join(scene.name for scene in scenes)}")
    measure(scenes, [open_bundle(path) for path in (given.bundle, given.float) if path], given.method or NAMES)


if __name__ == "__main__":
    main()
