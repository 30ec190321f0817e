"""The params of a fit, chosen by its own pictures: cross-validation, or pictures that are kept for validation.

Source: Hastie, Tibshirani, Friedman 2009, The Elements of Statistical Learning, section 7.10 (K-fold cross-validation);
         Kohavi 1995 (IJCAI), section 3 (stratified folds).

The best values have the lowest negative log-likelihood, at the best temperature of each; ties go to the smaller value.
Accuracy chooses worse: of fifty pictures it takes few values, so that chance decides (figures in docs/performance.md).
The accuracy of a choice is measured on the pictures that chose it, so on other pictures expect a little less.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Generic, TypeVar

import numpy as np

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array, Arrays
from calmclip.models.heads import Columns, Examples, Fit, Head

P = TypeVar("P", bound=FrozenModel)
FOLDS = 5
AT_ONCE = 2**20  # logits that are scored together: 4 MiB
LEAST = 1e-30  # of a score, whose logarithm is summed
TEMPERATURES = 2.0 ** np.arange(-3, 3)  # times the deviation of the logits


@dataclass(frozen=True)
class Split:
    """Fit on ``shown``, measure on ``image`` float32 [N, D] and ``truth`` int64 [N]."""

    shown: Examples
    image: Array
    truth: Array


@dataclass(frozen=True)
class Choice(Generic[P]):
    """``params`` without a None. ``before`` and ``after``: the accuracy of zero-shot and of the fitted head on the same
    pictures; None if no picture could be held out. ``measured``: on which pictures."""

    params: P
    before: float | None
    after: float | None
    measured: str


def choose(head: Head[P], params: P, examples: Examples, validation: tuple[Array, Array] | None = None) -> Choice[P]:
    """``validation``: image float32 [N, D] unit rows and truth int64 [N]; None: folds of ``examples``."""
    assert head.fit is not None
    grid = {key: values for key, values in head.fit.grid(examples).items() if getattr(params, key) is None}
    if validation:
        splits, measured = [Split(examples.spread, *validation)], "validation"
    else:
        splits, measured = folds(examples)
    if not splits:
        middle = {key: values[len(values) // 2] for key, values in grid.items()}
        return Choice(params.model_copy(update=middle), None, None, measured)
    count = sum(len(split.truth) for split in splits)
    before = sum(int((_zero_shot(split) == split.truth).sum()) for split in splits)
    best, right = _search(head, head.fit, params, grid, splits)
    return Choice(best, before / count, right / count, measured)


def folds(examples: Examples) -> tuple[list[Split], str]:
    """`FOLDS` stratified folds, or as many as the largest label has pictures; and their name.

    A label with fewer pictures is in as many folds as it has pictures. The only picture of a label is always shown.
    """
    counts = np.bincount(examples.truth, minlength=len(examples.labels))
    count = min(FOLDS, int(counts.max()))
    if count < 2:
        return [], "nothing: no label has two pictures"
    shuffled = np.random.default_rng(0).permutation(len(examples.truth))
    order = shuffled[np.argsort(examples.truth[shuffled], kind="stable")]
    fold = np.empty(len(order), np.int64)
    fold[order] = np.arange(len(order)) % count  # the pictures of a label are neighbours, so in different folds
    fold[counts[examples.truth] == 1] = -1
    held = [fold == number for number in range(count)]
    splits = [Split(examples.only(~mask).spread, examples.image[mask], examples.truth[mask]) for mask in held]
    return [split for split in splits if len(split.truth)], f"{count}-fold cross-validation"


def _zero_shot(split: Split) -> Array:
    best: Array = (split.image @ split.shown.text.T).argmax(axis=1)
    return best


def _search(
    head: Head[P], fit: Fit[P], params: P, grid: Mapping[str, Sequence[float]], splits: Sequence[Split]
) -> tuple[P, int]:
    """The best params, and the number of pictures that they classify right."""
    outer = [name for name in grid if name not in fit.affine]
    inner = [name for name in grid if name in fit.affine]
    weights = [*product(*(grid[name] for name in inner))]
    combinations = [*product(*(grid[name] for name in outer))]
    right = np.zeros((len(combinations), len(weights)), np.int64)
    loss = np.zeros((*right.shape, len(TEMPERATURES)))
    for split in splits:
        fitted: dict[tuple[Any, ...], Arrays] = {}
        for row, values in enumerate(combinations):
            changed = params.model_copy(update=dict(zip(outer, values, strict=True)) | dict.fromkeys(inner, 0.0))
            key = tuple(getattr(changed, name) for name in fit.fitted)
            if key not in fitted:
                fitted[key] = fit.assets(split.shown, changed)
            columns = Columns(split.shown.labels, split.shown.text, fitted[key])
            parts = _parts(head, split.image, columns, changed, inner)
            for start, logits in _combined(parts, weights):
                end = start + len(logits)
                right[row, start:end] += (logits.argmax(axis=2) == split.truth).sum(axis=1)
                loss[row, start:end] += _losses(head, logits, split.truth)
    row, column = divmod(int(loss.min(axis=2).argmin()), len(weights))  # a tie goes to the first, the smallest
    chosen = dict(zip([*outer, *inner], (*combinations[row], *weights[column]), strict=True))
    return params.model_copy(update=chosen), int(right[row, column])


def _parts(head: Head[P], image: Array, columns: Columns, params: P, inner: Sequence[str]) -> list[Array]:
    """Logits [N, C] at 0 of all affine params, and what a 1 of each of them adds."""
    base = head.logits(image, columns, params)
    steps = (head.logits(image, columns, params.model_copy(update={name: 1.0})) - base for name in inner)
    return [base, *steps]


def _combined(parts: Sequence[Array], weights: Sequence[Sequence[float]]) -> Iterator[tuple[int, Array]]:
    """Logits [A, N, C] of as many of the ``weights`` as fit together, and the index of the first of these."""
    base, *steps = parts
    many = max(1, AT_ONCE // base.size)
    for start in range(0, len(weights), many):
        some = np.array(weights[start : start + many], np.float32)
        logits = np.broadcast_to(base, (len(some), *base.shape)).copy()
        for weight, step in zip(some.T, steps, strict=True):
            logits += weight[:, None, None] * step
        yield start, logits


def _losses(head: Head[P], logits: Array, truth: Array) -> Array:
    """float64 [A, T]: the sum over the pictures of -ln of the score of the truth, at each of `TEMPERATURES`; ``logits``
    [A, N, C]."""
    spread = np.maximum(logits.std(axis=2).mean(axis=1), LEAST)[:, None, None]
    losses = np.empty((len(logits), len(TEMPERATURES)))
    for index, temperature in enumerate(TEMPERATURES.astype(np.float32)):
        scores = head.scores((logits / (spread * temperature)).reshape(-1, logits.shape[2])).reshape(logits.shape)
        of_truth = np.maximum(scores[:, np.arange(len(truth)), truth], LEAST)
        losses[:, index] = -np.log(of_truth.astype(np.float64)).sum(axis=1)
    return losses
