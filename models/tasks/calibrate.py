"""Pictures whose labels are known -> the temperature with which scores are as sure as they are right.

Source: Guo et al. 2017 (arXiv 1706.04599), temperature scaling; Platt 1999 for targets of (N + 1) / (N + 2) and
1 / (N + 2) instead of 1 and 0, without which pictures that are all told right would ask for a temperature of 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks.classify import LogitsRequest, chosen, logits

TEMPERATURES: list[float] = np.geomspace(
    0.01, 100, 401
).tolist()  # steps of 2.3 %, closer than a few hundred pictures can tell


@dataclass(frozen=True)
class CalibrateRequest:
    """``truth``: for each picture the place of its label among the classifier's."""

    images: Sequence[Picture]
    truth: Sequence[int]
    classifier: Classifier


def calibrate(bundle: Bundle, request: CalibrateRequest) -> Flow[float]:
    """Raises `BadRequest` for fewer than two labels: there is nothing to be unsure between."""
    bundle.require("classify")
    classifier = chosen(bundle, request.classifier)
    require_two(classifier.labels)
    rows = []
    for image in request.images:
        rows.append((yield from logits(bundle, LogitsRequest(image, classifier=classifier))))
    return best_temperature(np.stack(rows), request.truth, classifier.bound.scores)


def require_two(labels: Sequence[str]) -> None:
    """Raises `BadRequest` for fewer than two labels."""
    if len(labels) < 2:
        raise BadRequest(f"there are {len(labels)} labels; expected at least 2 to calibrate between")


def best_temperature(logits: Array, truth: Sequence[int], scores: Callable[[Array], Array]) -> float:
    """The one of `TEMPERATURES` with the least log loss; ``logits`` float [N, C], ``scores`` of the head."""
    count = len(logits)
    targets = np.full(logits.shape, 1 / (count + 2))
    targets[np.arange(count), truth] = (count + 1) / (count + 2)

    def loss(temperature: float) -> float:
        sure = np.clip(scores(logits.astype(np.float64) / temperature), 1e-12, 1 - 1e-12)
        return float(-(targets * np.log(sure) + (1 - targets) * np.log1p(-sure)).mean())

    best: float = min(TEMPERATURES, key=loss)
    return round(best, 4)
