"""The contract of every registered head, then tests of single heads."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest
from calmclip.models.heads import HEADS, Asset, BoundHead, Columns, Examples, Head
from calmclip.models.selection import choose

B, C, D = 4, 5, 16
LABELS = tuple("abcde")


def rows(count: int, seed: int) -> np.ndarray:
    """float32 [count, D], unit rows."""
    vectors = np.random.default_rng(seed).standard_normal((count, D))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


IMAGE, TEXT = rows(B, 1), rows(C, 2)


def near(pictures: int, seed: int) -> np.ndarray:
    """[pictures, C, D], unit rows near the texts of their labels."""
    vectors = TEXT + 0.1 * rows(pictures * C, seed).reshape(pictures, C, D)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


EXPERTS = {"bank": near(3, 5), "gate": 4 * rows(3, 6), "bias": np.array([0.5, 0, -0.5], np.float32)}
ASSETS: dict[str, dict[str, np.ndarray]] = {"mixture": EXPERTS}  # of heads that export folds
SHOWN = Examples(near(4, 4).reshape(-1, D), np.arange(20) % C, LABELS, TEXT)


def count(name: str) -> int:
    """How many of `LABELS` the head takes."""
    fit = HEADS.get(name).fit
    return (fit and fit.labels) or C


@cache
def bound(name: str, **params: Any) -> BoundHead:
    """The head with assets that are fitted to examples, if it has assets: pictures near the texts of their labels."""
    head, n = HEADS.get(name), count(name)
    if head.fit is None:
        return BoundHead(name, params, ASSETS.get(name, {}), LABELS)
    shown = replace(SHOWN.only(SHOWN.truth < n), labels=LABELS[:n], text=TEXT[:n])
    choice = choose(head, head.params(**params), shown)
    return BoundHead(name, choice.params.model_dump(), head.fit.assets(shown, choice.params), shown.labels)


def scored(head: BoundHead, image: np.ndarray, text: np.ndarray, labels: tuple[str, ...] = LABELS) -> np.ndarray:
    return head.logits(image, head.columns(labels[: len(text)], text))


@pytest.fixture(params=HEADS.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def text(name: str) -> np.ndarray:
    """float32 [n, D], the rows of the labels that the head takes."""
    return TEXT[: count(name)]


def test_shapes_and_ranges_hold(name: str, text: np.ndarray):
    head = bound(name)
    logits = scored(head, IMAGE, text)
    scores = head.scores(logits)
    for array in (logits, scores):
        assert (array.shape, array.dtype) == ((B, len(text)), np.float32)
        assert np.isfinite(array).all()
    assert scores.min() >= 0
    assert scores.max() <= 1


def test_the_same_input_gives_the_same_bytes(name: str, text: np.ndarray):
    once, twice = bound(name), bound.__wrapped__(name)
    assert scored(once, IMAGE, text).tobytes() == scored(twice, IMAGE, text).tobytes()
    logits = scored(once, IMAGE, text)
    assert once.scores(logits).tobytes() == twice.scores(logits.copy()).tobytes()


def test_inputs_are_not_changed(name: str, text: np.ndarray):
    image, rows = IMAGE.copy(), text.copy()
    shown = [array.copy() for array in (SHOWN.image, SHOWN.truth)]
    logits = scored(bound.__wrapped__(name), image, rows)
    logits_before = logits.copy()
    bound(name).scores(logits)
    before = (IMAGE, text, logits_before, SHOWN.image, SHOWN.truth)
    for first, second in zip(before, (image, rows, logits, *shown), strict=True):
        assert np.array_equal(first, second)


def test_permuted_and_fewer_labels_select_their_columns(name: str, text: np.ndarray):
    order = np.random.default_rng(3).permutation(len(text))
    head = bound(name)
    logits = scored(head, IMAGE, text)
    permuted = tuple(LABELS[i] for i in order)
    assert scored(head, IMAGE, text[order], permuted) == pytest.approx(logits[:, order], abs=1e-4, rel=1e-5)
    some = order[: len(order) // 2]
    fewer = scored(head, IMAGE, text[some], tuple(LABELS[i] for i in some))
    assert fewer == pytest.approx(logits[:, some], abs=1e-4, rel=1e-5)
    assert head.scores(logits[:, order]) == pytest.approx(head.scores(logits)[:, order], abs=1e-6)


def test_a_row_does_not_depend_on_other_rows(name: str, text: np.ndarray):
    head = bound(name)
    for i in range(B):
        alone = scored(head, IMAGE[i : i + 1], text)[0]
        assert alone == pytest.approx(scored(head, IMAGE, text)[i], abs=1e-4, rel=1e-5)


def test_a_better_match_never_scores_lower(name: str, text: np.ndarray):
    """A picture equal to a label's text is nearer to it than to any other."""
    head = bound(name)
    assert (head.scores(scored(head, text, text)).argmax(axis=1) == np.arange(len(text))).all()


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
    assets = head.fit.assets(Examples(image, truth, LABELS[:3], TEXT[:3]), head.params())
    bound = BoundHead("prototype", {"scale": 3.0}, assets, LABELS[:3])
    logits = scored(bound, IMAGE, TEXT[[2, 0]], ("c", "a"))
    assert logits == pytest.approx(3 * IMAGE.astype(np.float64) @ means[[2, 0]].T, abs=1e-5)


