"""Boxes and names on photographs with COCO instances, as COCO scores them.

Source: Lin et al. 2014 (arXiv 1405.0312) and its evaluation server: detections of one name, best first, each take
the free true box they overlap most, if by the threshold; precision, made non-increasing, is read at 101 recalls.
Data:   instances.json, images/.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from calmclip.export.evals import EVALS, Eval
from calmclip.export.evals._data import first
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Call, Flow
from calmclip.models.preprocess.image import decode
from calmclip.models.runner import Runner
from calmclip.models.tasks.detect import Detections, default_suppression

THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).round(2))
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100  # detections of one name in one picture
FLOOR = 0.001  # scores under it change no figure; the rule of the metric is to report nearly everything


@dataclass(frozen=True)
class Boxes:
    """Of one picture: ``boxes`` [n, 4] x0 y0 x1 y1 and ``classes`` [n]; ``scores`` [n] when found, else crowd flags.

    A crowd is one box around many: what falls into it counts neither for nor against.
    """

    boxes: Array
    classes: Array
    scores: Array
    crowd: Array

    @staticmethod
    def true(boxes: Array, classes: Array, crowd: Array | None = None) -> "Boxes":
        n = len(classes)
        none = np.zeros(n, bool)
        return Boxes(np.reshape(boxes, (n, 4)), np.asarray(classes), np.ones(n), none if crowd is None else crowd)

    @staticmethod
    def found(boxes: Array, classes: Array, scores: Array) -> "Boxes":
        n = len(classes)
        return Boxes(np.reshape(boxes, (n, 4)), np.asarray(classes), np.asarray(scores), np.zeros(n, bool))

    def of(self, name: int) -> "Boxes":
        """Those of one class, crowds last, best first."""
        rows = np.flatnonzero(self.classes == name)
        rows = rows[np.lexsort((-self.scores[rows], self.crowd[rows]))]
        return Boxes(self.boxes[rows], self.classes[rows], self.scores[rows], self.crowd[rows])


def overlaps(found: Array, true: Array, crowd: Array) -> Array:
    """[F, 4], [T, 4] -> IoU [F, T]; with a crowd the part of the found box that lies in it."""
    low = np.maximum(found[:, None, :2], true[None, :, :2])
    high = np.minimum(found[:, None, 2:], true[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0.0), axis=-1)
    own, other = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (found, true))
    union = np.where(crowd, own[:, None], own[:, None] + other - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def match(iou: Array, crowd: Array, threshold: float) -> Array:
    """IoU [F, T], rows best first, crowds last -> per found box 1 (true), 0 (false) or -1 (in a crowd: not counted)."""
    free = np.ones(len(crowd), bool)
    verdict = np.zeros(len(iou), np.int64)
    for row, values in enumerate(iou):
        for eligible, value in ((free & ~crowd, 1), (crowd, -1)):
            usable = np.where(eligible & (values >= threshold), values, -1.0)
            if usable.size and usable.max() > 0:
                best = usable.size - 1 - int(np.argmax(usable[::-1]))  # of equals the last, as COCO's code has it
                free[best] = bool(crowd[best])
                verdict[row] = value
                break
    return verdict


def average_precision(truth: Sequence[Boxes], found: Sequence[Boxes], thresholds: Sequence[float]) -> Array:
    """Per picture what is there and what was found -> mean AP [len(thresholds)] over the names that occur, 0 to 1."""
    names = sorted({int(c) for t in truth for c in t.classes[~t.crowd]})
    return np.mean([_one_name(truth, found, name, thresholds) for name in names], axis=0)


def _one_name(truth: Sequence[Boxes], found: Sequence[Boxes], name: int, thresholds: Sequence[float]) -> Array:
    scores: list[Array] = []
    verdicts: list[Array] = []
    total = 0
    for all_true, all_found in zip(truth, found, strict=True):
        true, hits = all_true.of(name), all_found.of(name)
        iou = overlaps(hits.boxes[:MOST], true.boxes, true.crowd)
        scores.append(hits.scores[:MOST])
        verdicts.append(np.array([match(iou, true.crowd, t) for t in thresholds]).reshape(len(thresholds), -1))
        total += int((~true.crowd).sum())
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return np.array([_area(row[order], total) for row in np.concatenate(verdicts, axis=1)])


def _area(verdict: Array, total: int) -> float:
    """Verdicts best first, ``total`` boxes to be found -> the mean of the precision at 101 recalls."""
    verdict = verdict[verdict >= 0]
    right = np.cumsum(verdict)
    precision = right / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(right / total, RECALLS, side="left")
    return float(np.append(envelope, 0.0)[np.minimum(at, len(envelope))].mean())


def recall(truth: Sequence[Boxes], proposals: Sequence[Array], threshold: float = 0.5) -> float:
    """The part of all true boxes, whatever their names, that some proposal of its picture overlaps, 0 to 1."""
    covered = [
        (overlaps(boxes, t.boxes, t.crowd) >= threshold).any(axis=0)[~t.crowd]
        for t, boxes in zip(truth, proposals, strict=True)
    ]
    return float(np.concatenate(covered).mean())


@dataclass(frozen=True)
class Instances:
    """A COCO instances file. ``truth``: per picture, classes as places in ``names``."""

    names: tuple[str, ...]
    pictures: tuple[Path, ...]
    truth: tuple[Boxes, ...]


def read_instances(data: Path) -> Instances:
    """``data``/instances.json and ``data``/images/. Raises `BadRequest` naming what is missing or wrong."""
    path = data / "instances.json"
    if not path.is_file():
        raise BadRequest(f"{path} is not there; the data directory must hold COCO's instances.json, and images/")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        place = {category["id"]: i for i, category in enumerate(content["categories"])}
        rows: dict[int, list[tuple[list[float], int, bool]]] = {image["id"]: [] for image in content["images"]}
        for one in content["annotations"]:
            x, y, w, h = one["bbox"]
            entry = ([x, y, x + w, y + h], place[one["category_id"]], bool(one.get("iscrowd", 0)))
            rows[one["image_id"]].append(entry)
        truth = tuple(
            Boxes.true(
                np.array([b for b, _, _ in r]), np.array([c for _, c, _ in r], int), np.array([k for *_, k in r], bool)
            )
            for r in rows.values()
        )
        names = tuple(category["name"] for category in content["categories"])
        pictures = tuple(data / "images" / image["file_name"] for image in content["images"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"{path} is not in COCO's instances form: {error!r}") from None
    return Instances(names, pictures, truth)


def measure(runner: Runner, data: Path, limit: int | None = None) -> Mapping[str, float]:
    """All names of the file as labels, then only those present in each picture, as a user would ask."""
    instances = read_instances(data)
    pictures, truth = first(instances.pictures, limit), first(instances.truth, limit)
    settings = replace(default_suppression(runner.bundle), min_score=FLOOR, max_output=MOST)
    every = np.arange(len(instances.names))

    def search(labels: Callable[[Boxes], Array]) -> Iterable[Boxes]:
        for picture, true in zip(pictures, truth, strict=True):
            asked = labels(true)
            if not len(asked):
                yield Boxes.found(np.empty((0, 4)), np.empty(0, int), np.empty(0))
                continue
            found = runner.detect(picture, [instances.names[i] for i in asked], suppression=settings)
            yield _boxes(found, asked)

    found = list(tqdm(search(lambda true: every), desc="all names", total=len(pictures), leave=False))
    present = list(
        tqdm(search(lambda true: np.unique(true.classes)), desc="names present", total=len(pictures), leave=False)
    )
    proposals = [runner.run(_propose(runner, picture.read_bytes())) for picture in pictures]
    by_threshold = average_precision(truth, found, THRESHOLDS)
    return {
        "AP50": 100 * float(by_threshold[0]),
        "AP50:95": 100 * float(by_threshold.mean()),
        "AP50 present names": 100 * float(average_precision(truth, present, (0.5,))[0]),
        "recall@100 boxes": 100 * recall(truth, proposals),
        "pictures": float(len(pictures)),
    }


def _propose(runner: Runner, image: bytes) -> Flow[Array]:
    """The boxes that the `regions` graph proposes, in the original's pixels."""
    preparer = runner.bundle.image("regions")
    pixels, frame = preparer.prepare(decode(image))
    regions = yield Call("regions", {preparer.spec.input: pixels})
    return frame.to_original(regions["boxes"][0][regions["objectness"][0] > 0])


def _boxes(found: Detections, labels: Array) -> Boxes:
    return Boxes.found(
        np.array([d.box for d in found], np.float64).reshape(-1, 4),
        labels[[d.index for d in found]] if len(found.detections) else np.empty(0, int),
        np.array([d.score for d in found]),
    )


EVALS.register("detection")(Eval(measure, read_instances, "detect", "instances.json (COCO form), images/"))
