"""Detection: boxes and names on photographs with COCO instances, as COCO scores them.

Source: Lin et al. 2014 (arXiv 1405.0312) and its evaluation server: detections of one name, best first, each take the
free true box they overlap most, if by the threshold; precision, made non-increasing, is read at 101 recalls.
All names of the file are asked for as labels, then only those present in each picture, as a user would ask.

Data: instances.json (COCO's form), images/.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.datasets import first
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Figure, Line, NoParams, Plot, Samples, Statistic
from calmclip.models.evals.progress import progress
from calmclip.models.flow import Array, Flow
from calmclip.models.runner import Picture, Runner
from calmclip.models.tasks.detect import Detection, Suppression, default_suppression, find, propose

THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).round(2))
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100  # detections of one name in one picture
_KEYS = ("boxes", "classes", "scores", "crowd")
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
    iou: Array = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return iou


def match(iou: Array, crowd: Array, threshold: float) -> Array:
    """IoU [F, T], rows best first, crowds last -> per found box 1 (true), 0 (false) or -1 (in a crowd: not counted)."""
    free = np.ones(len(crowd), bool)
    verdict = np.zeros(len(iou), np.int8)
    for row in np.flatnonzero((iou >= threshold).any(axis=1)):
        values = iou[row]
        for eligible, value in ((free & ~crowd, 1), (crowd, -1)):
            usable = np.where(eligible & (values >= threshold), values, -1.0)
            if usable.size and usable.max() > 0:
                best = usable.size - 1 - int(np.argmax(usable[::-1]))  # of equals the last, as COCO's code has it
                free[best] = bool(crowd[best])
                verdict[row] = value
                break
    return verdict


class Matches:
    """What was found beside what is there, matched once; then the average precision of any pictures, each as often as
    one likes, is some sums.

    ``names``: classes that occur. ``picture`` int [K]: where each detection of them was found, sorted by name, then
    best first, pictures in order among equals; what counts twice stands twice in its place. ``total`` [N, C]: true
    boxes of each picture and name.
    """

    def __init__(self, truth: Sequence[Boxes], found: Sequence[Boxes], thresholds: Sequence[float]) -> None:
        self.names = sorted({int(c) for t in truth for c in t.classes[~t.crowd]})
        self.thresholds = len(thresholds)
        self.total = np.zeros((len(truth), len(self.names)), np.int64)
        pictures, verdicts = [np.empty(0, int)], [np.empty((len(thresholds), 0), np.int8)]
        starts = [0]
        for place, name in enumerate(self.names):
            rows = [_of_one(*pair, name, thresholds) for pair in zip(truth, found, strict=True)]
            self.total[:, place] = [count for _, _, count in rows]
            scores = np.concatenate([scores for scores, _, _ in rows])
            where = np.repeat(np.arange(len(rows)), [len(scores) for scores, _, _ in rows])
            order = np.argsort(-scores, kind="stable")
            pictures.append(where[order])
            verdicts.append(np.concatenate([verdict for _, verdict, _ in rows], axis=1)[:, order])
            starts.append(starts[-1] + len(order))
        self.picture, verdict = np.concatenate(pictures), np.concatenate(verdicts, axis=1)
        self._counted = (verdict >= 0).astype(np.int64)
        # of the right ones, at each threshold by name: which threshold, which detection, which of all T * C curves
        self._row, self._hit = np.nonzero(verdict == 1)
        column = np.searchsorted(starts, self._hit, side="right") - 1
        self._curve = self._row * len(self.names) + column
        self._before = np.array(starts)[column]  # detections of other names, which come first in the sums
        self._first = np.searchsorted(self._curve, np.arange(self.thresholds * len(self.names) + 1))

    def precision(self, weights: Array) -> tuple[Array, Array, Array]:
        """``weights`` int [N]: how often each picture counts -> for each right detection its curve [P], the best
        precision from there on [P], and how many of `RECALLS` read it [P]."""
        weight = weights[self.picture]
        counted = np.zeros((self.thresholds, len(weight) + 1), np.int64)
        np.cumsum(self._counted * weight, axis=1, out=counted[:, 1:])
        seen = counted[self._row, self._hit + 1] - counted[self._row, self._before]
        right = np.concatenate([[0], np.cumsum(weight[self._hit])])
        right = right[1:] - right[self._first[self._curve]]
        precision: Array = np.divide(right, seen, out=np.zeros(len(right)), where=seen > 0)
        # the maximum from the right, of each curve: the later a curve, the lower its numbers are lifted
        lift: Array = 2.0 * (self.thresholds * len(self.names) - self._curve)
        envelope = np.maximum.accumulate((precision + lift)[::-1])[::-1] - lift
        total = (weights @ self.total)[self._curve % len(self.names)] if self.names else weights[:0]
        recall: Array = np.divide(right, total, out=np.zeros(len(right)), where=total > 0)
        reads: Array = np.searchsorted(RECALLS, recall, side="right")
        earlier = np.concatenate([[0], reads[:-1]])
        earlier[self._first[:-1][np.diff(self._first) > 0]] = 0
        return self._curve, envelope, reads - earlier

    def average_precision(self, weights: Array) -> Array:
        """-> mean AP [T] over the names that occur in pictures of weight over 0, 0 to 1; NaN where none does."""
        curve, envelope, reads = self.precision(weights)
        there = (weights @ self.total) > 0
        areas: Array = np.bincount(curve, weights=envelope * reads, minlength=self.thresholds * len(self.names))
        areas = areas.reshape(self.thresholds, len(self.names))[:, there] / len(RECALLS)
        return areas.mean(axis=1) if there.any() else np.full(self.thresholds, np.nan)

    def curve(self) -> Array:
        """-> precision [101] at `RECALLS`, the first threshold, all pictures, the mean over names."""
        curve, envelope, reads = self.precision(np.ones(len(self.total), np.int64))
        found = np.zeros((len(self.names), len(RECALLS)))
        for name, row in enumerate(found):
            of = curve == name
            values = np.repeat(envelope[of], reads[of])
            row[: len(values)] = values  # recalls that are never reached read 0
        mean: Array = found.mean(axis=0)
        return mean


def _of_one(true: Boxes, found: Boxes, name: int, thresholds: Sequence[float]) -> tuple[Array, Array, int]:
    """Of one picture and name: scores [F] best first, verdicts [T, F], how many boxes are there."""
    true, hits = true.of(name), found.of(name)
    scores = hits.scores[:MOST]
    if not (len(true.boxes) and len(scores)):
        return scores, np.zeros((len(thresholds), len(scores)), np.int8), int((~true.crowd).sum())
    iou = overlaps(hits.boxes[:MOST], true.boxes, true.crowd)
    return scores, np.array([match(iou, true.crowd, t) for t in thresholds]), int((~true.crowd).sum())


def average_precision(truth: Sequence[Boxes], found: Sequence[Boxes], thresholds: Sequence[float]) -> Array:
    """Per picture what is there and what was found -> mean AP [len(thresholds)] over the names that occur, 0 to 1."""
    return Matches(truth, found, thresholds).average_precision(np.ones(len(truth), np.int64))


def covered(truth: Sequence[Boxes], proposals: Sequence[Array], threshold: float = 0.5) -> tuple[Array, Array]:
    """-> int [N], int [N]: the true boxes of each picture, whatever their names, that a proposal overlaps; and all."""
    hits = [
        np.any(overlaps(boxes, t.boxes[~t.crowd], t.crowd[~t.crowd]) >= threshold, axis=0)
        for t, boxes in zip(truth, proposals, strict=True)
    ]
    return np.array([int(hit.sum()) for hit in hits]), np.array([len(hit) for hit in hits])


@dataclass(frozen=True)
class Instances:
    """A data set. ``truth``: per picture, classes as places in ``names``."""

    names: Sequence[str]
    pictures: Sequence[Picture]
    truth: Sequence[Boxes]


def read(data: Path, params: NoParams, limit: int | None = None) -> Instances:
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
        truth = [
            Boxes.true(
                np.array([b for b, _, _ in r]), np.array([c for _, c, _ in r], int), np.array([k for *_, k in r], bool)
            )
            for r in rows.values()
        ]
        names = tuple(category["name"] for category in content["categories"])
        pictures = [data / "images" / image["file_name"] for image in content["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"{path} is not in COCO's instances form: {error!r}") from None
    return Instances(names, first(pictures, limit), first(truth, limit))


def predict(runner: Runner, data: Instances, params: NoParams) -> Samples:
    """Samples: `found`, `present` (only the names of each picture asked for), `proposals` and `truth`, each as
    NAME_boxes float [K, 4], NAME_classes, NAME_scores, NAME_crowd [K], and NAME_counts int64 [N] of each picture."""
    bundle = runner.bundle
    settings = replace(default_suppression(bundle), min_score=FLOOR, max_output=MOST)
    pictures = progress(data.pictures, f"detection {bundle.name}", "picture", len(data.pictures))
    flows = (
        _search(bundle, picture, data.names, np.unique(true.classes), settings)
        for picture, true in zip(pictures, data.truth, strict=True)
    )
    found, present, proposals = zip(*runner.map(flows), strict=True)
    sets = {"found": found, "present": present, "proposals": proposals, "truth": data.truth}
    arrays = {f"{name}_{key}": array for name, rows in sets.items() for key, array in _packed(rows).items()}
    return Samples({"pictures": len(found), "names": len(data.names)}, arrays, {"names": tuple(data.names)})


def _search(
    bundle: Bundle, picture: Picture, names: Sequence[str], present: Array, settings: Suppression
) -> Flow[tuple[Boxes, Boxes, Boxes]]:
    """-> what is found of all names, what of those present, and the proposals; the regions are computed once."""
    regions = yield from propose(bundle, Path(picture) if isinstance(picture, str) else picture)
    found = []
    for asked in (np.arange(len(names)), present):
        labels = [names[i] for i in asked.tolist()]
        hits = (yield from find(bundle, regions, labels, (), settings)) if labels else ()
        found.append(_boxes(hits, asked))
    count = len(regions.boxes)
    return found[0], found[1], Boxes.found(regions.boxes, np.zeros(count, np.int64), np.ones(count, np.float32))


def _boxes(found: Iterable[Detection], labels: Array) -> Boxes:
    rows = [*found]
    return Boxes.found(
        np.array([d.box for d in rows], np.float32).reshape(-1, 4),
        np.array([labels[d.index] for d in rows], np.int64),
        np.array([d.score for d in rows], np.float64),
    )


def _packed(rows: Iterable[Boxes]) -> Mapping[str, Array]:
    rows = [*rows]
    found = {key: np.concatenate([getattr(row, key) for row in rows]) for key in _KEYS}
    return {**found, "counts": np.array([len(row.classes) for row in rows], np.int64)}


def _unpacked(samples: Samples, name: str) -> list[Boxes]:
    ends = np.cumsum(samples.arrays[f"{name}_counts"])[:-1]
    parts = [np.split(samples.arrays[f"{name}_{key}"], ends) for key in _KEYS]
    return [Boxes(*each) for each in zip(*parts, strict=True)]


def score(samples: Samples, params: NoParams) -> Statistic:
    truth = _unpacked(samples, "truth")
    all_names = Matches(truth, _unpacked(samples, "found"), THRESHOLDS)
    present = Matches(truth, _unpacked(samples, "present"), THRESHOLDS[:1])
    hit, there = covered(truth, [row.boxes for row in _unpacked(samples, "proposals")])

    def of(rows: Array) -> Sequence[Figure]:
        weights = np.bincount(rows, minlength=samples.count)
        precision = all_names.average_precision(weights)
        count = there[rows].sum()
        return (
            Figure("AP50", 100 * float(precision[0]), "%"),
            Figure("AP50:95", 100 * float(precision.mean()), "%"),
            Figure("AP50 present names", 100 * float(present.average_precision(weights)[0]), "%"),
            Figure("recall@100 boxes", 100 * float(hit[rows].sum() / count) if count else np.nan, "%"),
        )

    return of


def plots(sides: Mapping[str, Samples], params: NoParams) -> Sequence[Plot]:
    lines = []
    for name, samples in sides.items():
        truth = _unpacked(samples, "truth")
        for key, what in (("found", "all names"), ("present", "names present")):
            lines.append(Line(f"{name}, {what}", RECALLS, Matches(truth, _unpacked(samples, key), (0.5,)).curve()))
    says = "Precision at each recall, at IoU 0.5, the mean over names: the area under a line is its AP50."
    return [Plot("Precision and recall", "recall", "precision", lines, says)]


EVALS.register("detection")(
    Eval("detect", "instances.json (COCO form), images/", NoParams, read, predict, score, plots=plots)
)