def mixture(**changed: np.ndarray) -> BoundHead:
    return BoundHead("mixture", {"scale": 50.0}, {**EXPERTS, **changed}, LABELS)


def test_a_mixture_is_the_two_best_experts_by_their_softmax():
    """In float64, a picture at a time. The mixture is not made a unit vector again."""
    logits = scored(mixture(), IMAGE, TEXT)
    for x, row in zip(IMAGE.astype(np.float64), logits, strict=True):
        routes = EXPERTS["gate"].astype(np.float64) @ x + EXPERTS["bias"]
        best, second = np.argsort(-routes)[:2]
        part = 1 / (1 + np.exp(routes[second] - routes[best]))
        mixed = part * EXPERTS["bank"][best].astype(np.float64) + (1 - part) * EXPERTS["bank"][second]
        assert row == pytest.approx(50 * mixed @ x, abs=1e-4)


def test_equal_experts_are_the_plain_head():
    equal = mixture(bank=np.stack([TEXT] * 3))
    assert scored(equal, IMAGE, TEXT) == pytest.approx(scored(bound("cosine", scale=50.0), IMAGE, TEXT), abs=1e-4)


@pytest.mark.parametrize("expert", range(3))
def test_a_router_that_is_forced_to_one_expert_is_the_head_of_its_prompt(expert: int):
    bias = np.where(np.arange(3) == expert, 1e4, 0).astype(np.float32)
    plain = scored(bound("cosine", scale=50.0), IMAGE, EXPERTS["bank"][expert])
    assert scored(mixture(bias=bias), IMAGE, TEXT) == pytest.approx(plain, abs=1e-4)


def test_one_expert_alone_is_its_head():
    alone = mixture(**{name: array[:1] for name, array in EXPERTS.items()})
    assert scored(alone, IMAGE, TEXT) == pytest.approx(50 * IMAGE @ EXPERTS["bank"][0].T, abs=1e-4)


def test_a_heads_vectors_stand_for_its_labels_in_any_order():
    head, mean = mixture(), EXPERTS["bank"].astype(np.float64).mean(axis=0)
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert head.vectors(LABELS) == pytest.approx(unit, abs=1e-6)
    assert head.vectors(("c", "a")) == pytest.approx(unit[[2, 0]], abs=1e-6)
    assert head.vectors(("c", "z")) is None
    assert bound("prototype").vectors(LABELS) is None


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
