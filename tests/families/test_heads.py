"""The contract of every registered head, then tests of single heads."""

from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest
from calmclip.models.heads import HEADS, Asset, BoundHead, Columns, Examples, Head

B, C, D = 4, 5, 16
LABELS = tuple("abcde")


def rows(count: int, seed: int) -> np.ndarray:
    """float32 [count, D], unit rows."""
    vectors = np.random.default_rng(seed).standard_normal((count, D))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


IMAGE, TEXT = rows(B, 1), rows(C, 2)


def bound(name: str, **params: Any) -> BoundHead:
    """The head with assets that are fitted to examples, if it has assets: pictures near the texts of their labels."""
    head = HEADS.get(name)
    near = TEXT[np.arange(20) % C] + 0.1 * rows(20, 4)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    shown = Examples(near, np.arange(20) % C, LABELS, TEXT)
    assets = head.fit(shown, head.params(**params)) if head.fit else {}
    return BoundHead(name, params, assets, LABELS)


def scored(head: BoundHead, image: np.ndarray, text: np.ndarray, labels: tuple[str, ...] = LABELS) -> np.ndarray:
    return head.logits(image, head.columns(labels, text))


@pytest.fixture(params=HEADS.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_shapes_and_ranges_hold(name: str):
    head = bound(name)
    logits = scored(head, IMAGE, TEXT)
    scores = head.scores(logits)
    for array in (logits, scores):
        assert (array.shape, array.dtype) == ((B, C), np.float32)
        assert np.isfinite(array).all()
    assert scores.min() >= 0
    assert scores.max() <= 1


def test_the_same_input_gives_the_same_bytes(name: str):
    once, twice = bound(name), bound(name)
    assert scored(once, IMAGE, TEXT).tobytes() == scored(twice, IMAGE, TEXT).tobytes()
    logits = scored(once, IMAGE, TEXT)
    assert once.scores(logits).tobytes() == twice.scores(logits.copy()).tobytes()


def test_inputs_are_not_changed(name: str):
    image, text = IMAGE.copy(), TEXT.copy()
    logits = scored(bound(name), image, text)
    logits_before = logits.copy()
    bound(name).scores(logits)
    for before, after in ((IMAGE, image), (TEXT, text), (logits_before, logits)):
        assert np.array_equal(before, after)


def test_permuted_and_fewer_labels_select_their_columns(name: str):
    order = np.random.default_rng(3).permutation(C)
    head = bound(name)
    logits = scored(head, IMAGE, TEXT)
    permuted = tuple(LABELS[i] for i in order)
    assert scored(head, IMAGE, TEXT[order], permuted) == pytest.approx(logits[:, order], abs=1e-4)
    some = order[:2]
    fewer = scored(head, IMAGE, TEXT[some], tuple(LABELS[i] for i in some))
    assert fewer == pytest.approx(logits[:, some], abs=1e-4)
    assert head.scores(logits[:, order]) == pytest.approx(head.scores(logits)[:, order], abs=1e-6)


def test_a_row_does_not_depend_on_other_rows(name: str):
    head = bound(name)
    for i in range(B):
        assert scored(head, IMAGE[i : i + 1], TEXT)[0] == pytest.approx(scored(head, IMAGE, TEXT)[i], abs=1e-4)


def test_a_better_match_never_scores_lower(name: str):
    """A picture equal to a label's text is nearer to it than to any other."""
    head = bound(name)
    assert (head.scores(scored(head, TEXT, TEXT)).argmax(axis=1) == np.arange(C)).all()


def test_extreme_logits_give_finite_scores(name: str):
    scores = bound(name).scores(np.array([[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0]], np.float32))
    assert np.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize(
    ("name", "params"),
    [(name, {"no_such": 1}) for name in HEADS.names()]
    + [(name, {"scale": bad}) for name in ("cosine", "sigmoid") for bad in ("warm", float("nan"), 0.0, 1e39)]
    + [("sigmoid", {"bias": bad}) for bad in (1e39, -1e39, float("inf"))],
)
def test_unknown_and_invalid_params_are_refused(name: str, params: dict[str, Any]):
    with pytest.raises(BadRequest, match=rf"head '{name}': params .*: {next(iter(params))}: "):
        BoundHead(name, params, {}, LABELS)


def test_params_cannot_be_changed(name: str):
    params = HEADS.get(name).params()
    for field in type(params).model_fields:
        with pytest.raises(ValueError, match="frozen"):
            setattr(params, field, 3.0)


# --- single heads ---------------------------------------------------------------------------------------------------


def test_cosine_is_a_softmax_at_the_models_temperature():
    head = bound("cosine", scale=10.0)
    logits = scored(head, IMAGE, TEXT)
    exact = 10.0 * IMAGE.astype(np.float64) @ TEXT.T.astype(np.float64)
    assert logits == pytest.approx(exact, abs=1e-5)
    powers = np.exp(exact)
    assert head.scores(logits) == pytest.approx(powers / powers.sum(axis=1, keepdims=True), abs=1e-6)
    assert head.scores(logits).sum(axis=1) == pytest.approx(np.ones(B), abs=1e-6)


def test_sigmoid_scores_each_label_without_the_others():
    head = bound("sigmoid", scale=10.0, bias=-2.0)
    logits = scored(head, IMAGE, TEXT)
    exact = 10.0 * IMAGE.astype(np.float64) @ TEXT.T.astype(np.float64) - 2.0
    assert logits == pytest.approx(exact, abs=1e-5)
    assert head.scores(logits) == pytest.approx(1 / (1 + np.exp(-exact)), abs=1e-6)


def test_prototypes_are_the_unit_means_of_their_pictures():
    image, truth = rows(9, 7), np.array([0, 1, 2, 0, 1, 2, 0, 1, 0])
    means = np.stack([image[truth == label].astype(np.float64).mean(axis=0) for label in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    head = HEADS.get("prototype")
    assert head.fit
    assets = head.fit(Examples(image, truth, LABELS[:3], TEXT[:3]), head.params())
    bound = BoundHead("prototype", {"scale": 3.0}, assets, LABELS[:3])
    logits = scored(bound, IMAGE, TEXT[[2, 0]], ("c", "a"))
    assert logits == pytest.approx(3 * IMAGE.astype(np.float64) @ means[[2, 0]].T, abs=1e-5)


# --- a head with one asset row per label ----------------------------------------------------------------------------


class Nothing(FrozenModel):
    pass


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A head `linear` whose assets are a row and a bias for each label; -> the rows."""
    head: Head[Nothing] = Head(
        Nothing,
        lambda image, columns, params: image @ columns.assets["weight"].T + columns.assets["bias"],
        lambda logits: 1 / (1 + np.exp(-logits)),
        assets={"weight": Asset(("C", "D")), "bias": Asset(("C",))},
    )
    HEADS.load()
    monkeypatch.setitem(HEADS._plugins, "linear", head)
    return rows(C, 5)


def fitted(rows: np.ndarray, **changed: np.ndarray) -> BoundHead:
    assets = {"weight": rows, "bias": np.arange(C, dtype=np.float32)} | changed
    return BoundHead("linear", {}, assets, LABELS)


def test_a_label_has_its_column_in_any_order_of_the_request(linear: np.ndarray):
    head = fitted(linear)
    for labels in (LABELS, ("c", "a"), ("e", "d", "c", "b", "a"), ("b", "b")):
        indices = [LABELS.index(label) for label in labels]
        columns = head.columns(labels, TEXT[indices])
        exact = IMAGE.astype(np.float64) @ linear[indices].T.astype(np.float64) + indices
        assert head.logits(IMAGE, columns) == pytest.approx(exact, abs=1e-5)
        assert columns.labels == labels


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (("a", "z"), r"the head 'linear' does not know the label 'z'; it knows 'a', 'b', 'c', 'd', 'e'\. Send"),
        (("A",), "does not know the label 'A'"),
    ],
)
def test_an_unknown_label_is_an_error_that_names_it(linear: np.ndarray, labels: tuple[str, ...], says: str):
    with pytest.raises(BadRequest, match=says):
        fitted(linear).columns(labels, TEXT[: len(labels)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bias": np.zeros(C)}, r"asset 'bias' is float64 \[5\]; expected float32 \['C'\]"),
        ({"bias": np.zeros(C + 1, np.float32)}, r"asset 'bias' is float32 \[6\]; expected float32 \['C'\], with one"),
        ({"bias": np.zeros((C, 1), np.float32)}, r"asset 'bias' is float32 \[5, 1\]"),
        ({"bias": np.full(C, np.inf, np.float32)}, "asset 'bias' has values that are not finite"),
        ({"more": np.zeros(C, np.float32)}, r"has the assets \['bias', 'more', 'weight'\]; expected"),
        ({"weight": rows(4, 5), "bias": np.zeros(4, np.float32)}, "has 4 columns; expected one for each of 5 labels"),
    ],
)
def test_assets_that_do_not_fit_the_head_are_refused(linear: np.ndarray, change: dict[str, np.ndarray], says: str):
    with pytest.raises(BadRequest, match=says):
        fitted(linear, **change)


def test_columns_hold_the_text_and_the_assets_of_their_labels(linear: np.ndarray):
    with pytest.raises(BadRequest, match="takes vectors of 16 numbers; the bundle's vectors have 8"):
        fitted(linear).columns(LABELS, TEXT[:, :8])
    columns = fitted(linear).columns(("b",), TEXT[1:2])
    assert isinstance(columns, Columns)
    assert {name: array.shape for name, array in columns.assets.items()} == {"weight": (1, D), "bias": (1,)}
    assert columns.text.tolist() == TEXT[1:2].tolist()
