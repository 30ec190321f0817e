"""Labels -> one unit vector each: sentences, the mean of unit vectors; texts in slices of nearly one length."""

from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.errors import TextTooLong
from calmclip.models.flow import Array, Arrays, Cached, CacheGet, CachePut, Call, Walk, drive
from calmclip.models.runtime.clock import Stopwatch
from calmclip.models.tasks.features import labels, texts, unit


class Rows:
    """A driver that answers cache requests. ``rows``: (graph, key) -> outputs."""

    def __init__(self, rows: dict[tuple[str, str], Arrays]) -> None:
        self.rows, self.requests = rows, 0

    def __call__(self, request: CacheGet | CachePut) -> Cached:
        self.requests += 1
        if isinstance(request, CacheGet):
            return {key: self.rows[request.graph, key] for key in request.keys if (request.graph, key) in self.rows}
        assert request.size == len(request.outputs["vectors"])
        self.rows[request.graph, request.key] = request.outputs
        return {}


def answered(call: Call) -> Arrays:
    """The words' counts of each row: what the graph answers before its normalization."""
    return {"text_embeds": (call.feeds["ids"][:, :, None] == [[[2, 3, 4]]]).sum(axis=1).astype(np.float32)}


def counts(sentences: list[str]) -> list[list[int]]:
    return [[line.split().count(word) for word in ("red", "green", "blue")] for line in sentences]


def embedded(bundle: Bundle, names: list[str], rows: Any, **more: Any) -> tuple[Array, Call]:
    calls: list[Call] = []

    def run(call: Call) -> Arrays:
        calls.append(call)
        return {"text_embeds": np.array(rows, np.float32)}

    vectors = drive(labels(bundle, Classifier(tuple(names), **more)), run)
    (call,) = calls
    return vectors, call


def test_a_head_with_vectors_of_its_own_embeds_no_text(bundle: Bundle):
    """The two experts of each label lie on two axes, so the unit mean lies between them."""
    bank = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 1]]], np.float32)
    assets = {"bank": bank, "gate": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float32)}
    classifier = Classifier(("red", "blue"), head="mixture", assets=assets)

    def run(call: Call) -> Arrays:
        raise AssertionError(f"graph {call.graph} runs")

    for asked, want in ((classifier, [[1, 1, 0], [0, 1, 1]]), (classifier.for_request(["blue"]), [[0, 1, 1]])):
        assert drive(labels(bundle, asked), run) == pytest.approx(np.array(want) / 2**0.5, abs=1e-6)


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
    bundle.text().tokens = None  # a call of it would fail
    axes = np.eye(3, dtype=np.float32)
    cache = Rows({("text", "green"): {"text_embeds": axes[1]}, ("text", "red"): {"text_embeds": axes[0]}})
    for requests in (3, 1):  # the second time the vectors of the labels are cached
        walk = Walk(labels(bundle, Classifier(("green", "red", "green"))), Stopwatch(), cache)
        assert walk.step().value.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
        assert cache.requests == requests
        cache.requests = 0


def test_other_labels_or_templates_do_not_hit_the_cache(bundle: Bundle):
    cache = Rows({})
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


def test_a_long_text_pads_no_other_and_answers_keep_their_order(bundle: Bundle):
    """The context is 6 tokens. 90 rows of 1 to 3 words, 30 of each, and two of 6: 30 x (1 + 2 + 3) + 2 x 6 = 192
    tokens; without a cut, 30 tokens or more are wasted, and a run costs 16. Padded to 6 they were 552."""
    three = ("blue", "red green", "red red blue")
    sentences = [three[i % 3] + " " * (i // 3) for i in range(90)]  # 90 different texts of three lengths
    sentences[40:40] = ["green blue " * 3]
    sentences.append("blue blue green " * 2)
    calls: list[Call] = []
    rows = drive(texts(bundle, sentences), lambda call: calls.append(call) or answered(call))
    assert rows.tolist() == counts(sentences)
    assert [call.feeds["ids"].shape for call in calls] == [(30, 1), (30, 2), (30, 3), (2, 6)]
    assert [call.keys for call in calls][-1] == (sentences[40], sentences[-1])
    with pytest.raises(TextTooLong, match=r"text 50 .* has 7 tokens"):
        drive(texts(bundle, [*sentences[:50], "red " * 7, *sentences[50:]]), answered)


def test_rows_beside_a_cached_long_text_are_not_padded_to_it(bundle: Bundle):
    long, short = "red green blue red green blue", ["red", "blue", "green"]
    cache = Rows({("text", long): {"text_embeds": np.array([2, 2, 2], np.float32)}})
    walk = Walk(texts(bundle, [*short, long]), Stopwatch(), cache)
    call = walk.step()
    assert (call.keys, call.feeds["ids"].shape) == (tuple(short), (3, 1))
    assert walk.step(answered(call)).value.tolist() == counts([*short, long])


def test_a_repeated_text_runs_once(bundle: Bundle):
    calls: list[Call] = []
    rows = drive(texts(bundle, ["red", "blue", "red", "red"]), lambda call: calls.append(call) or answered(call))
    assert rows.tolist() == counts(["red", "blue", "red", "red"])
    assert [call.keys for call in calls] == [("red", "blue")]
