"""Labelled pictures -> the temperature at which scores are calibrated.

Source: Guo et al. 2017 (arXiv 1706.04599), temperature scaling; Platt 1999 for targets of (N + 1) / (N + 2) and
1 / (N + 2) instead of 1 and 0. With 1 and 0 the optimum is a temperature of 0 if all pictures are classified right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow
from calmclip.models.preprocess.image import Picture
from calmclip.models.tasks.classify import chosen, logits

TEMPERATURES: list[float] = np.geomspace(0.01, 100, 401).tolist()  # steps of 2.3 %


@dataclass(frozen=True)
class CalibrateRequest:
    """``truth``: for each picture the index of its label in the classifier's labels."""

    images: Sequence[Picture]
    truth: Sequence[int]
    classifier: Classifier


def calibrate(bundle: Bundle, request: CalibrateRequest) -> Flow[float]:
    """Raises `BadRequest` for fewer than two labels."""
    bundle.require("classify")
    classifier = chosen(bundle, request.classifier)
    require_two(classifier.labels)
    rows = []
    for image in request.images:
        rows.append((yield from logits(bundle, image, classifier)))
    return best_temperature(np.stack(rows), request.truth, classifier.bound.scores)


def require_two(labels: Sequence[str]) -> None:
    """Raises `BadRequest` for fewer than two labels."""
    if len(labels) < 2:
        raise BadRequest(f"there are {len(labels)} labels; expected at least 2 to calibrate between")


def best_temperature(logits: Array, truth: Sequence[int], scores: Callable[[Array], Array]) -> float:
    """The element of `TEMPERATURES` with the lowest log loss; ``logits`` float [N, C], ``scores`` of the head."""
    count = len(logits)
    targets = np.full(logits.shape, 1 / (count + 2))
    targets[np.arange(count), truth] = (count + 1) / (count + 2)

    def loss(temperature: float) -> float:
        p = np.clip(scores(logits.astype(np.float64) / temperature), 1e-12, 1 - 1e-12)
        return float(-(targets * np.log(p) + (1 - targets) * np.log1p(-p)).mean())

    best: float = min(TEMPERATURES, key=loss)
    return round(best, 4)
