"""How well a score tells pictures of the labels from outliers.

Source: Hendrycks & Gimpel 2017 (arXiv 1610.02136) for the area under the ROC curve (`areas`); Liang et al. 2018 (arXiv
1706.02690), section 4.2, for the false positive rate at 95 % true positives (FPR@95).
"""

import numpy as np

from calmclip.models.evals.areas import Areas, Subset
from calmclip.models.flow import Array


class Separation:
    """Scores float [N], positive bool [N]; both are sorted once for many resamples. A higher score is more positive.

    ``copies`` float [N]: how often each counts. NaN without positive or without negative ones.
    """

    def __init__(self, scores: Array, positive: Array) -> None:
        self._areas = Areas([Subset(np.arange(len(scores)), scores, positive)], precise=0)
        distinct, self._place = np.unique(-scores, return_inverse=True)  # the highest score first
        self._size, self._positive = len(distinct), positive.astype(np.float64)

    def area(self, copies: Array) -> float:
        """The AUROC; a tie is half right."""
        return float(self._areas(copies).auroc[0])

    def false_positives(self, copies: Array, rate: float = 0.95) -> float:
        """The part of negative ones at or above the highest threshold that keeps ``rate`` of the positive ones."""
        kinds = (copies * self._positive, copies * (1 - self._positive))
        kept, wrong = (np.bincount(self._place, kind, self._size).cumsum() for kind in kinds)
        if not (kept[-1] and wrong[-1]):
            return float("nan")
        threshold = int(np.argmax(kept >= rate * kept[-1] - 1e-9))  # whole numbers; the product may be rounded up
        return float(wrong[threshold] / wrong[-1])
