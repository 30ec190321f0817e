"""Composed queries, stored ids and the least relevance of a search. Vectors of "colours" are worked out by hand."""

import math

import pytest

from calmclip.service.client import Client, NotFound, Part
from tests.asking import b64, until

URL = "/v1/collections/paints/search"


@pytest.fixture(scope="module")
def paints(client, picture):
    """red (1, 0, 0), green (0, 1, 0), blue (0, 0, 1), and yellow = (1, 1, 0) / sqrt(2)."""
    client.put("/v1/collections/paints", json={})
    items = [{"id": name, "text": name, "meta": {"hue": name}} for name in ("green", "blue", "yellow")]
    items.append({"id": "a/red", "image": b64(picture("red")), "meta": {"hue": "red"}})
    assert client.post("/v1/collections/paints/items", json={"items": items}).status_code == 200
    return client


def scores(client, query, **more):
    answer = client.post(URL, json={"query": query, **more})
    assert answer.status_code == 200, answer.text
    return {hit["id"]: hit["score"] for hit in answer.json()["hits"]}


def test_weights_add_unit_vectors(paints, picture):
    equal = scores(paints, [{"text": "red"}, {"text": "green"}])
    assert equal == pytest.approx({"yellow": 1, "a/red": 0.5**0.5, "green": 0.5**0.5, "blue": 0}, abs=1e-5)
    # (2, 1, 0) / sqrt(5); red as a picture
    heavy = scores(paints, [{"image": b64(picture("red")), "weight": 2}, {"text": "green"}])
    assert heavy == pytest.approx(
        {"yellow": 3 / 10**0.5, "a/red": 2 / 5**0.5, "green": 1 / 5**0.5, "blue": 0}, abs=1e-5
    )
    assert scores(paints, [{"text": "red", "weight": 3.5}]) == pytest.approx(scores(paints, {"text": "red"}), abs=1e-6)


def test_a_negative_part_is_subtracted(paints):
    """yellow - green = (.7071, -.2929, 0), of length sqrt(2 - sqrt(2)) = .7654."""
    less = scores(paints, [{"text": "yellow"}, {"text": "green", "weight": -1}])
    length = math.sqrt(2 - 2**0.5)
    want = {"a/red": 0.5**0.5 / length, "green": (0.5**0.5 - 1) / length, "blue": 0, "yellow": (1 - 0.5**0.5) / length}
    assert less == pytest.approx(want, abs=1e-5)
    assert max(less, key=less.get) == "a/red"
    opposite = scores(paints, {"text": "red", "weight": -1})
    assert opposite["a/red"] == pytest.approx(-1, abs=1e-5)


def test_a_stored_item_is_searched_by_its_id(paints):
    """It is no hit itself, and does not take the place of another."""
    alike = scores(paints, {"id": "a/red"}, top_k=3)
    assert alike == pytest.approx({"yellow": 0.5**0.5, "green": 0, "blue": 0}, abs=1e-5)
    both = scores(paints, [{"id": "a/red"}, {"id": "green"}, {"text": "blue", "weight": 1e-9}], top_k=1)
    assert both == pytest.approx({"yellow": 1}, abs=1e-5)
    twice = scores(paints, [{"id": "a/red"}, {"id": "a/red"}])
    assert twice == pytest.approx(alike, abs=1e-5)
    filtered = scores(paints, {"id": "a/red"}, filter={"hue": {"in": ["red", "blue"]}})
    assert filtered == pytest.approx({"blue": 0}, abs=1e-5)


