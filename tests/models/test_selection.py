"""The params of a fit: stratified folds, and the search by hand-made heads."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array
from calmclip.models.heads import HEADS, Columns, Examples, Fit, Head
from calmclip.models.heads.cosine import softmax
from calmclip.models.selection import choose, folds

LABELS = ("a", "b", "c")


def examples(counts: tuple[int, ...] = (10, 10, 10), dim: int = 8) -> Examples:
    draw = np.random.default_rng(2)  # one temperature for all values would choose others
    truth = np.repeat(np.arange(3), counts)
    image = draw.standard_normal((len(truth), dim)) + 2 * np.eye(3, dim)[truth]
    image = (image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float32)
    return Examples(image, truth, LABELS, np.eye(3, dim, dtype=np.float32), 10.0)


@pytest.mark.parametrize(
    ("counts", "number"), [((10, 10, 10), 5), ((7, 5, 6), 5), ((4, 4, 4), 4), ((4, 2, 1), 4), ((12, 1, 1), 5)]
)
def test_each_picture_is_held_out_once_and_the_only_one_of_a_label_never(counts: tuple[int, ...], number: int):
    shown = examples(counts)
    splits, measured = folds(shown)
    assert measured == f"{number}-fold cross-validation"
    assert len(splits) == number
    held = np.concatenate([split.image for split in splits])
    expected = shown.image[np.array(counts)[shown.truth] > 1]
    assert sorted(held.tolist()) == sorted(expected.tolist())
    for split in splits:
        together = np.concatenate([split.image, split.shown.image])
        assert sorted(together.tolist()) == sorted(shown.image.tolist())
        assert (np.bincount(split.shown.truth, minlength=3) > 0).all()
        per_label = np.bincount(split.truth, minlength=3)
        assert (per_label <= np.ceil(np.array(counts) / number)).all()


def test_views_of_a_held_picture_are_not_shown():
    shown = examples((4, 4, 4))
    views = np.arange(12 * 2 * 8, dtype=np.float32).reshape(12, 2, 8)
    shown = replace(shown, views=views, captions=shown.image[::-1])
    for split in folds(shown)[0]:
        held = [int(np.flatnonzero((shown.image == row).all(axis=1))[0]) for row in split.image]
        kept = [i for i in range(12) if i not in held]
        rows = [row for i in kept for row in (shown.image[i], *views[i])]
        assert split.shown.image.tolist() == np.stack(rows).tolist()
        assert split.shown.truth.tolist() == np.repeat(shown.truth[kept], 3).tolist()
        assert split.shown.captions is not None
        assert split.shown.captions.tolist() == np.repeat(shown.image[::-1][kept], 3, axis=0).tolist()
        assert split.shown.views is None


class Params(FrozenModel):
    near: float | None = None
    sharp: float | None = None
    power: float | None = None


FITS: list[float | None] = []


def logits(image: Array, columns: Columns, params: Params) -> Array:
    """Affine in `near` and `sharp`, not in `power`."""
    cosines, means = image @ columns.text.T, image @ columns.assets["means"].T
    return cosines + np.float32(params.near or 0) * means + np.float32(params.sharp or 0) * np.sign(means) ** 2 * means


def assets(shown: Examples, params: Params) -> dict[str, Array]:
    FITS.append(params.power)
    sums = np.eye(3)[shown.truth].T @ shown.image
    return {"means": (np.sign(sums) * np.abs(sums) ** (params.power or 1)).astype(np.float32)}


GRID = {"near": (0.0, 0.5, 4.0), "sharp": (0.0, 1.0), "power": (0.5, 1.0, 3.0)}


def head(**fit: Any) -> Head[Params]:
    return Head(Params, logits, softmax, fit=Fit(assets, lambda shown: GRID, ("power",), **fit))


@pytest.mark.parametrize("affine", [(), ("near",), ("near", "sharp")])
def test_the_search_finds_the_best_of_all_combinations(affine: tuple[str, ...]):
    """Each combination by itself: the loss at the best of the temperatures, over the same folds."""
    shown = examples()
    losses, right = {}, {}
    for near, sharp, power in product(*GRID.values()):
        params = Params(near=near, sharp=sharp, power=power)
        loss, hits = np.zeros(6), 0
        for split in folds(shown)[0]:
            columns = Columns(LABELS, shown.text, assets(split.shown, params))
            rows = logits(split.image, columns, params).astype(np.float64)
            hits += int((rows.argmax(axis=1) == split.truth).sum())
            for i, part in enumerate((0.125, 0.25, 0.5, 1, 2, 4)):
                z = rows / (part * rows.std(axis=1).mean())
                loss[i] += (np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), split.truth]).sum()
        losses[params], right[params] = loss.min(), hits
    FITS.clear()
    choice = choose(head(affine=affine), Params(), shown)
    assert choice.params == min(losses, key=lambda params: losses[params])
    assert choice.after == right[choice.params] / 30
    zero_shot = (shown.image @ shown.text.T).argmax(axis=1) == shown.truth
    assert choice.before == zero_shot.mean()
    assert sorted(FITS) == sorted([*GRID["power"]] * 5)  # once for each fold and power, whatever the others


def test_a_param_of_the_caller_stays_and_a_tie_goes_to_the_smallest():
    choice = choose(head(affine=("near",)), Params(power=3.0, near=4.0), examples())
    assert (choice.params.power, choice.params.near) == (3.0, 4.0)
    assert choice.params.sharp in GRID["sharp"]
    constant = Head(
        Params, lambda image, columns, params: image @ columns.text.T, softmax, fit=head().fit
    )  # every combination is the same
    assert choose(constant, Params(), examples()).params == Params(near=0.0, sharp=0.0, power=0.5)


def test_without_a_picture_to_hold_out_the_middle_values_are_taken():
    choice = choose(head(), Params(), examples((1, 1, 1)))
    assert choice.params == Params(near=0.5, sharp=1.0, power=1.0)
    assert (choice.before, choice.after, choice.measured) == (None, None, "nothing: no label has two pictures")


def test_validation_pictures_choose_and_measure():
    """All pictures are shown, and the labels of the validation are turned, so that nothing is right before."""
    shown, gda = examples(), HEADS.get("gda")
    turned = ((shown.truth + 1) % 3).astype(np.int64)
    asked = replace(shown, truth=turned)
    choice = choose(gda, gda.params(), asked, (shown.image, turned))
    assert choice.measured == "validation"
    assert choice.before == ((shown.image @ shown.text.T).argmax(axis=1) == turned).mean()
    assert choice.before < 0.3
    assert choice.after is not None
    assert choice.after > 0.6


def test_logits_of_many_values_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch):
    whole = choose(head(affine=("near", "sharp")), Params(), examples())
    monkeypatch.setattr("calmclip.models.selection.AT_ONCE", 40)
    assert choose(head(affine=("near", "sharp")), Params(), examples()) == whole
