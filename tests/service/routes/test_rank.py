"""Expected values: the tiny bundle's vectors are mean colours (tests/service/conftest.py), its head's scale is 10."""

import math

import pytest

from calmclip.service.settings import Limits
from tests.asking import b64

SHOWN = ("blue", "yellow", "red", "blue")


def test_json_and_a_form_order_pictures_by_an_instruction(client, picture):
    body = {"images": [b64(picture(colour)) for colour in SHOWN], "instruction": "red"}
    answer = client.post("/v1/rank", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "model": "colours-int8",
        "scale": "cosine",
        "pictures": [
            {"index": 2, "score": 1.0},
            {"index": 1, "score": pytest.approx(math.sqrt(0.5), abs=1e-6)},
            {"index": 0, "score": 0.0},
            {"index": 3, "score": 0.0},
        ],
    }
    files = [("images", (f"{i}.png", picture(colour), "image/png")) for i, colour in enumerate(SHOWN)]
    form = client.post("/v1/rank", files=files, data={"instruction": "red", "top": 2})
    assert form.json()["pictures"] == answer.json()["pictures"][:2]


def test_a_classifier_ranks_by_the_logit_of_a_label(client, picture):
    assert client.put("/v1/classifiers/ranked", json={"labels": ["red", "blue"]}).status_code == 200
    body = {"images": [b64(picture(colour)) for colour in ("red", "yellow", "blue")], "classifier": "ranked"}
    answer = client.post("/v1/rank", json=body).json()
    assert answer["scale"] == "logit"
    assert [(p["index"], p["score"]) for p in answer["pictures"]] == [
        (0, 10.0), (1, pytest.approx(10 * math.sqrt(0.5), abs=1e-5)), (2, 0.0),
    ]  # fmt: skip
    other = client.post("/v1/rank", json=body | {"label": "blue", "top": 1}).json()
    assert other["pictures"] == [{"index": 2, "score": 10.0}]


@pytest.mark.parametrize(
    ("changed", "status", "slug", "says"),
    [
        ({"instruction": None}, 422, "invalid-request", "expected `instruction` or `classifier`"),
        ({"classifier": "x"}, 422, "invalid-request", "one of them"),
        ({"label": "x"}, 422, "invalid-request", "expected `classifier` beside `label`"),
        ({"images": []}, 422, "invalid-request", "images"),
        ({"top": 0}, 422, "invalid-request", "top"),
        ({"instruction": "x" * 1001}, 422, "invalid-request", "the instruction has 1001 characters"),
        ({"instruction": " "}, 422, "invalid-request", "is empty"),
        ({"instruction": None, "classifier": "nothing"}, 404, "classifier-not-found", "nothing"),
        ({"model": "nothing"}, 404, "model-not-found", "nothing"),
        ({"images": [{"b64": ""}]}, 415, "unsupported-image", "picture 0"),
    ],
)
def test_wrong_requests_are_problems(client, picture, changed, status, slug, says):
    body = {"images": [b64(picture("red"))], "instruction": "red"} | changed
    answer = client.post("/v1/rank", json={key: value for key, value in body.items() if value is not None})
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (status, slug), answer.text
    assert says in answer.text


def test_the_number_of_pictures_and_their_size_are_limited(settings, serve, picture):
    limits = Limits(texts=2, image_pixels=64 * 64)
    with serve(settings(limits=limits)) as client:
        body = {"images": [b64(picture("red"))] * 3, "instruction": "red"}
        answer = client.post("/v1/rank", json=body)
        assert answer.status_code == 422
        assert "3 pictures were given; at most 2" in answer.json()["detail"]
        large = [b64(picture("red")), b64(picture("red", size=(65, 64)))]
        answer = client.post("/v1/rank", json=body | {"images": large})
        assert answer.status_code == 413
        assert answer.json()["detail"].startswith("picture 1: ")