def test_the_client_composes(paints, picture):
    calls = Client(str(paints.base_url))
    parts = [Part(image=picture("red")), Part("green"), Part(id="blue", weight=-0.5)]
    hits = calls.search("paints", parts=parts, top_k=2, min_relevance=0.0)
    assert hits[0].id == "yellow"
    assert hits[0].score == pytest.approx(2 / 2**0.5 / 1.5, abs=1e-5)
    assert (hits.min_relevance, hits.below) == (0, 0)
    assert [hit.id for hit in calls.search("paints", id="a/red", top_k=1)] == ["yellow"]
    with pytest.raises(NotFound, match="is the id 'pink'"):
        calls.search("paints", id="pink")
    with pytest.raises(TypeError, match="not both"):
        calls.search("paints", "red", parts=parts)
    with pytest.raises(TypeError, match="exactly one"):
        calls.search("paints", parts=[Part("red", id="green")])


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ([], "0 parts were given; expected 1 to 16"),
        ([{"text": "red"}] * 17, "17 parts were given"),
        ([{"text": "red", "weight": 0}], "`weight` is 0"),
        ([{"text": "red", "weight": 101}], "less than or equal to 100"),
        ([{"text": "red", "weight": True}], "weight"),
        ([{"text": "red", "weight": None}], "weight"),
        ([{"weight": 2}], "expected `text`, `image`, `vector` or `id`, one of them"),
        ([{"text": "red", "id": "green"}], "expected `text`, `image`, `vector` or `id`, one of them"),
        ([{"id": ""}], "at least 1"),
        ([{"text": "red"}, {"text": "red", "weight": -1}], "cancel each other out"),
        ([[{"text": "red"}]], "query.0"),
        ("red", "query.0"),
        (None, "query.0"),
    ],
)
def test_queries_that_are_none(paints, query, message):
    answer = paints.post(URL, json={"query": query})
    assert answer.status_code == 422
    assert message in answer.json()["detail"]


def test_unknown_ids_and_levels(paints):
    answer = paints.post(URL, json={"query": [{"text": "red"}, {"id": "pink"}]})
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/item-not-found")
    assert "part 1 of the query is the id 'pink'" in answer.json()["detail"]
    for level in (-0.1, 1.5, "0.5", True):
        assert paints.post(URL, json={"query": {"text": "red"}, "min_relevance": level}).status_code == 422


def test_hits_of_less_relevance_are_left_out(paints, picture):
    """References that are pictures differ in their mean colours; all reference texts are unknown words here."""
    query = {"image": b64(picture("red"))}
    until(lambda: paints.post(URL, json={"query": query}).json()["uncalibrated"] is None)
    answer = paints.post(URL, json={"query": query, "min_relevance": 0}).json()
    relevance = [hit["relevance"] for hit in answer["hits"]]
    assert len(relevance) == 4
    assert relevance == sorted(relevance, reverse=True)
    assert all(0 <= value <= 1 for value in relevance)
    assert relevance[0] > relevance[2]
    assert (answer["min_relevance"], answer["below"]) == (0, 0)
    level = (relevance[0] + relevance[2]) / 2
    fewer = paints.post(URL, json={"query": query, "min_relevance": level}).json()
    kept = sum(value >= level for value in relevance)
    assert (len(fewer["hits"]), fewer["below"], fewer["min_relevance"]) == (kept, 4 - kept, level)
    text = paints.post(URL, json={"query": {"text": "red"}, "min_relevance": 1}).json()
    assert [hit["relevance"] for hit in text["hits"]] == [None] * 4
    assert "fewer than 32 references differ" in text["uncalibrated"]
    assert text["below"] == 0


def test_the_setting_is_the_default(settings, serve, picture):
    with serve(settings(min_relevance=1)) as client:
        client.put("/v1/collections/paints", json={})
        items = [{"id": name, "image": b64(picture(name))} for name in ("green", "blue")]
        client.post("/v1/collections/paints/items", json={"items": items})
        query = {"query": {"image": b64(picture("red"))}}
        until(lambda: client.post(URL, json=query).json()["uncalibrated"] is None)
        answer = client.post(URL, json=query).json()
        assert (answer["hits"], answer["below"], answer["min_relevance"]) == ([], 2, 1)
        assert len(client.post(URL, json={**query, "min_relevance": 0}).json()["hits"]) == 2
