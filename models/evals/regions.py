"""Regions: how often the vector of a true box names what the box holds.

The names of the set are the labels. The vector of a box is that of `tasks.regions`: from the graph `dense`, or from the
nearest proposal of `regions`. Small, medium and large are COCO's limits of a box's area: 32 and 96 pixels squared.
Intervals resample photographs.

Source: Zhong et al. 2022, RegionCLIP (arXiv 2112.09106), section 4.2: zero-shot inference with ground-truth boxes;
Lin et al. 2014 (arXiv 1405.0312) for the sizes.

Data: instances.json (COCO form), images/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Figure, NoParams, Samples, Statistic, detection
from calmclip.models.evals.progress import progress
from calmclip.models.flow import Array, Flow
from calmclip.models.runner import Picture, Runner
from calmclip.models.tasks.features import labels as label_vectors
from calmclip.models.tasks.regions import region_vectors

DATA = "instances.json (COCO form), images/"
SIZES = (("small boxes", 0.0, 32.0**2), ("medium boxes", 32.0**2, 96.0**2), ("large boxes", 96.0**2, np.inf))


@dataclass(frozen=True)
class DataSet:
    """``boxes`` float32 [N, 4] x0 y0 x1 y1 in pixels and ``classes`` int64 [N] of each picture, no crowds; a class is
    an index into ``names``. Raises `BadRequest` if no picture has a box."""

    names: Sequence[str]
    pictures: Sequence[Picture]
    boxes: Sequence[Array]
    classes: Sequence[Array]

    def __post_init__(self) -> None:
        if not sum(map(len, self.boxes)):
            raise BadRequest(f"the {len(self.pictures)} pictures of the data set have no box; expected at least one")


def read(data: Path, params: NoParams, limit: int | None = None) -> DataSet:
    """The boxes that are no crowds and at least a pixel wide and high. Raises `BadRequest` as `detection.read`."""
    instances = detection.read(data, params, limit)
    boxes, classes = [], []
    for true in instances.truth:
        real = ~true.crowd & (true.boxes[:, 2:] - true.boxes[:, :2] >= 1).all(axis=1)
        boxes.append(np.asarray(true.boxes[real], np.float32))
        classes.append(np.asarray(true.classes[real], np.int64))
    return DataSet(instances.names, instances.pictures, boxes, classes)


def predict(runner: Runner, data: DataSet, params: NoParams) -> Samples:
    """-> for each box of all pictures ``cosines`` float32 [K, names], ``truth`` int64 [K], ``area`` float32 [K] in
    pixels, ``picture`` int64 [K]."""
    bundle = runner.bundle
    text = runner.run(label_vectors(bundle, Classifier(tuple(data.names), bundle.classifier.templates)))
    rows = zip(data.pictures, data.boxes, strict=True)
    shown = progress(rows, f"regions {bundle.name}", "picture", len(data.pictures))
    cosines = [*runner.map(_cosines(bundle, picture, boxes, text) for picture, boxes in shown)]
    boxes = np.concatenate(data.boxes)
    return Samples(
        {"pictures": len(data.pictures), "boxes": len(boxes), "names": len(data.names)},
        {
            "cosines": np.concatenate(cosines),
            "truth": np.concatenate(data.classes),
            "area": (boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
            "picture": np.repeat(np.arange(len(data.boxes)), [*map(len, data.boxes)]),
        },
    )


def _cosines(bundle: Bundle, picture: Picture, boxes: Array, text: Array) -> Flow[Array]:
    """-> float32 [N, names]."""
    if not len(boxes):
        return np.empty((0, len(text)), np.float32)
    vectors, _ = yield from region_vectors(bundle, Path(picture) if isinstance(picture, str) else picture, boxes)
    cosines: Array = vectors @ text.T
    return cosines


def score(samples: Samples, params: NoParams) -> Statistic:
    cosines, truth, area = (samples.arrays[name] for name in ("cosines", "truth", "area"))
    target = cosines[np.arange(len(truth)), truth][:, None]
    before = (cosines > target) | ((cosines == target) & (np.arange(cosines.shape[1]) < truth[:, None]))
    rank = before.sum(axis=1)
    picture, classes = samples.arrays["picture"], cosines.shape[1]

    def of(rows: Array) -> Sequence[Figure]:
        weights = np.bincount(rows, minlength=samples.count)[picture]

        def part(right: Array, of: Array) -> float:
            """The percentage of the boxes ``of`` that are ``right``."""
            count = weights[of].sum()
            return 100 * float(weights[of & right].sum() / count) if count else np.nan

        every = np.ones(len(truth), bool)
        count = np.bincount(truth, weights=weights, minlength=classes)
        hits = np.bincount(truth, weights=weights * (rank == 0), minlength=classes)
        shown = count > 0
        return [
            Figure("top1", part(rank < 1, every), "%"),
            Figure("top5", part(rank < 5, every), "%"),
            Figure("mean of classes", 100 * float((hits[shown] / count[shown]).mean()) if shown.any() else np.nan, "%"),
            *(Figure(f"top1 {name}", part(rank < 1, (area >= low) & (area < high)), "%") for name, low, high in SIZES),
        ]

    return of


def together(samples: Samples, others: Samples, params: NoParams) -> Statistic:
    """The percentage of boxes for which both choose the same name, right or wrong."""
    same = samples.arrays["cosines"].argmax(axis=1) == others.arrays["cosines"].argmax(axis=1)
    picture = samples.arrays["picture"]

    def of(rows: Array) -> Sequence[Figure]:
        weights = np.bincount(rows, minlength=samples.count)[picture]
        count = weights.sum()
        return [Figure("agreement", 100 * float(weights[same].sum() / count) if count else np.nan, "%")]

    return of


EVALS.register("regions")(Eval("embed", DATA, NoParams, read, predict, score, together))
