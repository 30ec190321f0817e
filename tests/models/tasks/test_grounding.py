"""GRAIN's rule: against a brute-force search in float64, and against plain zero-shot."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.cache import RowCache
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadImage, BadRequest, TaskNotServed
from calmclip.models.flow import Arrays, drive
from calmclip.models.tasks.classify import ClassifyRequest, Ranking, classify
from calmclip.models.tasks.grounding import REGIONS, best
from tests.models.tasks.graphs import Graphs, row

Png = Callable[..., bytes]
LABELS = ["red", "green", "blue"]
DESCRIPTIONS = {"red": ["a", "b", "c"], "green": ["d"], "blue": ["e", "a"]}


def regions(names: Sequence[str], objectness: Sequence[float]) -> Arrays:
    """The outputs of the graph `regions`: a box of the row of each name."""
    count = len(names)
    return {
        "class_embeds": np.stack([row(name) for name in names])[None],
        "boxes": np.full((1, count, 4), (0, 0, 8, 6), np.float32),
        "objectness": np.array([objectness], np.float32),
    }


# Seven regions: the five best count, and "q6", whose objectness is 0, never does.
SEVEN = [f"q{i}" for i in range(7)]
PROPOSED = regions(SEVEN, [0.3, 0.9, 0.1, 0.8, 0.2, 0.7, 0.0])
BEST = ["q1", "q3", "q5", "q0", "q4"]


def rank(bundle: Bundle, picture: Any, alpha: float | None, graphs: Graphs | None = None, **more: Any) -> Ranking:
    asked = {"descriptions": DESCRIPTIONS, "alpha": alpha, **more}
    return drive(classify(bundle, ClassifyRequest(picture, LABELS, **asked)), graphs or Graphs(PROPOSED))


def brute_force(
    alpha: float, scale: float = 2.0, descriptions: Mapping[str, Sequence[str]] = DESCRIPTIONS
) -> list[float]:
    """The softmax of the paper's scores, in float64, in the order of the labels."""

    def sim(name: str, other: str) -> float:
        return float(sum(float(x) * float(y) for x, y in zip(row(name), row(other), strict=True)))

    scores = []
    for label in LABELS:
        highest = [max(sim(region, line) for line in descriptions[label]) for region in BEST]
        scores.append(alpha * sim("picture", label) + (1 - alpha) * sum(highest) / len(highest))
    powers = np.exp(scale * np.array(scores))
    return (powers / powers.sum()).tolist()


def by_index(ranking: Ranking) -> list[float]:
    return [ranked.score for ranked in sorted(ranking, key=lambda ranked: ranked.index)]


@pytest.mark.parametrize("alpha", [0, 0.3, 0.75, 1])
def test_the_mean_over_the_best_regions_of_the_best_description(finder: Bundle, png: Png, alpha: float):
    assert len(BEST) == REGIONS
    ranking = rank(finder, png("red"), alpha)
    assert by_index(ranking) == pytest.approx(brute_force(alpha), abs=1e-6)
    cosines = [ranked.cosine for ranked in sorted(ranking, key=lambda ranked: ranked.index)]
    assert cosines == pytest.approx([float(row("picture") @ row(label)) for label in LABELS], abs=1e-6)


def test_temperature_and_none_below_hold_as_ever(finder: Bundle, png: Png):
    ranking = rank(finder, png("red"), 0.5, temperature=4.0, none_below=0.9, top_k=2)
    assert ranking.labels == rank(finder, png("red"), 0.5, temperature=4.0).labels[:2]
    assert sorted(by_index(rank(finder, png("red"), 0.5, temperature=4.0))) == pytest.approx(
        sorted(brute_force(0.5, scale=0.5)), abs=1e-6
    )
    assert (ranking.none, ranking.temperature) == (True, 4.0)


def test_a_sigmoid_head_scores_each_label_by_itself(finder: Bundle, png: Png):
    classifier = Classifier(head="sigmoid", params={"scale": 3.0, "bias": -1.0})
    scores = by_index(rank(finder, png("red"), 0.25, classifier=classifier))
    odds = np.log(brute_force(0.25, scale=1.0))  # the scores, up to a constant
    logits = np.log(np.array(scores) / (1 - np.array(scores)))
    assert (logits - logits[0]) / 3 == pytest.approx(odds - odds[0], abs=1e-5)


def test_alpha_1_is_zero_shot_to_the_bit_and_runs_no_regions(finder: Bundle, png: Png):
    graphs = Graphs()
    assert rank(finder, png("red"), 1, graphs) == rank(finder, png("red"), None, graphs, descriptions={})
    assert {call.graph for call in graphs.calls} == {"image", "text"}


@pytest.mark.parametrize("alpha", [0, 0.2, 0.6, 1])
def test_a_description_that_is_the_label_and_a_region_that_is_the_picture_change_nothing(
    finder: Bundle, png: Png, alpha: float
):
    whole = Graphs(regions(["picture"], [0.5]))
    same = {"descriptions": {label: [label] for label in LABELS}}
    ranking, plain = rank(finder, png("red"), alpha, whole, **same), rank(finder, png("red"), None, descriptions={})
    assert [ranked.label for ranked in ranking] == [ranked.label for ranked in plain]
    assert by_index(ranking) == pytest.approx(by_index(plain), abs=1e-6)


