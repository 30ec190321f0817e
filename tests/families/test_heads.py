"""The contract of every head there is: a new one is under test the moment it is registered."""

import sys
from typing import Any

import numpy as np
import pytest

from calmclip.models.errors import BundleInvalid, UnknownName
from calmclip.models.heads import HEADS, BoundHead

B, C, D = 4, 5, 16


def rows(count: int, seed: int) -> np.ndarray:
    """float32 [count, D], unit rows."""
    found = np.random.default_rng(seed).standard_normal((count, D))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


IMAGE, TEXT = rows(B, 1), rows(C, 2)


def bound(name: str) -> BoundHead:
    return HEADS.get(name).bind({}, {})


@pytest.fixture(params=HEADS.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_shapes_and_ranges_hold(name: str):
    head = bound(name)
    logits = head.logits(IMAGE, TEXT)
    scores = head.scores(logits)
    for array in (logits, scores):
        assert (array.shape, array.dtype) == ((B, C), np.float32)
        assert np.isfinite(array).all()
    assert scores.min() >= 0
    assert scores.max() <= 1


def test_the_same_input_gives_the_same_bytes(name: str):
    once, twice = bound(name), bound(name)
    assert once.logits(IMAGE, TEXT).tobytes() == twice.logits(IMAGE, TEXT).tobytes()
    logits = once.logits(IMAGE, TEXT)
    assert once.scores(logits).tobytes() == twice.scores(logits.copy()).tobytes()


def test_inputs_are_left_as_they_were(name: str):
    image, text = IMAGE.copy(), TEXT.copy()
    logits = bound(name).logits(image, text)
    kept = logits.copy()
    bound(name).scores(logits)
    for before, after in ((IMAGE, image), (TEXT, text), (kept, logits)):
        assert np.array_equal(before, after)


def test_permuted_classes_permute_the_columns(name: str):
    order = np.random.default_rng(3).permutation(C)
    head = bound(name)
    logits = head.logits(IMAGE, TEXT)
    assert head.logits(IMAGE, TEXT[order]) == pytest.approx(logits[:, order], abs=1e-4)
    assert head.scores(logits[:, order]) == pytest.approx(head.scores(logits)[:, order], abs=1e-6)


def test_a_row_depends_on_that_row_alone(name: str):
    head = bound(name)
    for i in range(B):
        assert head.logits(IMAGE[i : i + 1], TEXT)[0] == pytest.approx(head.logits(IMAGE, TEXT)[i], abs=1e-4)


def test_a_better_match_never_scores_lower(name: str):
    """A picture equal to a label's text is nearer to it than to any other."""
    head = bound(name)
    assert (head.scores(head.logits(TEXT, TEXT)).argmax(axis=1) == np.arange(C)).all()


def test_extreme_logits_give_finite_scores(name: str):
    scores = bound(name).scores(np.array([[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0]], np.float32))
    assert np.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()


def test_it_says_what_it_is_and_where_it_is_from(name: str):
    text = sys.modules[HEADS.get(name).logits.__module__].__doc__ or ""
    for part in ("Source:", "In:", "Assets:", "Out:"):
        assert part in text, part


@pytest.mark.parametrize(
    "params", [{"no_such": 1}, {"scale": "warm"}, {"scale": float("nan")}, {"scale": 0.0}, {"scale": 1e39}]
)
def test_params_that_are_not_its_own_are_refused(name: str, params: dict[str, Any]):
    with pytest.raises(BundleInvalid, match=rf"head params .*: {next(iter(params))}: "):
        HEADS.get(name).bind(params, {})


def test_params_cannot_be_changed(name: str):
    params = HEADS.get(name).params()
    with pytest.raises(ValueError, match="frozen"):
        params.scale = 3.0


def test_a_name_is_used_once(name: str):
    with pytest.raises(ValueError, match=f"heads '{name}' is registered twice"):
        HEADS.register(name)(HEADS.get(name))


def test_an_unknown_head_is_answered_with_the_known_ones():
    with pytest.raises(UnknownName, match="did you mean 'cosine'") as refused:
        HEADS.get("cosines")
    assert refused.value.known == HEADS.names()


# --- what is particular ---------------------------------------------------------------------------------------------


def test_cosine_is_a_softmax_at_the_models_temperature():
    head = HEADS.get("cosine").bind({"scale": 10.0}, {})
    logits = head.logits(IMAGE, TEXT)
    exact = 10.0 * IMAGE.astype(np.float64) @ TEXT.T.astype(np.float64)
    assert logits == pytest.approx(exact, abs=1e-5)
    powers = np.exp(exact)
    assert head.scores(logits) == pytest.approx(powers / powers.sum(axis=1, keepdims=True), abs=1e-6)
    assert head.scores(logits).sum(axis=1) == pytest.approx(np.ones(B), abs=1e-6)


def test_sigmoid_judges_every_label_alone():
    head = HEADS.get("sigmoid").bind({"scale": 10.0, "bias": -2.0}, {})
    logits = head.logits(IMAGE, TEXT)
    exact = 10.0 * IMAGE.astype(np.float64) @ TEXT.T.astype(np.float64) - 2.0
    assert logits == pytest.approx(exact, abs=1e-5)
    assert head.scores(logits) == pytest.approx(1 / (1 + np.exp(-exact)), abs=1e-6)


@pytest.mark.parametrize("bias", [1e39, -1e39, float("inf")])
def test_a_bias_that_drowns_every_score_is_refused(bias: float):
    with pytest.raises(BundleInvalid, match=r"head params .*: bias: "):
        HEADS.get("sigmoid").bind({"bias": bias}, {})
