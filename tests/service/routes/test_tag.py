"""Expected values: the tiny bundle's vectors are mean colours, of regions those of the quarters (conftest.py)."""

import math

import pytest

from calmclip.models import vocabulary
from calmclip.service.settings import Limits
from tests.asking import b64, raw

WORDS = ["blue", "red", "yellow"]


def test_words_of_the_picture_and_of_its_quarters(client, picture):
    data = picture("red", "red", "red", "blue", size=(64, 64))
    answer = client.post("/v1/tag", json={"image": b64(data), "words": WORDS, "top": 3})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    # the mean colour is (3, 0, 1) / sqrt(10); yellow, (1, 1, 0) / sqrt(2), is no near-synonym of red
    cosines = {"red": 3 / math.sqrt(10), "yellow": 3 / math.sqrt(20), "blue": 1 / math.sqrt(10)}
    assert [(t["word"], t["index"]) for t in body["tags"]] == [("red", 1), ("yellow", 2), ("blue", 0)]
    for tag in body["tags"]:
        assert tag["cosine"] == pytest.approx(cosines[tag["word"]], abs=1e-6)
        assert tag["score"] == tag["cosine"]
    # the quarters do not overlap, so nothing is suppressed; ties go to the first quarter
    assert [t["score"] for t in body["regions"]] == pytest.approx([1.0, 1.0, 1.0], abs=1e-3)  # the picture is scaled
    assert [t["word"] for t in body["regions"]] == ["red", "red", "red"]
    assert body["regions"][0]["box"] == {"x0": 0, "y0": 0, "x1": 32, "y1": 32}
    assert (body["caption"], body["captioned_by"]) == ("a photo of red, yellow and blue", "template")
    raw_body = client.post("/v1/tag", params={"words": WORDS, "regions": "false"}, **raw(data))
    assert raw_body.json() == body | {"regions": []}


def test_the_vocabulary_and_templates(client, picture):
    answer = client.post("/v1/tag", json={"image": b64(picture("red")), "top": 1}).json()
    (tag,) = answer["tags"]
    assert vocabulary.words()[tag["index"]] == tag["word"]
    assert "red" in tag["word"].split("-")
    # "blue red" is (1, 0, 1) / sqrt(2)
    body = {"image": b64(picture("red")), "words": ["red"], "templates": ["blue {}"]}
    (tag,) = client.post("/v1/tag", json=body).json()["tags"]
    assert tag["cosine"] == pytest.approx(math.sqrt(0.5), abs=1e-6)


def test_a_form_has_as_many_words_as_the_limit_allows(client, picture):
    words = [*(f"thing {number}" for number in range(600)), "blue"]
    answer = client.post("/v1/tag", files={"image": picture("blue")}, data={"words": words, "top": 1})
    assert answer.status_code == 200, answer.text
    assert answer.json()["tags"][0]["index"] == 600


@pytest.mark.parametrize(
    ("changed", "status", "slug", "says"),
    [
        ({"top": 101}, 422, "invalid-request", "top"),
        ({"words": ["red", "red"]}, 422, "invalid-request", "'red' is given twice"),
        ({"words": ["x" * 1001]}, 422, "invalid-request", "word 0 has 1001 characters"),
        ({"words": []}, 422, "invalid-request", "make 6068 sentences; at most 5000"),
        ({"model": "nothing"}, 404, "model-not-found", "nothing"),
        ({"image": {"b64": ""}}, 415, "unsupported-image", ""),
    ],
)
def test_wrong_requests_are_problems(client, picture, changed, status, slug, says):
    body = {"image": b64(picture("red")), "words": ["red"], "templates": ["a {}", "the {}"]} | changed
    says = says.replace("6068", str(2 * len(vocabulary.words())))
    answer = client.post("/v1/tag", json=body)
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (status, slug), answer.text
    assert says in answer.text


def test_the_numbers_of_words_and_bytes_are_limited(settings, serve, picture):
    with serve(settings(limits=Limits(words=2, image_bytes=2000))) as client:
        answer = client.post("/v1/tag", json={"image": b64(picture("red")), "words": WORDS})
        assert (answer.status_code, "3 sentences; at most 2" in answer.text) == (422, True)
        answer = client.post("/v1/tag?words=red", **raw(bytes(3000)))
        assert answer.status_code == 413
