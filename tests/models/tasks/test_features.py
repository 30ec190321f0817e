"""Labels -> one unit vector each: sentences, the mean of unit vectors; texts in groups of similar length."""

from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.errors import TextTooLong
from calmclip.models.flow import Array, Arrays, CacheGet, CachePut, Call, Walk, drive
from calmclip.models.runtime.clock import Stopwatch
from calmclip.models.tasks.features import CHUNK, labels, texts, unit


class Cached:
    """A driver that answers cache requests. ``rows``: (graph, keys) -> outputs."""

    def __init__(self, rows: dict[tuple[str, tuple[str, ...]], Arrays]) -> None:
        self.rows, self.requests = rows, 0

    def __call__(self, request: CacheGet | CachePut) -> Arrays | None:
        self.requests += 1
        if isinstance(request, CacheGet):
            return self.rows.get((request.graph, request.keys))
        assert request.size == len(request.outputs["vectors"])
        self.rows[request.graph, (request.key,)] = {"vectors": request.outputs["vectors"][None]}
        return None


def embedded(bundle: Bundle, names: list[str], rows: Any, **more: Any) -> tuple[Array, Call]:
    calls: list[Call] = []

    def run(call: Call) -> Arrays:
        calls.append(call)
        return {"text_embeds": np.array(rows, np.float32)}

    vectors = drive(labels(bundle, Classifier(tuple(names), **more)), run)
    (call,) = calls
    return vectors, call


def test_a_label_is_the_unit_mean_of_unit_sentences(bundle: Bundle):
    vectors, call = embedded(
        bundle, ["red"], [[2, 0, 0], [0, 1, 0], [0, 0.5, 0]], templates=("{} one", "{} two", "{} three")
    )
    assert call.keys == ("red one", "red two", "red three")
    # unit: x, y, y; mean (1, 2, 0) / 3; unit again (1, 2, 0) / sqrt(5)
    assert vectors == pytest.approx(np.array([[1, 2, 0]]) / 5**0.5, abs=1e-6)
    assert vectors.dtype == np.float32


def test_each_distinct_sentence_is_embedded_once(bundle: Bundle):
    vectors, call = embedded(bundle, ["red", "green", "red"], [[1, 0, 0], [0, 1, 0]])
    assert call.keys == ("red", "green")
    assert len(call.feeds["ids"]) == 2
    assert vectors.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_descriptions_replace_the_templates_and_are_any_number(bundle: Bundle):
    vectors, call = embedded(
        bundle,
        ["green", "red"],
        [[0, 3, 0], [1, 0, 0], [0, 0, 1]],
        templates=("a {}",),
        descriptions={"red": ("r1", "r2")},
    )
    assert call.keys == ("a green", "r1", "r2")
    assert vectors == pytest.approx(np.array([[0, 1, 0], [0.5**0.5, 0, 0.5**0.5]]), abs=1e-6)


def test_cached_texts_are_not_tokenized(bundle: Bundle):
    bundle.text = None  # a call of it would fail
    rows = {"text_embeds": np.eye(3, dtype=np.float32)[[1, 0]]}
    cache = Cached({("text", ("green", "red")): rows})
    for requests in (3, 1):  # the second time the vectors of the labels are cached
        walk = Walk(labels(bundle, Classifier(("green", "red", "green"))), Stopwatch(), cache)
        assert walk.step().value.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
        assert cache.requests == requests
        cache.requests = 0


def test_other_labels_or_templates_do_not_hit_the_cache(bundle: Bundle):
    cache = Cached({})
    for names, more in [
        (("a", "b"), {}),
        (("a', 'b",), {}),
        (("b", "a"), {}),
        (("a",), {"templates": ("b {}",)}),
        (("a", "b {}"), {}),
        (("a", "b"), {"templates": ("x {}",)}),
        (("a", "b"), {"descriptions": {"a": ("x",)}}),
    ]:
        walk = Walk(labels(bundle, Classifier(names, **more)), Stopwatch(), cache)
        count = len(walk.step().keys)
        walk.step({"text_embeds": np.eye(3, dtype=np.float32)[:count]})
    assert len(cache.rows) == 7


def test_a_label_may_hold_braces_and_a_template_no_code(bundle: Bundle):
    _, call = embedded(bundle, ["{0} {}"], [[1, 0, 0]], templates=("{}",))
    assert call.keys == ("{0} {}",)


def test_unit_rows_have_length_one_and_zero_stays_zero():
    rows = unit(np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-3]]))
    assert rows == pytest.approx(np.array([[0.6, 0.8], [0, 0], [0, 1]]), abs=1e-7)
    assert rows.dtype == np.float32


def test_many_texts_run_in_groups_of_similar_length_and_return_in_their_order(bundle: Bundle):
    """A long text pads only its group; the context is 6 tokens."""
    sentences = [("red " * (1 + i % 5)).strip() + (" blue" if i % 2 else "") for i in range(2 * CHUNK + 3)]
    calls: list[Call] = []

    def run(call: Call) -> Arrays:
        calls.append(call)
        return {"text_embeds": (call.feeds["ids"][:, :, None] == [[[2, 3, 4]]]).sum(axis=1).astype(np.float32)}

    rows = drive(texts(bundle, sentences), run)
    words = [sentence.split() for sentence in sentences]
    assert rows.tolist() == [[line.count(word) for word in ("red", "green", "blue")] for line in words]
    widths = [call.feeds["ids"].shape for call in calls]
    assert widths == sorted(widths, key=lambda shape: shape[1])
    assert [count for count, _ in widths] == [CHUNK, CHUNK, 3]
    assert widths[0][1] < widths[-1][1]
    with pytest.raises(TextTooLong, match=r"text 100 .* has 7 tokens"):
        drive(texts(bundle, [*sentences[:100], "red " * 7, *sentences[100:]]), run)
