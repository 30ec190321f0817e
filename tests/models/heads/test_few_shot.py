"""The heads that are fitted to a few pictures, against float64 loops, scikit-learn and identities."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from calmclip.models.errors import BadRequest, ExtraMissing
from calmclip.models.heads import HEADS, Columns, Examples, caps, direction, gda, linear_probe, softmax_regression, tip
from calmclip.models.heads.cosine import softmax
from calmclip.models.ops import reference

LABELS = ("cat", "dog", "car")


def units(*shape: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal(shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def examples(count: int = 12, dim: int = 20, labels: tuple[str, ...] = LABELS, seed: int = 0) -> Examples:
    """Pictures that lie near the text of their label, and captions that lie near their picture."""
    text, truth = units(len(labels), dim, seed=seed), np.arange(count) % len(labels)
    image = text[truth] + 1.5 * units(count, dim, seed=seed + 1)
    image = (image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float32)
    captions = image + units(count, dim, seed=seed + 2)
    captions = (captions / np.linalg.norm(captions, axis=1, keepdims=True)).astype(np.float32)
    return Examples(image, truth, labels, text, 30.0, captions)


def scored(name: str, shown: Examples, image: np.ndarray, **params: float) -> np.ndarray:
    head = HEADS.get(name)
    assert head.fit
    checked = head.params(**params)
    return head.logits(image, Columns(shown.labels, shown.text, head.fit.assets(shown, checked)), checked)


def zero_shot(shown: Examples, image: np.ndarray) -> np.ndarray:
    return np.float32(shown.scale) * (image @ shown.text.T)


# --- gda ------------------------------------------------------------------------------------------------------------


def precision(image: np.ndarray, truth: np.ndarray, shrinkage: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Means and P of the formula, as it stands."""
    image = image.astype(np.float64)
    means = np.stack([image[truth == label].mean(axis=0) for label in np.unique(truth)])
    centred = image - means[truth]
    covariance = centred.T @ centred / (len(image) - 1)
    shrunk = (len(image) - 1) * covariance + shrinkage * np.trace(covariance) * np.eye(image.shape[1])
    return means, image.shape[1] * np.linalg.pinv(shrunk)


@pytest.mark.parametrize(("count", "dim"), [(12, 20), (60, 20)])  # fewer and more pictures than dimensions
def test_gda_is_the_mahalanobis_classifier_with_the_same_precision(count: int, dim: int):
    shown, image = examples(count, dim), units(200, dim, seed=9)
    means, p = precision(shown.image, shown.truth)
    off = image.astype(np.float64)[:, None] - means
    squared = np.einsum("bcd,de,bce->bc", off, p, off)
    assets = gda.fit(shown, gda.Params())
    assert assets["weight"] == pytest.approx(means @ p, rel=1e-4, abs=1e-4)
    gaussian = image @ assets["weight"].T + assets["bias"]
    assert (gaussian.argmax(axis=1) == squared.argmin(axis=1)).all()
    apart = -squared / 2 - np.log(3)  # up to the same number for all labels
    assert gaussian - gaussian[:, :1] == pytest.approx(apart - apart[:, :1], abs=1e-3)
    sums = zero_shot(shown, image) + np.float32(0.25) * gaussian
    assert scored("gda", shown, image, scale=30.0, alpha=0.25) == pytest.approx(sums, abs=1e-4)


def test_gda_without_shrinkage_is_linear_discriminant_analysis():
    shown, image = examples(90), units(200, 20, seed=9)
    peer = LinearDiscriminantAnalysis().fit(shown.image.astype(np.float64), shown.truth)
    assets = gda.fit(shown, gda.Params(shrinkage=0))
    ours, theirs = image @ assets["weight"].T + assets["bias"], peer.decision_function(image.astype(np.float64))
    assert (ours.argmax(axis=1) == peer.predict(image)).all()
    ours, theirs = (x - x.mean(axis=1, keepdims=True) for x in (ours, theirs))
    assert ours == pytest.approx(theirs * (ours.std() / theirs.std()), abs=1e-3 * float(ours.std()))


def test_gda_with_alpha_0_is_zero_shot_to_the_bit():
    shown, image = examples(), units(50, 20, seed=9)
    assert scored("gda", shown, image, scale=30.0, alpha=0).tobytes() == zero_shot(shown, image).tobytes()


def test_one_picture_of_each_label_gives_the_nearest_picture():
    shown, image = examples(3), units(50, 20, seed=9)
    assets = gda.fit(shown, gda.Params())
    gaussian = image @ assets["weight"].T + assets["bias"]
    assert (gaussian.argmax(axis=1) == (image @ shown.image.T).argmax(axis=1)).all()


