"""Expected values: the tiny bundle's vectors are mean colours (tests/service/conftest.py), its head's scale is 10."""

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
