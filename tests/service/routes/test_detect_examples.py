"""Examples in JSON, in a form, together with labels, and refused examples. Regions are the four quarters."""

import pytest

from calmclip.models.suppression import Suppression
from calmclip.service.schemas.detect import DetectBody
from tests.asking import b64


def labels(answer) -> list[tuple[str, int, dict[str, float]]]:
    assert answer.status_code == 200, answer.text
    return [(detection["label"], detection["index"], detection["box"]) for detection in answer.json()["detections"]]


LOWER_RIGHT = {"x0": 32, "y0": 32, "x1": 64, "y1": 64}


def test_an_example_finds_similar_regions(client, picture):
    image = picture("red", "green", "green", "blue", size=(64, 64))
    body = {"image": b64(image), "examples": [{"image": b64(picture("blue")), "label": "猫"}], "min_score": 0.99}
    assert labels(client.post("/v1/detect", json=body)) == [("猫", 0, LOWER_RIGHT)]


def test_a_box_selects_a_part_of_the_example(client, picture):
    image = picture("red", "green", "green", "blue", size=(64, 64))
    # the example is the same picture, and the box is its lower right quarter
    example = {"image": b64(image), "box": [33, 33.5, 64, 64]}
    body = {"image": b64(image), "labels": ["red"], "examples": [example], "min_score": 0.99}
    detections = labels(client.post("/v1/detect", json=body))
    assert ("example 0", 1, LOWER_RIGHT) in detections
    assert sorted(index for _, index, _ in detections) == [0, 1]


def test_in_a_form_examples_are_files(client, picture):
    image = picture("red", "green", "green", "blue", size=(64, 64))
    files = [("image", image), ("examples", picture("white")), ("examples", picture("blue"))]
    answer = client.post("/v1/detect", files=files, data={"min_score": "0.99"})
    assert labels(answer) == [("example 1", 1, LOWER_RIGHT)]


def test_an_example_in_a_text_field_is_refused(client, picture):
    answer = client.post("/v1/detect", files={"image": picture("red")}, data={"examples": "cat.jpg"})  # curl without @
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["where"] == "examples.0"
    assert "in a form, a file" in answer.json()["detail"]


def test_the_specification_puts_examples_into_bodies_only(client):
    spec = client.get("/openapi.json").json()
    route = spec["paths"]["/v1/detect"]["post"]
    form = route["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert form["examples"].items() >= {"type": "array", "items": {"type": "string", "format": "binary"}}.items()
    assert "examples" not in [parameter["name"] for parameter in route["parameters"]]
    (item,) = [spec["components"]["schemas"]["DetectBody"]["properties"]["examples"]["items"]["$ref"]]
    assert set(spec["components"]["schemas"][item.split("/")[-1]]["properties"]) == {"image", "box", "label"}


@pytest.mark.parametrize(
    ("example", "status", "words"),
    [
        ({"image": {"b64": "aGVsbG8="}}, 415, "example 0: 5 bytes"),
        ({"image": {"b64": ""}}, 415, "example 0: the picture has 0 bytes"),
        ({"image": {"url": "x"}}, 422, "this service fetches no"),
        ({"box": [0, 0, 1, 1]}, 422, "image"),
        ({"box": [0, 0, 1], "image": None}, 422, "box"),
        ({"box": [0, 0, 1, True], "image": None}, 422, "box"),
        ({"box": [0, 0, 0, 1]}, 422, "example 0: box is"),
        ({"box": [99, 0, 100, 1]}, 422, "lies outside of its picture"),
        ({"label": ""}, 422, "label"),
        ({"label": "x" * 1001}, 422, "example 0: its label has 1001 characters"),
        ({"size": 3}, 422, "size"),
        ({"label": " "}, 422, "example 0: its label is empty"),
        ("hello", 422, 'expected {\\"image\\": {\\"b64\\"'),
    ],
)
def test_an_invalid_example_is_refused_with_a_reason(client, picture, example, status, words):
    if isinstance(example, dict) and "image" not in example and words != "image":
        example = {"image": b64(picture("red"))} | example
    answer = client.post("/v1/detect", json={"image": b64(picture("red")), "examples": [example]})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert words in answer.text


def test_at_most_8_examples_are_read(client, picture):
    answer = client.post("/v1/detect", json={"image": b64(picture("red")), "examples": [{"image": b64(b"")}] * 9})
    assert (answer.status_code, "9 examples were given; at most 8 are read" in answer.text) == (422, True)


def test_an_example_is_refused_by_its_size_before_it_is_decoded(client, picture):
    """A PNG that decodes, with 32 MiB after its end; one picture may have 32 MiB."""
    files = [("image", picture("red")), ("examples", picture("blue")), ("examples", picture("blue") + bytes(32 << 20))]
    answer = client.post("/v1/detect", files=files)
    assert answer.status_code == 413
    assert "example 1: the picture has" in answer.json()["detail"]


def test_only_the_fields_of_a_request_override_the_bundles_defaults():
    body = DetectBody.model_validate({"image": b"", "sigma": 0.5, "labels": ["a"]})
    defaults = Suppression("hard", sigma=3, min_score=0.01, max_output=7, per_class=False)
    assert body.suppression(defaults) == Suppression("hard", sigma=0.5, min_score=0.01, max_output=7, per_class=False)