def test_a_label_without_a_picture_gets_those_nearest_to_its_text():
    """16 pictures of each other label, so the published numbers hold: 64 pictures and 16 copies of the text."""
    shown = examples(80, 20, ("a", "b", "c", "d", "e", "new"), seed=3)
    shown = shown.only(shown.truth < 5)
    shown = replace(shown, image=np.tile(shown.image, (2, 1))[:80], truth=np.tile(shown.truth, 2)[:80])
    counts = np.bincount(shown.truth, minlength=6)
    assert counts[:5].mean() == 16
    nearest = shown.image[np.argsort(-(shown.image @ shown.text[5]), kind="stable")[:64]]
    rows = np.concatenate([nearest, np.repeat(shown.text[5:], 16, axis=0)])
    mean, of_new = precision(rows, np.zeros(80, int))
    means, of_shown = precision(shown.image, shown.truth)
    means = np.concatenate([means, mean])
    weight = means @ (of_new + of_shown) / 2
    assets = gda.fit(shown, gda.Params())
    assert assets["weight"] == pytest.approx(weight, rel=1e-3, abs=1e-3)
    assert assets["bias"] == pytest.approx(-(weight * means).sum(axis=1) / 2 - np.log(6), rel=1e-3)
    assert gda.notes(shown, gda.Params(), {}) == ("'new' has no picture; it got those nearest to its text",)


