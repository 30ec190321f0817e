"""Expected values: the cells of the tiny bundle's `dense` are mean colours (conftest.py), so two halves of a picture
meet in its middle."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from calmclip.models.bundle.manifest import MANIFEST
from calmclip.service.settings import Limits, Settings
from tests.asking import b64, raw

LABELS = ["red", "blue", "green"]
HALVES = ("red", "red", "blue", "blue")  # the upper and the lower half
PLAIN = {"method": "maskclip"}
QUERY = {**PLAIN, "labels": LABELS, "background": ["white"], "params": json.dumps({"scale": 40.0, "bias": -50.0})}


@pytest.fixture
def halves(picture):
    return picture(*HALVES, size=(64, 64))


def upper(height: int = 64, width: int = 64) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[: height // 2] = True
    return mask


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png), formats=["PNG"]))


def test_each_label_gets_its_half_in_every_shape_of_the_body(client, halves):
    body = {**QUERY, "image": b64(halves), "params": json.loads(QUERY["params"])}
    answers = [
        client.post("/v1/segment", json=body),
        client.post("/v1/segment", files={"image": halves}, data=QUERY),
        client.post("/v1/segment", params=QUERY, **raw(halves)),
    ]
    assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text
    assert answers[0].json() == answers[1].json() == answers[2].json()
    answer = answers[0].json()
    assert (answer["model"], answer["method"], answer["image"]) == (
        "colours-int8", "maskclip", {"width": 64, "height": 64}
    )  # fmt: skip
    first, second = sorted(answer["segments"], key=lambda each: each["index"])
    for each, label, index, box in (
        (first, "red", 0, {"x0": 0, "y0": 0, "x1": 64, "y1": 32}),
        (second, "blue", 1, {"x0": 0, "y0": 32, "x1": 64, "y1": 64}),
    ):
        assert (each["label"], each["index"], each["area"], each["png"]) == (label, index, 64 * 32, None)
        assert [part["box"] for part in each["boxes"]] == [box]
        assert each["boxes"][0]["score"] == each["score"]
        assert np.array_equal(coco.decode(each["rle"]).astype(bool), upper() ^ (label == "blue"))
    # each column: 0 pixels outside, 32 in, 32 out, in, out ...; in base 32 a count of 32 is "P1"
    assert first["rle"] == {"size": [64, 64], "counts": "0P1P1" + "0" * 126}
    # between the middles of the cells, rows 24 and 40, the probability falls from 1 to 0: of the last 8 rows it is 0.75
    assert first["score"] == pytest.approx((24 + 8 * 0.75) / 32, abs=1e-4)


def test_masks_as_png_and_as_one_indexed_png(client, halves):
    answer = client.post("/v1/segment", params={**QUERY, "format": "png"}, **raw(halves)).json()
    for each in answer["segments"]:
        shown = pixels(base64.b64decode(each["png"]))
        assert each["rle"] is None
        assert np.array_equal(shown, upper() ^ (each["label"] == "blue"))
    answer = client.post("/v1/segment", params={**QUERY, "format": "indexed"}, **raw(halves))
    assert answer.headers["content-type"] == "image/png"
    assert "infer;dur=" in answer.headers["server-timing"]
    picture = Image.open(io.BytesIO(answer.content))
    assert json.loads(picture.text["labels"]) == {"1": "red", "2": "blue"}
    assert np.array_equal(np.asarray(picture), np.where(upper(), 1, 2))


def test_a_turned_picture_has_masks_of_the_upright_one(client, halves):
    turned, tags = Image.open(io.BytesIO(halves)).resize((64, 48)), Image.Exif()
    tags[0x0112] = 6  # Orientation: a quarter to the right, so red is on the right
    file = io.BytesIO()
    turned.save(file, "PNG", exif=tags)
    answer = client.post("/v1/segment", params=QUERY, **raw(file.getvalue())).json()
    assert answer["image"] == {"width": 48, "height": 64}
    (red,) = [each for each in answer["segments"] if each["label"] == "red"]
    assert np.array_equal(coco.decode(red["rle"]).astype(bool), upper(48).T[:, ::-1])


def test_a_threshold_background_and_labels_alone(client, picture, halves):
    yellow = client.post(
        "/v1/segment", params={**PLAIN, "labels": ["red", "green"], "threshold": 0.6}, **raw(picture("yellow"))
    )
    assert yellow.json()["segments"] == []  # both have half of the probability
    query = {**PLAIN, "labels": ["red", "green"], "background": ["blue"], "independent": True}
    masks = client.post("/v1/segment", params=query, **raw(picture("yellow"))).json()["segments"]
    assert [(each["label"], each["area"]) for each in masks] == [("red", 64 * 48), ("green", 64 * 48)]  # they overlap
    masks = client.post(
        "/v1/segment", params={**PLAIN, "labels": ["blue"], "background": ["red"]}, **raw(halves)
    ).json()
    assert [(each["label"], each["area"]) for each in masks["segments"]] == [("blue", 64 * 32)]
    body = {**PLAIN, "image": b64(halves), "labels": ["blue"], "background": []}
    (everything,) = client.post("/v1/segment", json=body).json()["segments"]
    assert everything["area"] == 64 * 64


def test_windows_see_what_the_whole_picture_hides(client, picture):
    """A thing of 4 pixels in 64 is a quarter of a cell; in a window of 16 pixels it is a cell."""
    canvas = Image.open(io.BytesIO(picture("red", size=(64, 64))))
    canvas.paste((0, 0, 255), (28, 28, 32, 32))
    file = io.BytesIO()
    canvas.save(file, "PNG")
    query = {**QUERY, "labels": ["red", "blue"]}
    whole, windows = (
        client.post("/v1/segment", params=query | more, **raw(file.getvalue())).json()["segments"]
        for more in ({}, {"window": 0.25, "stride": 0.5})
    )
    assert [each["label"] for each in whole] == ["red"]
    (blue,) = [each for each in windows if each["label"] == "blue"]
    (part,) = blue["boxes"]
    assert 24 <= part["box"]["x0"] < 30 < part["box"]["x1"] <= 36


def test_a_classifier_gives_labels_and_templates(client, halves):
    client.put("/v1/classifiers/halves", json={"labels": ["white", "thing"], "templates": ["red {}"]})
    query = {**PLAIN, "classifier": "halves", "background": ["blue"]}
    answer = client.post("/v1/segment", params=query, **raw(halves)).json()
    (thing,) = answer["segments"]
    assert (thing["label"], thing["index"]) == ("thing", 1)
    # "red thing" is (1, 0, 0) and the background "red blue" (1, 0, 1) / sqrt(2): they meet where 1 - x = sqrt(1/2), for
    # x from 0 in row 24 to 1 in row 40; scaling down mixes a little
    assert thing["area"] / 64 == pytest.approx(24 + 16 * (1 - math.sqrt(0.5)), abs=1)


@pytest.mark.parametrize(
    ("changed", "status", "slug", "says"),
    [
        ({"labels": []}, 422, "too-many-labels", "no labels"),
        ({"labels": ["red", "red"]}, 422, "invalid-request", "'red' is given twice"),
        ({"labels": ["x"] * 5}, 422, "too-many-labels", "5 labels were given; at most 4"),
        ({"background": ["x"] * 101}, 422, "invalid-request", "background"),
        ({"background": ["x" * 1001]}, 422, "invalid-request", "background 0 has 1001 characters"),
        ({"threshold": 1.5}, 422, "invalid-request", "threshold"),
        ({"format": "svg"}, 422, "invalid-request", "indexed"),
        ({"format": "png"}, 422, "invalid-request", "2 masks of 64 x 64 pixels have 8192 pixels; at most 5000"),
        ({"method": "nothing"}, 422, "invalid-request", "maskclip"),
        ({"params": {"scales": 1}}, 422, "invalid-request", "scales"),
        ({"window": 0.05}, 422, "invalid-request", "window"),
        ({"independent": True, "background": []}, 422, "invalid-request", "send `background`"),
        ({"classifier": "nothing"}, 404, "classifier-not-found", "nothing"),
        ({"model": "nothing"}, 404, "model-not-found", "nothing"),
        ({"model": "words"}, 409, "task-not-served", "words"),
        ({"image": {"b64": ""}}, 415, "unsupported-image", ""),
        ({"image": b64(bytes(9000))}, 413, "image-too-large", "at most 8000"),
    ],
)
def test_wrong_requests_are_problems(limited, halves, changed, status, slug, says):
    body = {"image": b64(halves), "labels": ["red", "blue"], "background": ["white"]} | changed
    answer = limited.post("/v1/segment", json=body)
    assert (answer.status_code, answer.json()["type"]) == (status, f"/problems/{slug}"), answer.text
    assert says in answer.text


@pytest.fixture(scope="module")
def limited(serve, bundle_maker, tmp_path_factory):
    """A service with low limits, over the bundle and another one, `words`, that has no graph `dense`."""
    folder = tmp_path_factory.mktemp("limited")
    bundle_maker(folder / "bundles", "colours-int8")
    file = bundle_maker(folder / "bundles", "words").directory / MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["graphs"]["dense"]
    file.write_text(json.dumps(manifest | {"tasks": ["classify"]}))
    limits = Limits(labels=4, mask_pixels=5000, image_bytes=8000)
    with serve(Settings(bundles_dir=folder / "bundles", data_dir=folder / "data", threads=1, limits=limits)) as client:
        yield client


def test_models_name_what_a_segment_request_gets(limited):
    models = {model["name"]: model["segmentation"] for model in limited.get("/v1/models").json()["models"]}
    assert models["words"] is None
    assert models["colours-int8"]["methods"].count("maskclip") == 1
    assert (models["colours-int8"]["threshold"], "the sky" in models["colours-int8"]["background"]) == (0.0, True)
