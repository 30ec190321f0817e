"""explain over invented vectors: contributions of a linear scorer, margins, flags, and the errors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ExplainDefaults, Fitted
from calmclip.models.errors import BadImage, BadRequest, TaskNotServed, TextTooLong
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.runner import Runner
from calmclip.models.tasks.explain import METHODS, ExplainRequest, Explanation, check, explain

Png = Callable[..., bytes]
GREY = np.full((4, 4, 3), 128, np.uint8)
VOCABULARY = ["dog", "cat", "red", "sofa", "beach", "runs"]


def run(bundle: Bundle, picture: Array, vectors: dict[str, Array], caption: str, **asked: Any) -> Explanation:
    """A text's vector is the sum of its words' vectors, without a normalization."""
    calls: list[Call] = []

    def answer(call: Call) -> Arrays:
        calls.append(call)
        if call.graph == "image":
            return {"image_embeds": picture[None]}
        empty = np.zeros(len(picture), np.float32)
        return {"text_embeds": np.stack([sum((vectors[w] for w in text.split()), empty) for text in call.keys or ()])}

    explanation = drive(explain(bundle, ExplainRequest(GREY, caption, **asked)), answer)
    assert [call.graph for call in calls] == ["image", "text"]  # all texts in one batch
    return explanation


def with_defaults(bundle: Bundle, **values: float) -> Bundle:
    fitted = ExplainDefaults(fitted={"leave_one_out": Fitted(**values)})
    bundle.manifest = bundle.manifest.model_copy(update={"explain": fitted})
    return bundle


def test_contributions_of_a_linear_scorer_are_exact(bundle: Bundle):
    draw = np.random.default_rng(0)
    vectors = {word: draw.standard_normal(12).astype(np.float32) for word in VOCABULARY}
    picture = draw.standard_normal(12).astype(np.float32)
    picture /= np.linalg.norm(picture)
    answer = run(bundle, picture, vectors, " ".join(VOCABULARY))
    wide = {word: float(vector.astype(np.float64) @ picture.astype(np.float64)) for word, vector in vectors.items()}
    assert {word.text: word.contribution for word in answer.words} == pytest.approx(wide, abs=1e-6)
    assert answer.score == pytest.approx(sum(wide.values()), abs=1e-6)
    assert answer.clip_score == pytest.approx(2.5 * max(answer.score, 0), abs=1e-9)
    negative = sum(value for value in wide.values() if value < 0)
    assert negative < 0
    assert answer.f_score == pytest.approx(answer.clip_score + 2.5 * negative, abs=1e-5)
    assert answer.words[answer.lowest or 0].text == min(wide, key=lambda word: wide[word])


def test_a_word_planted_from_another_picture_is_the_lowest(bundle: Bundle):
    axes = np.eye(len(VOCABULARY), dtype=np.float32)
    vectors = dict(zip(VOCABULARY, axes, strict=True))
    for planted in VOCABULARY:
        shown = [word for word in VOCABULARY if word != planted]
        picture = sum(vectors[word] for word in shown) - 0.1 * vectors[planted]
        answer = run(bundle, picture / np.linalg.norm(picture), vectors, " ".join(VOCABULARY), threshold=0.0)
        assert [word.text for word in answer.flagged] == [planted]
        assert VOCABULARY[answer.lowest or 0] == planted


def test_a_margin_is_the_contribution_beyond_what_the_weight_lets_expect(bundle: Bundle):
    """Both words contribute .6; "dog" weighs 1, "sofa" weighs 2."""
    vectors = {"dog": np.float32([0.6, 0.8, 0]), "sofa": np.float32([0.6, 0, 4**0.5 * (1 - 0.09) ** 0.5])}
    picture = np.float32([1, 0, 0])
    answer = run(with_defaults(bundle, expected=0.25, threshold=0.2), picture, vectors, "dog sofa")
    assert [word.contribution for word in answer.words] == pytest.approx([0.6, 0.6], abs=1e-6)
    assert [word.margin for word in answer.words] == pytest.approx([0.6 - 0.25, 0.6 - 0.5], abs=1e-6)
    assert [word.flagged for word in answer.words] == [False, True]
    assert (answer.lowest, answer.threshold) == (1, 0.2)
    assert run(bundle, picture, vectors, "dog sofa", threshold=0.05).flagged == ()


def test_function_words_contribute_but_are_never_flagged(bundle: Bundle):
    vectors = {"the": np.float32([-1, 0]), "dog": np.float32([0, 1])}
    answer = run(bundle, np.float32([1, 0]), vectors, "the dog", threshold=0.5)
    assert [(word.text, word.contribution, word.flagged) for word in answer.words] == [
        ("the", -1, False),
        ("dog", 0, True),
    ]
    assert answer.lowest == 1
    assert answer.f_score == 0  # the negative contribution is a function word's
    assert run(bundle, np.float32([1, 0]), vectors, "the").lowest is None


def test_a_caption_of_one_word_is_all_that_word_contributes(bundle: Bundle):
    answer = run(bundle, np.float32([0.6, 0.8]), {"dog": np.float32([1, 0])}, "dog")
    assert answer.words[0].contribution == pytest.approx(answer.score) == pytest.approx(0.6)


def test_the_runner_explains_with_graphs(bundle: Bundle, png: Png):
    """The vector of "red blue" is (1, 0, 1) / sqrt 2; without a word it is one of two axes."""
    answer = Runner(bundle).explain(png("red"), "red blue", threshold=-0.1)
    half = 2**-0.5
    assert [word.contribution for word in answer.words] == pytest.approx([half, half - 1], abs=1e-6)
    assert [(word.text, word.start, word.end) for word in answer.flagged] == [("blue", 4, 8)]


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"caption": "..."}, BadRequest, "has no word; expected some words"),
        ({"caption": "a " * 200}, BadRequest, "the caption has 200 words; at most 128 are explained. Shorten it"),
        ({"caption": "x" * 1001}, BadRequest, "the caption has 1001 characters"),
        ({"caption": "a b c d e f g"}, TextTooLong, "has 7 tokens; this model reads at most 6"),
        ({"method": "gradiant"}, BadRequest, "no method 'gradiant'; did you mean 'gradient'"),
        ({"method": "gradient"}, TaskNotServed, "no graph 'attribution', .* again with --attribution. It serves leave"),
        ({"threshold": 2.0}, BadRequest, "threshold is 2.0; expected -1 to 1"),
        ({"image": b"none"}, BadImage, "."),
    ],
)
def test_wrong_requests_say_what_is_expected_before_a_graph_runs(
    bundle: Bundle, asked: dict[str, Any], error: type[Exception], says: str
):
    def answer(call: Call) -> Arrays:
        raise AssertionError(call.graph)

    with pytest.raises(error, match=says):
        drive(explain(bundle, ExplainRequest(**{"image": GREY, "caption": "red", **asked})), answer)


def test_a_manifest_names_methods_that_its_graphs_serve(bundle: Bundle):
    for wrong in (ExplainDefaults(method="gradient"), ExplainDefaults(fitted={"gradient": Fitted()})):
        with pytest.raises(ValueError, match="names the method 'gradient'; the graphs serve leave_one_out"):
            check(bundle.manifest.model_copy(update={"explain": wrong}))
    check(bundle.manifest.model_copy(update={"explain": ExplainDefaults(method="leave_one_out")}))
    assert all(method.role == "" or "--attribution" in method.remedy for method in METHODS.values())
