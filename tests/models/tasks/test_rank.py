"""rank over invented vectors: the order, ties, what a score is, and the errors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, TaskNotServed
from calmclip.models.flow import Array, Arrays, Call, drive
from calmclip.models.runner import Runner
from calmclip.models.tasks.rank import RankRequest, Ranks, rank

Png = Callable[..., bytes]


def run(bundle: Bundle, vectors: Array, texts: Array, **asked: Any) -> Ranks:
    """The n-th picture has the n-th of ``vectors``, the n-th text the n-th of ``texts``."""
    rows = iter(vectors)

    def answer(call: Call) -> Arrays:
        if call.graph == "text":
            return {"text_embeds": texts}
        return {"image_embeds": next(rows)[None]}

    request = RankRequest([np.zeros((4, 4, 3), np.uint8)] * len(vectors), **asked)
    return drive(rank(bundle, request), answer)


def units(seed: int, count: int) -> Array:
    rows = np.random.default_rng(seed).standard_normal((count, 3))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_pictures_are_ordered_by_their_cosine_with_the_instruction(bundle: Bundle):
    pictures, text = units(0, 60), units(1, 1)
    answer = run(bundle, pictures, text, instruction="red")
    wide = [sum(float(a) * float(b) for a, b in zip(row, text[0], strict=True)) for row in pictures]
    assert [p.index for p in answer] == sorted(range(60), key=lambda i: (-wide[i], i))
    assert [p.score for p in answer] == pytest.approx(sorted(wide, reverse=True), abs=1e-6)
    assert answer.scale == "cosine"
    assert list(run(bundle, pictures, text, instruction="red", top=3)) == list(answer)[:3]


def test_ties_go_to_the_lower_index(bundle: Bundle):
    pictures = np.array([[0, 1, 0], [1, 0, 0]] * 30, np.float32)
    answer = run(bundle, pictures, np.array([[1, 0, 0]], np.float32), instruction="red")
    assert [(p.index, p.score) for p in answer] == [
        *((i, 1) for i in range(1, 60, 2)),
        *((i, 0) for i in range(0, 60, 2)),
    ]


def test_a_classifier_scores_by_the_logit_of_one_label(bundle: Bundle):
    pictures = np.array([[1, 0, 0], [0, 1, 0], [0.6, 0.8, 0]], np.float32)
    texts = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    classifier = Classifier(("red", "green"), temperature=4.0)
    answer = run(bundle, pictures, texts, classifier=classifier, label="green")
    assert answer.scale == "logit"
    # scale 2 of the bundle's head times the cosine; the temperature has no say
    assert [(p.index, p.score) for p in answer] == [(1, 2), (2, pytest.approx(1.6)), (0, 0)]
    first = run(bundle, pictures, texts, classifier=classifier)
    assert [p.index for p in first] == [0, 2, 1]


def test_a_score_depends_on_its_picture_alone(bundle: Bundle, png: Png):
    runner = Runner(bundle)
    colours = ["red", "lime", "orange", "navy"]
    answer = runner.rank([png(colour) for colour in colours], "green red")
    alone = {c: next(iter(runner.rank([png(c)], "green red"))).score for c in colours}
    assert [(colours[p.index], p.score) for p in answer] == sorted(alone.items(), key=lambda pair: -pair[1])
    assert colours[next(iter(answer)).index] == "orange"  # red and some green
    assert next(iter(answer)).score == pytest.approx((1 + 165 / 255) / (2 + 2 * (165 / 255) ** 2) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "expected `instruction` or `classifier`, one of them"),
        ({"instruction": "red", "classifier": Classifier(("red",))}, "one of them"),
        ({"instruction": "red", "label": "red"}, "the label 'red' has no classifier"),
        ({"classifier": Classifier(("red",)), "label": "green"}, "no label 'green'; it has 'red'"),
        ({"instruction": " "}, "text 0 is empty"),
        ({"instruction": "red", "top": 0}, "top is 0; expected at least 1"),
    ],
)
def test_wrong_requests_say_what_is_expected(bundle: Bundle, asked: dict[str, Any], says: str):
    with pytest.raises(BadRequest, match=says):
        run(bundle, units(0, 2), units(1, 1), **asked)


def test_no_pictures_are_an_error(bundle: Bundle):
    with pytest.raises(BadRequest, match="no pictures were given"):
        run(bundle, units(0, 0), units(1, 1), instruction="red")


def test_a_bundle_that_does_not_classify_does_not_rank(colours: dict[str, Any], write: Any, tmp_path: Any):
    from calmclip.models.bundle.store import read, seal, stage

    colours["tasks"] = ["embed"]
    with stage(tmp_path / "bundles", "colours") as staged:
        bundle = Bundle(read(seal(staged, write(staged)).directory))
    assert bundle.tasks == ("embed", "compress", "explain")
    with pytest.raises(TaskNotServed, match=r"does not serve .rank.; it serves embed, compress, explain"):
        run(bundle, units(0, 2), units(1, 1), instruction="red")
