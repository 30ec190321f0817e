"""Expected values: the tiny bundle's vectors are mean colours (tests/service/conftest.py), its head's scale is 10."""

import json
import math

import fastapi.routing
import pytest

from tests.asking import b64, raw


def expected(*cosines: float) -> list[float]:
    powers = [math.exp(10 * c) for c in cosines]
    return [p / sum(powers) for p in powers]


RED_YELLOW_BLUE = dict(zip(("red", "yellow", "blue"), expected(1, math.sqrt(0.5), 0), strict=True))


def check(answer):
    assert answer.status_code == 200, answer.text
    labels = answer.json()["labels"]
    assert [row["label"] for row in labels] == ["red", "yellow", "blue"]
    assert [row["index"] for row in labels] == [1, 2, 0]
    assert [row["score"] for row in labels] == pytest.approx(list(RED_YELLOW_BLUE.values()), abs=1e-6)
    assert [row["cosine"] for row in labels] == pytest.approx([1, math.sqrt(0.5), 0], abs=1e-6)


def test_json_and_multipart_whose_repeated_field_is_a_list(client, picture):
    labels = {"labels": ["blue", "red", "yellow"]}
    check(client.post("/v1/classify", json={"image": b64(picture("red")), **labels}))
    check(client.post("/v1/classify", files={"image": ("r.png", picture("red"), "image/png")}, data=labels))


@pytest.mark.parametrize(("kind", "name"), [("image/png", "PNG"), ("image/jpeg", "JPEG"), ("image/webp", "WEBP")])
def test_raw_picture_with_fields_in_the_query(client, picture, kind, name):
    params = {"labels": ["blue", "red"], "top_k": 1, "model": "colours-int8"}
    answer = client.post("/v1/classify", params=params, **raw(picture("red", kind=name), kind))
    assert answer.json()["model"] == "colours-int8"
    assert [row["label"] for row in answer.json()["labels"]] == ["red"]


def test_templates_replace_the_prompts(client, picture):
    # "blue red" is (1, 0, 1) / sqrt(2): against red the cosine falls from 1 to sqrt(1/2)
    body = {"image": b64(picture("red")), "labels": ["red"], "templates": ["blue {}"]}
    labels = client.post("/v1/classify", json=body).json()["labels"]
    assert labels[0]["cosine"] == pytest.approx(math.sqrt(0.5), abs=1e-6)


def test_a_plain_request_id_is_returned_and_another_is_replaced(client, picture):
    def ask(request_id: str) -> str:
        return client.get("/healthz", headers={"x-request-id": request_id}).headers["x-request-id"]

    assert ask("abc-1.2_3") == "abc-1.2_3"
    assert ask("a b") != "a b"
    assert ask("x" * 65) != "x" * 65


@pytest.mark.parametrize("task", ["classify", "detect", "embed", "embeddings"])
def test_the_most_used_endpoints_skip_fastapis_dependencies(client, task, monkeypatch):
    searched = []
    monkeypatch.setattr(fastapi.routing, "solve_dependencies", lambda **kwargs: searched.append(1))
    assert client.post(f"/v1/{task}", json={"nothing": 1}).json()["type"] == "/problems/invalid-request"
    assert not searched


# "{}" is "a photo of a {}": the vector of "a red, blue thing" is (1, 0, 1) / sqrt(2).
ATTRIBUTES = {"place": ["blue", "yellow"]}


def mixture(cosines: list[list[float]]) -> tuple[list[float], list[float]]:
    """Cosines [Z, C] -> P(z|x) with the labels, and the scores of the labels, by plain sums."""
    powers = [[math.exp(10 * c) for c in row] for row in cosines]
    total = sum(map(sum, powers))
    weights = [sum(row) / total for row in powers]
    scores = [
        sum(w * row[c] / sum(row) for w, row in zip(weights, powers, strict=True)) for c in range(len(cosines[0]))
    ]
    return weights, scores


