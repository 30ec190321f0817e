"""Labels -> one unit vector each: sentences, the mean of unit vectors; texts in groups of like length."""

from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.errors import TextTooLong
from calmclip.models.flow import Array, Arrays, Call, Keep, Recall, Walk, drive
from calmclip.models.runtime.clock import Stopwatch
from calmclip.models.tasks.features import CHUNK, labels, texts, unit


class Known:
    """A driver's memory. ``kept``: (graph, keys) -> outputs."""

    def __init__(self, kept: dict[tuple[str, tuple[str, ...]], Arrays]) -> None:
        self.kept, self.asked = kept, 0

    def __call__(self, one: Recall | Keep) -> Arrays | None:
        self.asked += 1
        if isinstance(one, Recall):
            return self.kept.get((one.graph, one.keys))
        assert one.size == len(one.outputs["vectors"])
        self.kept[one.graph, (one.key,)] = {"vectors": one.outputs["vectors"][None]}
        return None


def embedded(bundle: Bundle, names: list[str], rows: Any, **more: Any) -> tuple[Array, Call]:
    calls: list[Call] = []

    def run(call: Call) -> Arrays:
        calls.append(call)
        return {"text_embeds": np.array(rows, np.float32)}

    vectors = drive(labels(bundle, Classifier(tuple(names), **more)), run)
    (call,) = calls
    return vectors, call


def test_a_label_is_the_mean_of_its_sentences_made_unit_before_and_after(bundle: Bundle):
    vectors, call = embedded(
        bundle, ["red"], [[2, 0, 0], [0, 1, 0], [0, 0.5, 0]], templates=("{} one", "{} two", "{} three")
    )
    assert call.keys == ("red one", "red two", "red three")
    # unit: x, y, y; mean (1, 2, 0) / 3; unit again (1, 2, 0) / sqrt(5)
    assert vectors == pytest.approx(np.array([[1, 2, 0]]) / 5**0.5, abs=1e-6)
    assert vectors.dtype == np.float32


def test_each_distinct_sentence_is_asked_for_once(bundle: Bundle):
    vectors, call = embedded(bundle, ["red", "green", "red"], [[1, 0, 0], [0, 1, 0]])
    assert call.keys == ("red", "green")
    assert len(call.feeds["ids"]) == 2
    assert vectors.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_descriptions_take_the_place_of_the_templates_and_are_any_number(bundle: Bundle):
    vectors, call = embedded(
        bundle,
        ["green", "red"],
        [[0, 3, 0], [1, 0, 0], [0, 0, 1]],
        templates=("a {}",),
        descriptions={"red": ("r1", "r2")},
    )
    assert call.keys == ("a green", "r1", "r2")
    assert vectors == pytest.approx(np.array([[0, 1, 0], [0.5**0.5, 0, 0.5**0.5]]), abs=1e-6)


def test_texts_that_are_known_are_not_tokenized(bundle: Bundle):
    bundle.text = None  # so that to ask for it fails
    rows = {"text_embeds": np.eye(3, dtype=np.float32)[[1, 0]]}
    known = Known({("text", ("green", "red")): rows})
    for asked in (3, 1):  # the second time the labels themselves are known
        walk = Walk(labels(bundle, Classifier(("green", "red", "green"))), Stopwatch(), known)
        assert walk.step().value.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
        assert known.asked == asked
        known.asked = 0


def test_other_labels_or_templates_are_not_taken_for_those_that_are_known(bundle: Bundle):
    known = Known({})
    for names, more in [
        (("a", "b"), {}),
        (("a', 'b",), {}),
        (("b", "a"), {}),
        (("a",), {"templates": ("b {}",)}),
        (("a", "b {}"), {}),
        (("a", "b"), {"templates": ("x {}",)}),
        (("a", "b"), {"descriptions": {"a": ("x",)}}),
    ]:
        walk = Walk(labels(bundle, Classifier(names, **more)), Stopwatch(), known)
        count = len(walk.step().keys)
        walk.step({"text_embeds": np.eye(3, dtype=np.float32)[:count]})
    assert len(known.kept) == 7


def test_a_label_may_hold_braces_and_a_template_no_code(bundle: Bundle):
    _, call = embedded(bundle, ["{0} {}"], [[1, 0, 0]], templates=("{}",))
    assert call.keys == ("{0} {}",)


def test_unit_rows_have_length_one_and_zero_stays_zero():
    rows = unit(np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-3]]))
    assert rows == pytest.approx(np.array([[0.6, 0.8], [0, 0], [0, 1]]), abs=1e-7)
    assert rows.dtype == np.float32


def test_many_texts_go_in_groups_of_like_length_and_come_back_in_their_order(bundle: Bundle):
    """One long text among many pads its own group and no other; 6 tokens are the context."""
    sentences = [("red " * (1 + i % 5)).strip() + (" blue" if i % 2 else "") for i in range(2 * CHUNK + 3)]
    calls: list[Call] = []

    def run(call: Call) -> Arrays:
        calls.append(call)
        return {"text_embeds": (call.feeds["ids"][:, :, None] == [[[2, 3, 4]]]).sum(axis=1).astype(np.float32)}

    rows = drive(texts(bundle, sentences), run)
    assert rows.tolist() == [[one.split().count(word) for word in ("red", "green", "blue")] for one in sentences]
    widths = [call.feeds["ids"].shape for call in calls]
    assert widths == sorted(widths, key=lambda shape: shape[1])
    assert [count for count, _ in widths] == [CHUNK, CHUNK, 3]
    assert widths[0][1] < widths[-1][1]
    with pytest.raises(TextTooLong, match=r"text 100 .* has 7 tokens"):
        drive(texts(bundle, [*sentences[:100], "red " * 7, *sentences[100:]]), run)
