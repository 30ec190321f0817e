"""Labelled pictures -> the temperature at which scores are calibrated, and the errors before and after.

Source: Guo et al. 2017 (arXiv 1706.04599): temperature scaling (section 4.2), expected calibration error (equation 3)
and negative log-likelihood (equation 6). Platt 1999 for targets that are not quite 1 and 0: with 1 and 0 the optimum is
a temperature of 0 if all pictures are classified right.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow, Together
from calmclip.models.heads import BoundHead
from calmclip.models.labels import MIN_PER_LABEL, MIN_PICTURES
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks.classify import chosen, logits

TEMPERATURES: list[float] = np.geomspace(0.01, 100, 401).tolist()  # steps of 2.3 %
BINS = 15  # of the calibration error, as in the paper's tables
LEAST = 1e-12  # a score of 0 would make the likelihood infinite


@dataclass(frozen=True)
class CalibrateRequest:
    """``truth``: for each picture the index of its label in the classifier's labels."""

    images: Sequence[Picture]
    truth: Sequence[int]
    classifier: Classifier


@dataclass(frozen=True)
class CalibrationErrors:
    """Of the scores of labelled pictures at one temperature.

    ``expected_calibration_error``: pictures are put into `BINS` bins of equal width by the score of their best label;
    the mean over pictures of |part that is right - mean score| of their bin, 0 to 1. ``negative_log_likelihood``: the
    mean over pictures of -ln of the probability that the head gives to the truth.
    """

    expected_calibration_error: float
    negative_log_likelihood: float


@dataclass(frozen=True)
class Calibration:
    """``before``: at the temperature that the classifier had; ``after``: at ``temperature``. Both on the pictures that
    chose it, so on others expect a little more."""

    temperature: float
    pictures: int
    before: CalibrationErrors
    after: CalibrationErrors


def calibrate(bundle: Bundle, request: CalibrateRequest) -> Flow[Calibration]:
    """Raises `BadRequest` as `require_pictures`, before it decodes a picture."""
    bundle.require("classify")
    classifier = chosen(bundle, request.classifier)
    require_pictures(classifier.labels, request.truth)
    rows = yield Together([logits(bundle, image, classifier) for image in request.images])
    return calibration(bundle, classifier, np.stack(rows), request.truth)


def require_pictures(labels: Sequence[str], truth: Sequence[int]) -> None:
    """Raises `BadRequest` for fewer than two labels, `MIN_PICTURES` pictures, or `MIN_PER_LABEL` of a label."""
    if len(labels) < 2:
        raise BadRequest(f"there are {len(labels)} labels; expected at least 2 to calibrate between")
    counts = Counter(truth)
    few = [f"{label!r} has {counts[i]}" for i, label in enumerate(labels) if counts[i] < MIN_PER_LABEL]
    if len(truth) < MIN_PICTURES or few:
        of_labels = f"; {', '.join(few[:5])}{', …' if len(few) > 5 else ''}" if few else ""
        raise BadRequest(
            f"{len(truth)} pictures for {len(labels)} labels were given{of_labels}; a temperature needs at least "
            f"{MIN_PICTURES} pictures in all and {MIN_PER_LABEL} of each label. Send more, that the head was not "
            "fitted to"
        )


def calibration(bundle: Bundle, classifier: Classifier, logits: Array, truth: Sequence[int]) -> Calibration:
    """``logits`` float [N, C] of the complete ``classifier``, before temperature; see `best_temperature`."""
    head, wide = classifier.bound, logits.astype(np.float64)
    temperature = best_temperature(wide, truth, head)
    before, after = (
        errors(head.scores(wide / t), truth, head.exclusive)
        for t in (classifier.temperature_for(bundle.family), temperature)
    )
    return Calibration(temperature, len(logits), before, after)


def best_temperature(logits: Array, truth: Sequence[int], head: BoundHead) -> float:
    """The element of `TEMPERATURES` with the least loss of ``head``'s scores; ``logits`` float64 [N, C].

    The targets are (N + 1) / (N + 2) for the truth, and 1 / (N + 2) for what is not true: for each other label if the
    head scores labels apart, else for all other labels together, so that a row's targets sum to 1.
    """
    targets = smoothed(truth, logits.shape[1], head.exclusive)
    best: float = min(TEMPERATURES, key=lambda t: losses(head.scores(logits / t), targets, head.exclusive).mean())
    return round(best, 4)


def smoothed(truth: Sequence[int] | Array, labels: int, exclusive: bool) -> Array:
    """The targets of `best_temperature`, float64 [N, labels]."""
    count = len(truth)
    targets = np.full((count, labels), 1 / (count + 2) / (max(labels - 1, 1) if exclusive else 1))
    targets[np.arange(count), truth] = (count + 1) / (count + 2)
    return targets


def errors(scores: Array, truth: Sequence[int], exclusive: bool) -> CalibrationErrors:
    """``scores`` float [N, C] in 0 .. 1; ``exclusive`` as `Head.exclusive`."""
    best, right = scores.max(axis=1), scores.argmax(axis=1) == np.asarray(truth)
    bins = np.clip(np.ceil(best * BINS).astype(np.int64) - 1, 0, BINS - 1)  # bin m holds (m / M, (m + 1) / M]
    gaps = np.abs(np.bincount(bins, weights=right - best, minlength=BINS))
    targets = np.eye(scores.shape[1])[np.asarray(truth)]
    loss = float(losses(scores, targets, exclusive).mean())
    return CalibrationErrors(float(gaps.sum() / len(scores)), loss)


def losses(scores: Array, targets: Array, exclusive: bool) -> Array:
    """The cross-entropy of each row, float64 [N]: of one distribution over the labels, or of each label by itself."""
    p = np.clip(scores, LEAST, 1 - LEAST)
    terms = targets * np.log(p)
    if not exclusive:
        terms += (1 - targets) * np.log1p(-p)
    rows: Array = -terms.sum(axis=1)
    return rows