def test_pictures_without_a_label_move_zero_shot_to_their_clusters():
    """Three clusters, which texts beside them tell apart badly."""
    truth, draw = np.arange(300) % 3, np.random.default_rng(4)
    image = np.eye(3, 20)[truth] + 0.2 * draw.standard_normal((300, 20))
    image = (image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float32)
    text = np.eye(3, 20) + 0.4 * draw.standard_normal((3, 20))
    text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
    shown = Examples(image[:0], truth[:0], LABELS, text, 10.0, unlabelled=image)
    before = (zero_shot(shown, image).argmax(axis=1) == truth).mean()
    (scale,), alphas = gda.grid(shown)["scale"], gda.grid(shown)["alpha"]
    logits = scored("gda", shown, image, scale=scale, alpha=alphas[len(alphas) // 2])
    after = (logits.argmax(axis=1) == truth).mean()
    assert before < 0.8
    assert after > 0.9
    assets = gda.fit(shown, gda.Params())
    assert ((image @ assets["weight"].T + assets["bias"]).argmax(axis=1) == truth).mean() > 0.99
    # the middle alpha gives both terms the same spread
    terms = zero_shot(shown, image), logits - zero_shot(shown, image)
    assert terms[0].std(axis=1).mean() == pytest.approx(terms[1].std(axis=1).mean(), rel=1e-3)


# --- tip and caps ---------------------------------------------------------------------------------------------------


def test_tip_sums_the_exponential_nearness_of_each_labels_pictures():
    shown, image = examples(), units(6, 20, seed=9)
    expected = zero_shot(shown, image).astype(np.float64)
    for b, row in enumerate(image.astype(np.float64)):
        for key, label in zip(shown.image.astype(np.float64), shown.truth, strict=True):
            expected[b, label] += 2.0 * np.exp(-5.5 * (1 - row @ key))
    assert scored("tip", shown, image, scale=30.0, alpha=2.0, beta=5.5) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("paper_code", [False, True])
def test_caps_is_its_formula(paper_code: bool):
    shown, image = examples(), units(6, 20, seed=9).astype(np.float64)
    assert shown.captions is not None
    pictures, captions, text = (x.astype(np.float64) for x in (shown.image, shown.captions, shown.text))
    features = np.eye(20) if paper_code else text.T

    def p(row: np.ndarray) -> np.ndarray:
        return np.exp(row @ features / 0.5) / np.exp(row @ features / 0.5).sum()

    def kl(row: np.ndarray, other: np.ndarray) -> float:
        return float(sum(a * np.log(a / b) for a, b in zip(p(row), p(other), strict=True)))

    near = lambda row: 0.75 * (pictures @ row) + 0.25 * (captions @ row)  # noqa: E731
    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    kls = [kl(pictures[i], pictures[j]) for i, j in pairs]
    nears = [near(pictures[i])[j] for i, j in pairs]
    expected = 30 * image @ text.T
    for b, row in enumerate(image):
        for n, label in enumerate(shown.truth):
            part = (kl(row, pictures[n]) - min(kls)) / (max(kls) - min(kls))
            scaled = part * (max(nears) - min(nears)) + min(nears)
            expected[b, label] += 2 * np.exp(-5.5 * (1 - near(row)[n])) - 3 * scaled
    params = {"scale": 30.0, "alpha": 2.0, "beta": 5.5, "gamma": 3.0, "delta": 0.25, "paper_code": paper_code}
    logits = scored("caps", shown, image.astype(np.float32), **params)
    assert logits == pytest.approx(expected, abs=2e-3)
    one_by_one = [scored("caps", shown, row[None].astype(np.float32), **params)[0] for row in image]
    assert logits == pytest.approx(np.stack(one_by_one), abs=1e-4)  # whatever the batch


def test_caps_has_tip_and_zero_shot_inside():
    shown, image = examples(), units(50, 20, seed=9)
    without = scored("caps", shown, image, scale=30.0, alpha=2.0, beta=5.5, gamma=0, delta=0)
    assert without.tobytes() == scored("tip", shown, image, scale=30.0, alpha=2.0, beta=5.5).tobytes()
    nothing = scored("caps", shown, image, scale=30.0, alpha=0, beta=5.5, gamma=0, delta=0.5)
    assert nothing.tobytes() == zero_shot(shown, image).tobytes()


def test_caps_without_captions_takes_the_texts_of_the_labels_and_says_so():
    shown = examples()
    params = caps.Params(delta=0.5)
    spoken = replace(shown, captions=shown.text[shown.truth])
    bare = replace(shown, captions=None)
    assert (caps.fit(bare, params)["keys"] == caps.fit(spoken, params)["keys"]).all()
    assert caps.notes(bare, params, {}) == ("no captions were given: the texts of the labels stand for them",)
    assert caps.notes(spoken, params, {}) == ()


def test_grids_grow_with_the_scale_of_zero_shot():
    """A bundle with ten times the scale finds the same classifier at ten times the weights."""
    wide = replace(examples(), scale=300.0)
    for head in (tip, caps, gda):
        narrow, tenfold = head.grid(examples()), head.grid(wide)
        for key in {"alpha", "gamma"} & {*narrow}:
            assert tenfold[key] == pytest.approx(10 * np.array(narrow[key]))


# --- softmax regression ---------------------------------------------------------------------------------------------


def test_the_gradient_of_softmax_regression_is_that_of_its_loss():
    draw = np.random.default_rng(4)
    zero, truth = 3 * draw.standard_normal((12, 3)), np.arange(12) % 3
    at = softmax_regression.objective(zero, truth, 0.1)
    x = draw.standard_normal((2, 3))
    _, slope = at(x)
    for i in np.ndindex(2, 3):
        step = np.zeros((2, 3))
        step[i] = 1e-5
        assert slope[i] == pytest.approx((at(x + step)[0] - at(x - step)[0]) / 2e-5, abs=1e-9)
    # the formula as it stands: A^T (diag f - f f^T) (f - b), for each picture, with A = [diag(zero-shot), I]
    exact = np.zeros(6)
    for row, label in zip(zero, truth, strict=True):
        a = np.concatenate([np.diag(row), np.eye(3)], axis=1)
        f = softmax(a @ x.ravel())
        exact += a.T @ reference.softmax_jacobian(f) @ (f - np.eye(3)[label]) / 12
    assert slope == pytest.approx(exact.reshape(2, 3) + 0.1 * (x - [[1], [0]]), abs=1e-14)


def test_a_step_of_the_weights_is_a_shift_of_the_targets():
    """f(x_new) - b = f(x_old) - (b + f(x_old) - f(x_new)): the loss after a step is that of shifted targets before it,
    and the outputs move at most half as far as A (x_new - x_old)."""
    shown = examples()
    zero = 30.0 * (shown.image @ shown.text.T).astype(np.float64)
    start = np.repeat([[1.0], [0.0]], 3, axis=1)
    x = softmax_regression.descend(softmax_regression.objective(zero, shown.truth, 0.01), start)
    targets = np.eye(3)[shown.truth]
    old, new = softmax(zero), softmax(zero * x[0] + x[1])
    assert ((old - (targets + (old - new))) ** 2).sum() == pytest.approx(((new - targets) ** 2).sum(), rel=1e-12)
    moved = np.linalg.norm(zero * (x[0] - 1) + x[1], axis=1)
    assert (np.linalg.norm(new - old, axis=1) <= moved / 2 + 1e-12).all()


def test_the_descent_falls_to_where_the_gradient_vanishes():
    shown = examples(60)
    zero = 30.0 * (shown.image @ shown.text.T).astype(np.float64)
    at = softmax_regression.objective(zero, shown.truth, 1.0)
    start = np.repeat([[1.0], [0.0]], 3, axis=1)
    end = softmax_regression.descend(at, start)
    assert at(end)[0] < at(start)[0]
    assert np.abs(at(end)[1]).max() < 1e-3 * np.abs(at(start)[1]).max()
    stuck = softmax_regression.descend(lambda x: (1.0, np.ones_like(x)), start)  # a loss that never falls
    assert (stuck == start).all()


# --- direction ------------------------------------------------------------------------------------------------------

WORDS = tuple(f"word {i}" for i in range(8))


def two_sets(swapped: bool = False) -> Examples:
    shown = examples(10, 20, ("bright", "dark"))
    truth = 1 - shown.truth if swapped else shown.truth
    labels = shown.labels[::-1] if swapped else shown.labels
    return replace(shown, truth=truth, labels=labels, words=WORDS, word_vectors=units(8, 20, seed=7))


def test_a_direction_is_the_difference_of_the_unit_means():
    shown = two_sets()
    means = [shown.image[shown.truth == i].astype(np.float64).mean(axis=0) for i in (0, 1)]
    first, second = (mean / np.linalg.norm(mean) for mean in means)
    r = (first - second) / np.linalg.norm(first - second)
    logits = scored("direction", shown, shown.image, scale=2.0)
    expected = 2 * (shown.image @ r - (first + second) @ r / 2)
    assert logits == pytest.approx(np.stack([expected, -expected], axis=1), abs=1e-5)
    swapped = direction.fit(two_sets(swapped=True), direction.Params())["direction"]
    assert swapped[0].tolist() == (-direction.fit(shown, direction.Params())["direction"][0]).tolist()


def test_the_bias_words_of_a_direction_are_removed_and_named():
    shown = two_sets()
    assert shown.word_vectors is not None
    plain = direction.fit(shown, direction.Params())["direction"][0].astype(np.float64)
    alignment = shown.word_vectors @ plain
    order = np.argsort(-alignment)
    q = sum(alignment[i] * shown.word_vectors[i].astype(np.float64) for i in [*order[:2], *order[-2:]])
    q /= np.linalg.norm(q)
    r = direction.fit(shown, direction.Params(bias_words=2))["direction"][0].astype(np.float64)
    rest = plain - (plain @ q) * q
    assert r == pytest.approx(rest / np.linalg.norm(rest), abs=1e-6)
    assert abs(r @ q) < 1e-7
    means = [shown.image[shown.truth == i].astype(np.float64).mean(axis=0) for i in (0, 1)]
    middle = sum(mean / np.linalg.norm(mean) for mean in means) @ r / 2  # 0 before the removal
    assert abs(middle) > 0.01
    offset = direction.fit(shown, direction.Params(bias_words=2))["offset"]
    assert offset == pytest.approx([-middle, middle], abs=1e-6)
    params = direction.Params(bias_words=2)
    nearest, farthest, removed = direction.notes(shown, params, direction.fit(shown, params))
    by_r = [WORDS[i] for i in np.argsort(-(shown.word_vectors @ r))]
    assert nearest == f"words nearest to 'bright': {', '.join(by_r)}"
    assert farthest == f"words nearest to 'dark': {', '.join(by_r[::-1])}"
    assert removed == f"removed: {', '.join(WORDS[i] for i in [*order[:2], *order[-2:]])}"


def test_a_direction_that_does_not_exist_is_an_error():
    shown = two_sets()
    same = replace(shown, image=np.repeat(shown.image[:1], 10, axis=0))
    with pytest.raises(BadRequest, match="the pictures of 'bright' and 'dark' have the same mean"):
        direction.fit(same, direction.Params())
    with pytest.raises(BadRequest, match="bias_words is 5, and the vocabulary has 8 words; expected at least 10"):
        direction.fit(shown, direction.Params(bias_words=5))
    plain = direction.fit(shown, direction.Params())["direction"]
    only = replace(shown, words=("bright", "dark"), word_vectors=plain)
    with pytest.raises(BadRequest, match="the bias words explain the whole difference"):
        direction.fit(only, direction.Params(bias_words=1))


# --- linear probe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [LABELS, LABELS[:2]])
def test_a_linear_probe_has_the_probabilities_of_scikit_learn(labels: tuple[str, ...]):
    shown, image = examples(labels=labels), units(20, 20, seed=9)
    peer = LogisticRegression(C=10.0, max_iter=1000).fit(shown.image, shown.truth)
    assert softmax(scored("linear_probe", shown, image, C=10.0)) == pytest.approx(peer.predict_proba(image), abs=1e-5)


def test_a_linear_probe_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_probe, "find_spec", lambda name: None)
    with pytest.raises(ExtraMissing, match=r"'linear_probe' needs 'scikit-learn', which is not installed; .*\[eval\]"):
        linear_probe.ready()
