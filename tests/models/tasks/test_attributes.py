"""PerceptionCLIP's rule: against sums written out in float64 and in decimals, and against plain zero-shot."""

import math
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.cache import RowCache
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import drive
from calmclip.models.tasks.attributes import MAX_SHOWN, Attributes, attributed, check_sentences, inferred, mixed
from calmclip.models.tasks.classify import ClassifyRequest, Ranking, classify
from tests.models.tasks.graphs import Graphs, row

Png = Callable[..., bytes]
LABELS = ["red", "green", "blue"]
PLACES, TIMES = ["land", "sea", ""], ["day", "night"]
# what each composite adds to a sentence, by hand; the last attribute changes first
COMPOSITES = [", land, day", ", land, night", ", sea, day", ", sea, night", ", day", ", night"]


def rank(bundle: Bundle, graphs: Graphs, picture: bytes, **more: Any) -> Ranking:
    return drive(classify(bundle, ClassifyRequest(picture, LABELS, **more)), graphs)


def by_index(ranking: Ranking) -> list[float]:
    return [ranked.score for ranked in sorted(ranking, key=lambda ranked: ranked.index)]


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / math.fsum(powers) for power in powers]


def cosine(sentence: str) -> float:
    """Of the picture and a sentence, in float64."""
    return float(row("picture").astype(np.float64) @ row(sentence).astype(np.float64))


@pytest.mark.parametrize("more", [{}, {"temperature": 0.5}, {"top_k": 2, "none_below": 0.9}])
def test_one_value_is_plain_zero_shot_with_that_sentence_to_the_bit(bundle: Bundle, png: Png, more: dict[str, Any]):
    graphs = Graphs()
    asked = rank(bundle, graphs, png("red"), attributes={"place": ["sea"]}, **more)
    plain = rank(bundle, graphs, png("red"), templates=["{}, sea"], **more)
    assert asked.labels == plain.labels
    assert (asked.none, asked.temperature) == (plain.none, plain.temperature)
    assert asked.inferred is not None
    assert asked.inferred.marginals == {"place": {"sea": 1.0}}
    assert (
        rank(bundle, graphs, png("red"), attributes={"place": [""]}, **more).labels
        == rank(bundle, graphs, png("red"), **more).labels
    )


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize(("tau", "temperature"), [(1, 1), (0.25, 1), (3, 0.5)])
def test_two_attributes_are_the_sums_of_the_paper(
    bundle: Bundle, png: Png, with_labels: bool, tau: float, temperature: float
):
    attributes = Attributes({"place": PLACES, "time": TIMES}, tau, with_labels)
    ranking = rank(bundle, Graphs(), png("red"), attributes=attributes, temperature=temperature)
    f = [[2 * cosine(label + text) / temperature for label in LABELS] for text in COMPOSITES]  # the head's scale is 2
    if with_labels:
        totals = [math.fsum(math.exp(value / tau) for value in values) for values in f]
    else:
        totals = [math.exp(2 * cosine("object" + text) / temperature / tau) for text in COMPOSITES]
    weights = [total / math.fsum(totals) for total in totals]
    expected = [
        math.fsum(weight * softmax(values)[label] for weight, values in zip(weights, f, strict=True))
        for label in range(3)
    ]
    assert by_index(ranking) == pytest.approx(expected, abs=1e-6)
    assert math.fsum(by_index(ranking)) == pytest.approx(1, abs=1e-6)
    cosines = [ranked.cosine for ranked in sorted(ranking, key=lambda ranked: ranked.index)]
    assert cosines == pytest.approx(
        [math.fsum(w * cosine(label + text) for w, text in zip(weights, COMPOSITES, strict=True)) for label in LABELS],
        abs=1e-6,
    )
    assert ranking.inferred is not None
    assert ranking.inferred.composites is not None
    assert dict(ranking.inferred.composites) == pytest.approx(
        dict(zip((text.removeprefix(", ") for text in COMPOSITES), weights, strict=True)), abs=1e-6
    )
    probabilities = [probability for _, probability in ranking.inferred.composites]
    assert probabilities == sorted(probabilities, reverse=True)
    place, time = ranking.inferred.marginals["place"], ranking.inferred.marginals["time"]
    assert [*place] == PLACES
    assert [*place.values()] == pytest.approx([math.fsum(weights[2 * i : 2 * i + 2]) for i in range(3)], abs=1e-6)
    assert [*time.values()] == pytest.approx([math.fsum(weights[i::2]) for i in range(2)], abs=1e-6)


