"""Shared by evals of classifiers: samples of logits and truth -> top-1, top-5, calibration error, agreement.

Source: Guo et al. 2017 (arXiv 1706.04599), section 2, for the expected calibration error and the reliability diagram.
Samples: ``logits`` float32 [N, C], ``temperature`` [] of the bundle, ``truth`` int64 [N]; words ``labels`` [C],
and ``head``, which turns logits into scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.evals import Figure, Line, Plot, Samples, Statistic
from calmclip.models.flow import Array
from calmclip.models.heads import HEADS


class Scoring(FrozenModel):
    bins: int = Field(default=15, ge=1, le=1000, description="of the calibration error, of equal width")
    temperature: float | None = Field(
        default=None, gt=0, description="divides the logits before the scores are computed; None: the bundle's own"
    )


@dataclass(frozen=True)
class Judged:
    """For each picture [N]: the rank of the right label from 0, the score of the best label, and its bin."""

    rank: Array
    score: Array
    bin: Array

    @property
    def right(self) -> Array:
        first: Array = self.rank == 0
        return first


def judge(samples: Samples, params: Scoring) -> Judged:
    """Equal logits rank by index, as in `Runner.classify`."""
    logits, truth = samples.arrays["logits"], samples.arrays["truth"]
    target = logits[np.arange(len(truth)), truth][:, None]
    before = (logits > target) | ((logits == target) & (np.arange(logits.shape[1]) < truth[:, None]))
    (head,) = samples.words["head"]
    temperature = np.float32(params.temperature or samples.arrays["temperature"])
    scores = HEADS.get(head).scores(logits / temperature).max(axis=1).astype(np.float64)
    return Judged(before.sum(axis=1), scores, bins_of(scores, params.bins))


def bins_of(score: Array, bins: int) -> Array:
    """Bin m holds the scores in (m / bins, (m + 1) / bins]."""
    place: Array = np.clip(np.ceil(score * bins).astype(np.int64) - 1, 0, bins - 1)
    return place


def score(samples: Samples, params: Scoring) -> Statistic:
    judged = judge(samples, params)
    gap = judged.score - judged.right

    def of(rows: Array) -> Sequence[Figure]:
        rank = judged.rank[rows]
        apart = np.abs(np.bincount(judged.bin[rows], weights=gap[rows])).sum() / len(rows)
        return (
            Figure("top1", 100 * float((rank < 1).mean()), "%"),
            Figure("top5", 100 * float((rank < 5).mean()), "%"),
            Figure("calibration error", 100 * float(apart), "%"),
        )

    return of


def together(samples: Samples, others: Samples, params: Scoring) -> Statistic:
    """The percentage of pictures for which both have the same best label, right or wrong."""
    same = samples.arrays["logits"].argmax(axis=1) == others.arrays["logits"].argmax(axis=1)
    return lambda rows: (Figure("agreement", 100 * float(same[rows].mean()), "%"),)


def plots(sides: Mapping[str, Samples], params: Scoring) -> Sequence[Plot]:
    judged = {name: judge(samples, params) for name, samples in sides.items()}
    lines = [reliability(name, each.score, each.right, params.bins) for name, each in judged.items()]
    says = (
        "How often the best label is right, by how sure its score is. On the dashed line scores are as sure as they "
        "are right; below it they are too sure."
    )
    return [Plot("Reliability", "mean score of the best label", "part that is right", lines, says, diagonal=True)]


def reliability(name: str, score: Array, right: Array, bins: int) -> Line:
    """For each bin with pictures their mean score, and the part that is right."""
    place = bins_of(score, bins)
    count = np.bincount(place, minlength=bins)
    x, y = (np.bincount(place, each, bins)[count > 0] / count[count > 0] for each in (score, right))
    return Line(name, x, y)
