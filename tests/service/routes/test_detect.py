"""The tiny bundle's regions are the four quarters of its 8 x 8 input, placed top left by letterbox."""

import math

import pytest

from tests.asking import b64


def test_boxes_come_in_pixels_of_the_picture(client, picture):
    # 64 x 64 is scaled by 1/8: a quarter is 32 x 32. Scaling down mixes a little across its edges.
    image = picture("red", "green", "green", "blue", size=(64, 64))
    answer = client.post("/v1/detect", files={"image": image}, data={"labels": ["blue", "red"], "min_score": "0.99"})
    body = answer.json()
    assert body["image"] == {"width": 64, "height": 64}
    assert [(detection["label"], detection["index"], detection["box"]) for detection in body["detections"]] == [
        ("red", 1, {"x0": 0, "y0": 0, "x1": 32, "y1": 32}),
        ("blue", 0, {"x0": 32, "y0": 32, "x1": 64, "y1": 64}),
    ]
    assert [detection["score"] for detection in body["detections"]] == pytest.approx([1, 1], abs=5e-3)


def test_letterbox_padding_is_no_part_of_the_picture(client, picture):
    image = picture("red", size=(64, 48))  # 8 x 6 in the input: the lower quarters are cut at 48
    body = client.post("/v1/detect", files={"image": image}, data={"labels": "red", "min_score": "0.9"}).json()
    boxes = [detection["box"] for detection in body["detections"]]
    assert {"x0": 32, "y0": 32, "x1": 64, "y1": 48} in boxes
    assert len(boxes) == 4


def test_effective_settings_are_echoed(client, picture):
    suppression = {"method": "linear", "iou_threshold": 0.4, "per_class": False, "max_output": 3, "min_score": 0.5}
    form = {"labels": ["red", "yellow"], **suppression}
    answer = client.post("/v1/detect", files={"image": picture("red", size=(64, 64))}, data=form)
    # every quarter is red: cosine 1 with red, sqrt(1/2) with yellow: 8 pairs over 0.5, 3 of them kept
    assert answer.json()["suppression"] == {**suppression, "sigma": 0.5, "candidates": 8, "kept": 3}
    assert math.isclose(answer.json()["detections"][0]["raw_score"], 1, abs_tol=1e-6)


def test_templates_replace_the_prompts_of_labels(client, picture):
    """ "blue red" is (1, 0, 1) / sqrt(2): against a red quarter the cosine falls from 1 to sqrt(1/2)."""
    image = picture("red", size=(64, 64))
    prompts = {"labels": ["red"], "templates": ["blue {}"]}
    client.put("/v1/classifiers/prompted", json={"labels": ["red"], "templates": ["green blue {}"]})  # 1/sqrt(3)
    for fields, cosine in (
        ({"labels": ["red"]}, 1),
        (prompts, math.sqrt(1 / 2)),
        ({"classifier": "prompted"}, math.sqrt(1 / 3)),
        ({"classifier": "prompted", "templates": ["blue {}"]}, math.sqrt(1 / 2)),
    ):
        answer = client.post("/v1/detect", json={"image": b64(image), **fields})
        assert answer.status_code == 200, answer.text
        scores = [detection["raw_score"] for detection in answer.json()["detections"]]
        assert scores == [pytest.approx(cosine, abs=1e-6)] * 4, fields
    form = client.post("/v1/detect", files={"image": image}, data=prompts).json()
    assert form["detections"][0]["raw_score"] == pytest.approx(math.sqrt(1 / 2), abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"labels": ["red"], "templates": ["{}"] * 33}, "33 templates were given; at most 32 are read"),
        ({"labels": ["red"], "templates": ["{}" + "y" * 1000]}, "template 0 has 1002 characters"),
        ({"labels": ["x" * 1001]}, "label 0 has 1001 characters"),
        ({"labels": ["red"], "templates": ["none"]}, "{}"),
    ],
)
def test_the_limits_of_labels_and_templates(client, picture, fields, words):
    answer = client.post("/v1/detect", json={"image": b64(picture("red")), **fields})
    assert answer.status_code == 422
    assert words in answer.text