def test_an_infinite_tau_is_the_mean_over_the_values(bundle: Bundle, png: Png):
    ranking = rank(bundle, Graphs(), png("red"), attributes=Attributes({"place": PLACES}, math.inf))
    plain = [
        by_index(rank(bundle, Graphs(), png("red"), templates=["{}" + (f", {text}" if text else "")]))
        for text in PLACES
    ]
    assert by_index(ranking) == pytest.approx(np.mean(plain, axis=0).tolist(), abs=1e-6)
    assert ranking.inferred is not None
    assert [*ranking.inferred.marginals["place"].values()] == pytest.approx([1 / 3] * 3, abs=1e-12)


def test_logits_of_thousands_are_summed_as_decimals_are(bundle: Bundle):
    """Plain powers of these overflow in float64."""
    draw = np.random.default_rng(4)
    image = row("picture")[None]
    text = draw.standard_normal((4, 3, 3)).astype(np.float32)
    text /= np.linalg.norm(text, axis=-1, keepdims=True)
    classifier = replace(bundle.classifier, labels=tuple(LABELS), head="cosine", params={"scale": 100.0})
    attributes = Attributes({"place": ["a", "b", "c", "d"]}, tau=0.1)
    scores, _, answer = mixed(classifier, attributes, image, text, temperature=0.5)
    with localcontext(prec=60):
        f = [[Decimal(float(np.float32(100) * (image[0] @ t)) / 0.5) for t in of_z] for of_z in text]
        totals = [sum((value / Decimal("0.1")).exp() for value in values) for values in f]
        weights = [total / sum(totals) for total in totals]
        powers = [[value.exp() for value in values] for values in f]
        expected = [
            float(sum(w * p[label] / sum(p) for w, p in zip(weights, powers, strict=True))) for label in range(3)
        ]
    assert [*answer.marginals["place"].values()] == pytest.approx([float(weight) for weight in weights], rel=2e-3)
    assert scores == pytest.approx(expected, abs=1e-4)
    assert scores.sum() == pytest.approx(1, abs=1e-6)


def test_the_scores_of_a_sigmoid_head_are_mixed_each_by_itself(bundle: Bundle, png: Png):
    classifier = Classifier(head="sigmoid", params={"scale": 4.0, "bias": -1.0})
    ranking = rank(bundle, Graphs(), png("red"), attributes={"time": TIMES}, classifier=classifier)
    f = [[4 * cosine(f"{label}, {text}") - 1 for label in LABELS] for text in TIMES]
    totals = [math.fsum(map(math.exp, values)) for values in f]
    expected = [
        math.fsum(total * 1 / (1 + math.exp(-values[label])) for total, values in zip(totals, f, strict=True))
        / math.fsum(totals)
        for label in range(3)
    ]
    assert by_index(ranking) == pytest.approx(expected, abs=1e-6)