def test_attributes_in_each_of_the_three_shapes(client, picture):
    # the picture is (1, 0, 0); "red, blue" (1, 0, 1) and "green, blue" (0, 1, 1), then (2, 1, 0) and (1, 2, 0)
    weights, scores = mixture([[1 / math.sqrt(2), 0], [2 / math.sqrt(5), 1 / math.sqrt(5)]])
    fields = {"labels": ["red", "green"]}
    text = json.dumps(ATTRIBUTES)
    answers = [
        client.post("/v1/classify", json={"image": b64(picture("red")), "attributes": ATTRIBUTES, **fields}),
        client.post("/v1/classify", files={"image": picture("red")}, data={"attributes": text, **fields}),
        client.post("/v1/classify", params={"attributes": text, **fields}, **raw(picture("red"))),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        ranked = answer.json()
        assert [row["label"] for row in ranked["labels"]] == ["red", "green"]
        assert [row["score"] for row in ranked["labels"]] == pytest.approx(scores, abs=1e-6)
        assert ranked["attributes"] == {
            "place": pytest.approx(dict(zip(("blue", "yellow"), weights, strict=True)), abs=1e-6)
        }
        assert [row["text"] for row in ranked["composites"]] == ["yellow", "blue"]
    plain = client.post("/v1/classify", json={"image": b64(picture("red")), **fields}).json()
    assert (plain["attributes"], plain["composites"]) == (None, None)


def test_tau_and_the_inference_without_labels(client, picture):
    body = {"image": b64(picture("red")), "labels": ["red", "green"], "attributes": ATTRIBUTES}
    flat = client.post("/v1/classify", json={**body, "tau": 1e9}).json()["attributes"]["place"]
    assert flat == pytest.approx({"blue": 0.5, "yellow": 0.5}, abs=1e-6)
    # "a photo of a object, blue" is (0, 0, 1): cosine 0; with yellow 1 / sqrt(2)
    without = client.post("/v1/classify", json={**body, "with_labels": False, "tau": 2}).json()["attributes"]["place"]
    assert without["yellow"] == pytest.approx(1 / (1 + math.exp(-5 / math.sqrt(2))), abs=1e-6)


def test_descriptions_are_looked_for_in_the_regions(client, picture):
    # four quarters as regions; mean over them of the best description's cosine
    data = picture("red", "red", "green", "blue", size=(8, 8))
    described = {"red": ["red", "yellow"], "green": ["green"]}
    body = {"image": b64(data), "labels": ["red", "green"], "descriptions": described}
    half = math.sqrt(0.5)
    regions = [(1 + 1 + half + 0) / 4, (0 + 0 + 1 + 0) / 4]
    whole = [2 / math.sqrt(6), 1 / math.sqrt(6)]  # the mean colour is (2, 1, 1) / 4
    for alpha in (0, 0.25):
        scores = expected(*(alpha * w + (1 - alpha) * r for w, r in zip(whole, regions, strict=True)))
        answer = client.post("/v1/classify", json={**body, "alpha": alpha})
        assert [row["score"] for row in answer.json()["labels"]] == pytest.approx(scores, abs=1e-6), answer.text
    bare = client.post("/v1/classify", json={"image": b64(data), "labels": ["red", "green"]}).json()
    assert client.post("/v1/classify", json={**body, "alpha": 1}).json() == bare
    form = {"labels": ["red", "green"], "alpha": "0.25", "descriptions": json.dumps(described)}
    again = client.post("/v1/classify", files={"image": data}, data=form).json()
    assert [row["score"] for row in again["labels"]] == [row["score"] for row in answer.json()["labels"]]
    # without alpha they stand for the label: (1, 0, 0) and (1, 1, 0) / sqrt(2), the unit mean of both
    instead = client.post("/v1/classify", json={**body, "labels": ["red", "green"]}).json()["labels"][0]
    mean = (1 + half, half)
    assert instead["cosine"] == pytest.approx((2 * mean[0] + mean[1]) / math.hypot(*mean) / math.sqrt(6), abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tau": 2.0}, "the request has tau but no `attributes`; expected both"),
        ({"with_labels": False, "tau": 2.0}, "has tau and with_labels but no"),
        ({"attributes": {"place": []}}, "the attribute 'place' has 0 values; expected 1 to 1000"),
        ({"attributes": {"place": "sea"}}, "'place' has no list of texts; expected one"),
        (
            {"attributes": {"a": [str(i) for i in range(100)], "b": [str(i) for i in range(99)]}},
            "are 9900; at most 8192",
        ),
        ({"attributes": ATTRIBUTES, "tau": 0.001}, "tau"),
        ({"attributes": ATTRIBUTES, "alpha": 0.5}, "`attributes` and `alpha`; expected at most one"),
        ({"alpha": 0.5}, "the label 'red' has no descriptions"),
        ({"alpha": 1.5}, "alpha"),
        ({"descriptions": {str(i): ["a"] for i in range(10_001)}}, "10001 lists were given; at most 10000"),
        ({"descriptions": {"pink": ["a"]}}, "descriptions of 'pink', which is none of the 1 labels"),
        ({"descriptions": {"red": ["a"] * 33}}, "33 descriptions of 'red' were given; at most 32"),
    ],
)
def test_impossible_compositions(client, picture, fields, says):
    answer = client.post("/v1/classify", json={"image": b64(picture("red")), "labels": ["red"], **fields})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request"), answer.text
    assert says in answer.json()["detail"]


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "the field 'attributes' is not JSON"), ("[1]", "the field 'attributes' is a list; expected an object")],
)
def test_an_object_in_a_form_is_json(client, picture, text, says):
    data = {"labels": "red", "attributes": text}
    answer = client.post("/v1/classify", files={"image": picture("red")}, data=data)
    assert answer.status_code == 422
    assert says in answer.json()["detail"]


def test_a_fitted_head_takes_no_attributes(client, picture):
    items = [{"image": b64(picture(label)), "label": label} for label in ("red", "blue")]
    assert client.post("/v1/classifiers/shown/fit", json={"method": "prototype", "items": items}).is_success
    body = {"image": b64(picture("red")), "classifier": "shown", "attributes": ATTRIBUTES}
    answer = client.post("/v1/classify", json=body)
    assert answer.status_code == 422
    assert "the head 'prototype' scores pictures by arrays of its own" in answer.json()["detail"]
