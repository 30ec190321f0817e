"""classify over invented embeddings: its calls, and its answer from their outputs."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadImage, BadRequest, TaskNotServed, TooManyLabels
from calmclip.models.flow import Arrays, Call, drive
from calmclip.models.tasks.classify import ClassifyRequest, Ranking, classify, logits

Png = Callable[..., bytes]


class Graphs:
    """Answers `image` with one vector and `text` with ``texts``, and records the calls."""

    def __init__(self, image: Sequence[float], texts: Sequence[Sequence[float]]) -> None:
        self.answers = {"image": np.array([image], np.float32), "text": np.array(texts, np.float32)}
        self.calls: list[Call] = []

    def __call__(self, call: Call) -> Arrays:
        self.calls.append(call)
        return {f"{call.graph}_embeds": self.answers[call.graph]}


def rank(bundle: Bundle, graphs: Graphs, picture: bytes, labels: Sequence[str], **more: object) -> Ranking:
    return drive(classify(bundle, ClassifyRequest(picture, labels, **more)), graphs)  # type: ignore[arg-type]


def test_scores_are_a_softmax_of_scaled_cosines(bundle: Bundle, png: Png):
    graphs = Graphs([0.6, 0.8, 0], [[1, 0, 0], [0, 1, 0]])
    first, second = rank(bundle, graphs, png("red"), ["red", "green"])
    # logits 2 * 0.6 and 2 * 0.8; softmax: 1 / (1 + e^-0.4) = 0.598688
    assert (first.label, first.index, second.label, second.index) == ("green", 1, "red", 0)
    assert (first.score, second.score) == pytest.approx((0.598688, 0.401312), abs=1e-6)
    assert (first.cosine, second.cosine) == pytest.approx((0.8, 0.6), abs=1e-6)


def test_texts_are_called_by_key_and_one_picture_without(bundle: Bundle, png: Png):
    graphs = Graphs([1, 0, 0], [[1, 0, 0], [0, 1, 0]])
    rank(bundle, graphs, png((255, 0, 51)), ["red", "green"])
    text, image = graphs.calls
    assert (text.graph, text.keys) == ("text", ("red", "green"))
    assert text.feeds["ids"].tolist() == [[2], [3]]
    assert (image.graph, image.keys) == ("image", None)
    assert image.feeds["pixels"].shape == (1, 3, 4, 4)
    assert image.feeds["pixels"][0, :, 0, 0] == pytest.approx([1.0, 0.0, 0.2])  # x / 255, mean 0, std 1


def test_ties_go_to_the_lower_index(bundle: Bundle, png: Png):
    graphs = Graphs([0, 0, 1], [[1, 0, 0], [0, 0, 1], [0, 1, 0]])
    assert [r.index for r in rank(bundle, graphs, png("blue"), ["red", "blue", "green"])] == [1, 0, 2]


def test_top_k_cuts_the_list_and_not_the_softmax(bundle: Bundle, png: Png):
    graphs = Graphs([0, 0, 1], [[1, 0, 0], [0, 0, 1], [0, 1, 0]])
    (best,) = rank(bundle, graphs, png("blue"), ["red", "blue", "green"], top_k=1)
    assert best.score == pytest.approx(0.786986, abs=1e-6)  # e^2 / (e^2 + 2)
    assert len(rank(bundle, graphs, png("blue"), ["red", "blue", "green"], top_k=10).labels) == 3


def test_one_label_twice_is_two_labels_and_one_text(bundle: Bundle, png: Png):
    graphs = Graphs([1, 0, 0], [[1, 0, 0]])
    ranking = rank(bundle, graphs, png("red"), ["red", "red"])
    assert [(r.index, r.score) for r in ranking] == [(0, 0.5), (1, 0.5)]
    assert graphs.calls[0].keys == ("red",)


@pytest.mark.parametrize(
    ("labels", "more", "error", "says"),
    [
        ([], {}, TooManyLabels, "no labels were given; expected at least one"),
        (["red", " "], {}, BadRequest, "label 1 is empty"),
        ("red", {}, BadRequest, "labels is the text 'red'; expected a list"),
        (["red"], {"top_k": 0}, BadRequest, "top_k is 0; expected at least 1"),
        (["red"], {"templates": ["a photo"]}, BadRequest, r"'a photo' has no '\{\}' where the label belongs"),
    ],
)
def test_invalid_requests_are_refused_before_any_graph_runs(
    bundle: Bundle, png: Png, labels: Sequence[str], more: dict[str, object], error: type[Exception], says: str
):
    graphs = Graphs([1, 0, 0], [[1, 0, 0]])
    with pytest.raises(error, match=says):
        rank(bundle, graphs, png("red"), labels, **more)
    assert not graphs.calls


def test_a_bad_picture_is_refused_before_any_graph_runs(bundle: Bundle):
    graphs = Graphs([1, 0, 0], [[1, 0, 0]])
    with pytest.raises(BadImage):
        rank(bundle, graphs, b"no picture", ["red"])
    assert not graphs.calls


def test_a_bundle_that_does_not_classify_names_its_tasks(bundle: Bundle, png: Png):
    bundle.tasks = ("embed",)
    with pytest.raises(TaskNotServed, match="does not serve 'classify'; it serves embed") as refused:
        rank(bundle, Graphs([1, 0, 0], [[1, 0, 0]]), png("red"), ["red"])
    assert refused.value.known == ["embed"]


def test_a_classifier_has_defaults_for_the_request_and_the_bundle_for_the_classifier(bundle: Bundle, png: Png):
    classifier = Classifier(("red", "blue"), ("a {}",), {"blue": ("the sea",)}, temperature=2.0, none_below=0.9)
    graphs = Graphs([0.6, 0.8, 0], [[1, 0, 0], [0, 1, 0]])
    ranking = rank(bundle, graphs, png("red"), [], classifier=classifier)
    assert graphs.calls[0].keys == ("a red", "the sea")
    # the bundle's head: logits 1.2 and 1.6, divided by 2; softmax 1 / (1 + e^-0.2) = 0.549834
    assert [(r.label, r.score) for r in ranking] == [
        ("blue", pytest.approx(0.549834)),
        ("red", pytest.approx(0.450166)),
    ]
    assert (ranking.none, ranking.temperature) == (True, 2.0)
    graphs = Graphs([0.6, 0.8, 0], [[0, 1, 0], [1, 0, 0]])
    more = {"templates": ["{}"], "classifier": classifier, "temperature": 1, "none_below": 0.5}
    ranking = rank(bundle, graphs, png("red"), ["blue", "green"], **more)
    assert graphs.calls[0].keys == ("blue", "green")
    assert (ranking.none, ranking.temperature) == (False, 1)


def test_logits_are_those_of_the_labels_in_their_order(bundle: Bundle, png: Png):
    graphs = Graphs([0.6, 0.8, 0], [[1, 0, 0], [0, 1, 0]])
    row = drive(logits(bundle, png("red"), Classifier(("red", "green"))), graphs)
    assert row == pytest.approx([1.2, 1.6])