def test_a_repeated_request_embeds_no_text(bundle: Bundle, png: Png):
    graphs, cache = Graphs(), RowCache(1000)
    answers = [
        drive(
            classify(bundle, ClassifyRequest(png("red"), LABELS, attributes={"place": PLACES, "time": TIMES})),
            graphs,
            cache=partial(cache.answer, bundle.digest),
        )
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert [call.graph for call in graphs.calls] == ["text", "image", "image"]
    assert sorted(graphs.calls[0].keys or ()) == sorted(label + text for label, text in product(LABELS, COMPOSITES))
    for other in (Attributes({"place": PLACES, "time": TIMES}, with_labels=False), Attributes({"place": PLACES})):
        drive(
            classify(bundle, ClassifyRequest(png("red"), LABELS, attributes=other)),
            graphs,
            cache=partial(cache.answer, bundle.digest),
        )
        assert graphs.calls[-2].graph == "text"  # these rows are others


def test_a_sentence_keeps_its_full_stop():
    assert attributed("a photo of a cat.", "on land") == "a photo of a cat, on land."
    assert attributed("a photo of a cat", "on land, by day") == "a photo of a cat, on land, by day"
    assert attributed("a photo of a cat.", "") == "a photo of a cat."


def test_descriptions_of_a_label_get_the_values_too(bundle: Bundle, png: Png):
    graphs = Graphs()
    more = {"templates": ["a {}."], "descriptions": {"blue": ["wet", "cold."]}, "attributes": {"time": ["day"]}}
    rank(bundle, graphs, png("red"), **more)
    assert set(graphs.calls[0].keys or ()) == {"a red, day.", "a green, day.", "wet, day", "cold, day."}


def test_many_composites_are_answered_by_their_marginals_alone():
    count = MAX_SHOWN + 2
    attributes = Attributes({"a": [str(i) for i in range(count // 2)], "b": ["x", "y"]})
    answer = inferred(attributes, np.full(count, 1 / count))
    assert answer.composites is None
    assert answer.marginals["b"] == pytest.approx({"x": 0.5, "y": 0.5})


def test_the_number_of_sentences_is_limited():
    classifier = Classifier(("cat", "dog"), ("a {}", "the {}"), {"dog": ("it barks",)})  # 3 sentences
    attributes = Attributes({"a": ["1", "2"], "b": ["1", "2", "3"]})
    check_sentences(classifier, attributes, 18)
    with pytest.raises(BadRequest, match="3 sentences of 2 labels, each with 6 attribute values, are 18; at most 17"):
        check_sentences(classifier, attributes, 17)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({}, "0 attributes were given; expected 1 to 8"),
        ({str(i): ["a"] for i in range(9)}, "9 attributes were given"),
        (["place"], "attributes is of the type list; expected names and values"),
        ({" ": ["a"]}, "has the name ' '"),
        ({"place": "land"}, "the attribute 'place' is the text 'land'; expected a list of texts"),
        ({"place": []}, "the attribute 'place' has 0 values; expected 1 to 1000, such as 'on land'"),
        ({"place": [*map(str, range(1001))]}, "the attribute 'place' has 1001 values"),
        ({"place": ["land", " "]}, "the attribute 'place': value 1 is blank"),
        ({"place": ["land", "sea", "land"]}, "the attribute 'place' has the value 'land' twice"),
        ({"place": ["x" * 1001]}, "value 0 has 1001 characters; at most 1000"),
    ],
)
def test_impossible_attributes_are_refused_before_any_graph_runs(bundle: Bundle, png: Png, attributes: Any, says: str):
    graphs = Graphs()
    with pytest.raises(BadRequest, match=says):
        rank(bundle, graphs, png("red"), attributes=attributes)
    assert not graphs.calls


@pytest.mark.parametrize("tau", [0, -1, 0.009, math.nan])
def test_tau_has_a_lower_bound(tau: float):
    with pytest.raises(BadRequest, match=r"expected at least 0\.01"):
        Attributes({"place": ["land"]}, tau)


def test_a_head_with_arrays_of_its_own_is_refused(bundle: Bundle, png: Png):
    fitted = Classifier(
        tuple(LABELS), head="prototype", assets={"prototypes": np.eye(3, dtype=np.float32)}, family=bundle.family
    )
    graphs = Graphs()
    with pytest.raises(BadRequest, match="'prototype' scores pictures by arrays of its own; attributes needs a head"):
        rank(bundle, graphs, png("red"), attributes={"time": TIMES}, classifier=fitted)
    assert not graphs.calls
