"""Average precision of boxes as COCO computes it.

Source: Lin et al. 2014 (arXiv 1405.0312) and its evaluation code. The detections of one class, best first, each match
the free true box with the highest IoU, if it reaches the threshold. Precision, made non-increasing, is read at 101
recalls.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calmclip.models.flow import Array

THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).round(2))
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100  # detections of one class in one picture


@dataclass(frozen=True)
class Boxes:
    """Boxes of one picture: ``boxes`` [n, 4] x0 y0 x1 y1, ``classes``, ``scores`` and ``crowd`` flags [n].

    True boxes have score 1, detections have no crowd flag. A crowd is one box around many objects: a detection in it
    counts neither as right nor as wrong.
    """

    boxes: Array
    classes: Array
    scores: Array
    crowd: Array

    @staticmethod
    def true(boxes: Array, classes: Array, crowd: Array | None = None) -> "Boxes":
        n = len(classes)
        crowd = np.zeros(n, bool) if crowd is None else crowd
        return Boxes(np.reshape(boxes, (n, 4)), np.asarray(classes), np.ones(n), crowd)

    @staticmethod
    def detected(boxes: Array, classes: Array, scores: Array) -> "Boxes":
        n = len(classes)
        return Boxes(np.reshape(boxes, (n, 4)), np.asarray(classes), np.asarray(scores), np.zeros(n, bool))

    def of(self, name: int) -> "Boxes":
        """The boxes of one class: crowds last, else by descending score."""
        rows = np.flatnonzero(self.classes == name)
        rows = rows[np.lexsort((-self.scores[rows], self.crowd[rows]))]
        return Boxes(self.boxes[rows], self.classes[rows], self.scores[rows], self.crowd[rows])


def overlaps(detected: Array, true: Array, crowd: Array) -> Array:
    """[D, 4], [T, 4] -> IoU [D, T]; for a crowd, the fraction of the detection that lies in it."""
    low = np.maximum(detected[:, None, :2], true[None, :, :2])
    high = np.minimum(detected[:, None, 2:], true[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0.0), axis=-1)
    detected_area, true_area = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (detected, true))
    union = np.where(crowd, detected_area[:, None], detected_area[:, None] + true_area - shared)
    iou: Array = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return iou


def match(iou: Array, crowd: Array, threshold: float) -> Array:
    """IoU [D, T], rows best first, crowds last -> [D]: 1 (right), 0 (wrong) or -1 (in a crowd, not counted)."""
    free = np.ones(len(crowd), bool)
    verdict = np.zeros(len(iou), np.int8)
    for row in np.flatnonzero((iou >= threshold).any(axis=1)):
        values = iou[row]
        for eligible, value in ((free & ~crowd, 1), (crowd, -1)):
            usable = np.where(eligible & (values >= threshold), values, -1.0)
            if usable.size and usable.max() > 0:
                best = usable.size - 1 - int(np.argmax(usable[::-1]))  # the last of equals, as in COCO's code
                free[best] = bool(crowd[best])
                verdict[row] = value
                break
    return verdict


class Matches:
    """Detections matched to true boxes once, so that the average precision of any weighting of pictures is a few sums.

    ``names``: the classes that occur. ``picture`` int [K]: the picture of each detection of these classes, sorted by
    class, then by descending score, then by picture. ``total`` [N, C]: true boxes of each picture and class.
    """

    def __init__(self, truth: Sequence[Boxes], detected: Sequence[Boxes], thresholds: Sequence[float]) -> None:
        self.names = sorted({int(c) for t in truth for c in t.classes[~t.crowd]})
        self.thresholds = len(thresholds)
        self.total = np.zeros((len(truth), len(self.names)), np.int64)
        pictures, verdicts = [np.empty(0, int)], [np.empty((len(thresholds), 0), np.int8)]
        starts = [0]
        for place, name in enumerate(self.names):
            rows = [_of_one(*pair, name, thresholds) for pair in zip(truth, detected, strict=True)]
            self.total[:, place] = [count for _, _, count in rows]
            scores = np.concatenate([scores for scores, _, _ in rows])
            picture = np.repeat(np.arange(len(rows)), [len(scores) for scores, _, _ in rows])
            order = np.argsort(-scores, kind="stable")
            pictures.append(picture[order])
            verdicts.append(np.concatenate([verdict for _, verdict, _ in rows], axis=1)[:, order])
            starts.append(starts[-1] + len(order))
        self.picture, verdict = np.concatenate(pictures), np.concatenate(verdicts, axis=1)
        self._counted = (verdict >= 0).astype(np.int64)
        # for each right detection at each threshold: its threshold, its index, and its curve (one of T * C)
        self._row, self._hit = np.nonzero(verdict == 1)
        column = np.searchsorted(starts, self._hit, side="right") - 1
        self._curve = self._row * len(self.names) + column
        self._before = np.array(starts)[column]  # detections of earlier classes
        self._first = np.searchsorted(self._curve, np.arange(self.thresholds * len(self.names) + 1))

    def precision(self, weights: Array) -> tuple[Array, Array, Array]:
        """``weights`` int [N]: how often each picture counts -> for each right detection [P]: its curve, the best
        precision at its recall or above, and the number of `RECALLS` that read this precision."""
        weight = weights[self.picture]
        counted = np.zeros((self.thresholds, len(weight) + 1), np.int64)
        np.cumsum(self._counted * weight, axis=1, out=counted[:, 1:])
        ranked = counted[self._row, self._hit + 1] - counted[self._row, self._before]
        right = np.concatenate([[0], np.cumsum(weight[self._hit])])
        right = right[1:] - right[self._first[self._curve]]
        precision: Array = np.divide(right, ranked, out=np.zeros(len(right)), where=ranked > 0)
        # a running maximum from the right, per curve: the lift keeps each curve above all later curves
        lift: Array = 2.0 * (self.thresholds * len(self.names) - self._curve)
        envelope = np.maximum.accumulate((precision + lift)[::-1])[::-1] - lift
        total = (weights @ self.total)[self._curve % len(self.names)] if self.names else weights[:0]
        recall: Array = np.divide(right, total, out=np.zeros(len(right)), where=total > 0)
        reads: Array = np.searchsorted(RECALLS, recall, side="right")
        earlier = np.concatenate([[0], reads[:-1]])
        earlier[self._first[:-1][np.diff(self._first) > 0]] = 0
        return self._curve, envelope, reads - earlier

    def average_precision(self, weights: Array) -> Array:
        """-> mean AP [T], 0 to 1, over the classes in pictures with a weight above 0; NaN if there are none."""
        curve, envelope, reads = self.precision(weights)
        occurs = (weights @ self.total) > 0
        areas: Array = np.bincount(curve, weights=envelope * reads, minlength=self.thresholds * len(self.names))
        areas = areas.reshape(self.thresholds, len(self.names))[:, occurs] / len(RECALLS)
        return areas.mean(axis=1) if occurs.any() else np.full(self.thresholds, np.nan)

    def curve(self) -> Array:
        """-> precision [101] at `RECALLS` for the first threshold and all pictures, the mean over classes."""
        curve, envelope, reads = self.precision(np.ones(len(self.total), np.int64))
        curves = np.zeros((len(self.names), len(RECALLS)))
        for name, row in enumerate(curves):
            hits = curve == name
            values = np.repeat(envelope[hits], reads[hits])
            row[: len(values)] = values  # precision is 0 at recalls that are never reached
        mean: Array = curves.mean(axis=0)
        return mean


def _of_one(true: Boxes, detected: Boxes, name: int, thresholds: Sequence[float]) -> tuple[Array, Array, int]:
    """For one picture and class: scores [D] best first, verdicts [T, D], the number of true boxes."""
    true, detected = true.of(name), detected.of(name)
    scores, count = detected.scores[:MOST], int((~true.crowd).sum())
    if not (len(true.boxes) and len(scores)):
        return scores, np.zeros((len(thresholds), len(scores)), np.int8), count
    iou = overlaps(detected.boxes[:MOST], true.boxes, true.crowd)
    return scores, np.array([match(iou, true.crowd, t) for t in thresholds]), count


def covered(truth: Sequence[Boxes], proposals: Sequence[Array], threshold: float = 0.5) -> tuple[Array, Array]:
    """-> int [N], int [N]: the number of true boxes per picture, of any class, that a proposal overlaps; and of all."""
    hits = [
        np.any(overlaps(boxes, t.boxes[~t.crowd], t.crowd[~t.crowd]) >= threshold, axis=0)
        for t, boxes in zip(truth, proposals, strict=True)
    ]
    return np.array([int(hit.sum()) for hit in hits]), np.array([len(hit) for hit in hits])
