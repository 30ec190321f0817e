"""How well a group can be read from the pictures' vectors: a linear probe, cross-validated.

Source: Alain & Bengio 2016 (arXiv 1610.01644) for linear probes; the protocol of TheoSourget/clip_cxr_fairness, which
sets them beside principal components. The solver is scikit-learn's, of the extra `eval`.

A picture's answer comes from a probe that did not see it. Probes are fitted once; the bootstrap resamples their
answers, so an interval does not hold the variance of another fit.

Cost: O(folds x pictures x D x iterations) for each column of groups.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from calmclip.models.extras import missing
from calmclip.models.flow import Array

FOLDS = 5
COMPONENTS = 2  # of a plot of principal components
C = 0.1  # inverse of the L2 penalty, on standardized columns
ITERATIONS = 300


@dataclass(frozen=True)
class Answers:
    """``places`` int [n]: the pictures. For each of them ``group`` int [n], from 0, and ``logits`` [n, G]."""

    places: Array
    group: Array
    logits: Array

    @property
    def right(self) -> Array:
        """bool [n]: the group with the highest logit is the picture's."""
        same: Array = self.logits.argmax(axis=1) == self.group
        return same


def require() -> None:
    """Raises `ExtraMissing` without scikit-learn."""
    if not find_spec("sklearn"):
        raise missing("the probe of 'subgroups' (--param probe=0 leaves it out)", "scikit-learn", "eval")


def chosen(group: Array, most: int, seed: int) -> Array:
    """Places of at most ``most`` pictures with a group (``group`` int [N], -1: none), drawn by ``seed``, sorted."""
    places = np.flatnonzero(group >= 0)
    if len(places) <= most:
        return places
    return np.sort(np.random.default_rng(seed).permutation(places)[:most])


def probed(vectors: Array, places: Array, group: Array, seed: int) -> Answers:
    """vectors float [n, D] of the pictures at ``places`` int [n] -> answers of probes fitted to the other folds.

    ``group`` int [n], from 0: each of at least two groups has at least `FOLDS` pictures. Groups weigh the same, of
    whatever size. Raises `ExtraMissing`.
    """
    require()
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=ITERATIONS, class_weight="balanced"))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    logits = cross_val_predict(probe, vectors.astype(np.float64), group, cv=folds, method="decision_function")
    if logits.ndim == 1:  # of two groups it has the second one's log-odds
        logits = np.stack([-logits, logits], axis=1) / 2
    return Answers(places, group, logits)


def components(vectors: Array) -> tuple[Array, float]:
    """vectors float [n, D] -> their first principal components [n, 2], and the share of the variance in them."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    powers = sizes**2
    share = float(powers[:COMPONENTS].sum() / powers.sum()) if powers.sum() else 0.0
    return left[:, :COMPONENTS] * sizes[:COMPONENTS], share