def test_without_proposals_the_picture_and_its_quarters_are_the_regions(mapped: Bundle, png: Png):
    cells = np.stack([row(f"q{i}") for i in range(4)])  # of a map of 2 x 2
    graphs = Graphs({"patches": cells.reshape(1, 2, 2, 3)})
    ranking = rank(mapped, png("red", (16, 16)), 0, graphs)
    mean = cells.astype(np.float64).mean(axis=0)
    rows = np.stack([mean / np.linalg.norm(mean), *cells])
    scores = [(rows @ np.stack([row(line) for line in DESCRIPTIONS[label]]).T).max(axis=1).mean() for label in LABELS]
    powers = np.exp(2 * np.array(scores))
    assert by_index(ranking) == pytest.approx((powers / powers.sum()).tolist(), abs=1e-6)
    assert [call.graph for call in graphs.calls][:2] == ["dense", "image"]


def test_of_a_picture_without_regions_the_picture_counts(finder: Bundle, png: Png):
    nothing = Graphs(regions(["q0", "q1"], [0, 0]))
    whole = Graphs(regions(["picture"], [0.5]))
    assert rank(finder, png("red"), 0.4, nothing) == rank(finder, png("red"), 0.4, whole)


def test_without_alpha_descriptions_replace_the_templates(bundle: Bundle, png: Png):
    graphs = Graphs()
    rank(bundle, png("red"), None, graphs, templates=["the {}"], descriptions={"red": ["a", "b"]})
    assert graphs.calls[0].keys == ("a", "b", "the green", "the blue")


def test_a_classifiers_descriptions_serve_and_a_requests_come_first(finder: Bundle, png: Png):
    kept = Classifier(descriptions={**{label: ("z",) for label in LABELS}, "red": ("y",)})
    asked = rank(finder, png("red"), 0.2, classifier=kept, descriptions={"red": DESCRIPTIONS["red"]})
    merged = {"red": DESCRIPTIONS["red"], "green": ["z"], "blue": ["z"]}
    assert by_index(asked) == pytest.approx(brute_force(0.2, descriptions=merged), abs=1e-6)


def test_a_repeated_request_embeds_no_text_and_other_descriptions_are_others(finder: Bundle, png: Png):
    cache = RowCache(1000)

    def ask(descriptions: Mapping[str, Sequence[str]], graphs: Graphs) -> list[float]:
        request = ClassifyRequest(png("red"), LABELS, descriptions=descriptions, alpha=0.5)
        return by_index(drive(classify(finder, request), graphs, cache=partial(cache.answer, finder.digest)))

    first, again, other = Graphs(PROPOSED), Graphs(PROPOSED), {**DESCRIPTIONS, "blue": ["f"]}
    assert ask(DESCRIPTIONS, first) == ask(DESCRIPTIONS, again)
    assert [call.graph for call in again.calls] == ["regions", "image"]
    assert ask(other, first) == pytest.approx(brute_force(0.5, descriptions=other), abs=1e-6)


def test_an_open_file_is_read_once(finder: Bundle, png: Png):
    assert rank(finder, io.BytesIO(png("red")), 0.5) == rank(finder, png("red"), 0.5)


@pytest.mark.parametrize(
    ("alpha", "more", "says"),
    [
        (1.5, {}, "alpha is 1.5; expected 0 to 1"),
        (0.5, {"descriptions": {"red": ["a"]}}, "the label 'green' has no descriptions. Send `descriptions`"),
        (1.0, {"descriptions": {}}, "the label 'red' has no descriptions"),
        (0.5, {"attributes": {"time": ["day"]}}, "`attributes` and `alpha`; expected at most one"),
        (None, {"descriptions": {"pink": ["a"]}}, "descriptions of 'pink', which is none of the 3 labels"),
        (None, {"descriptions": {"red": "a"}}, "the list of descriptions of 'red' is the text 'a'; expected a list"),
        (None, {"descriptions": {"red": []}}, "expected a list of sentences"),
        (
            0.5,
            {"classifier": Classifier(tuple(LABELS), head="prototype", assets={"prototypes": np.eye(3, dtype="f4")})},
            "'prototype' scores pictures by arrays of its own; alpha needs a head",
        ),
    ],
)
def test_impossible_requests_are_refused_before_any_graph_runs(
    finder: Bundle, png: Png, alpha: float | None, more: dict[str, Any], says: str
):
    graphs = Graphs(PROPOSED)
    with pytest.raises(BadRequest, match=says):
        rank(finder, png("red"), alpha, graphs, **more)
    assert not graphs.calls


def test_a_bundle_without_regions_and_a_broken_picture(bundle: Bundle, finder: Bundle, png: Png):
    graphs = Graphs(PROPOSED)
    with pytest.raises(TaskNotServed, match="has no graph 'dense', which gives boxes"):
        rank(bundle, png("red"), 0.5, graphs)
    with pytest.raises(BadImage):
        rank(finder, b"no picture", 0.5, graphs)
    assert not graphs.calls


def test_each_labels_columns_stay_together():
    logits = np.array([[1, 5, 2, 7], [3, 0, 9, 1]], np.float32)
    assert best(logits, [2, 1, 1]).tolist() == [[4.0, 5.5, 4.0]]
