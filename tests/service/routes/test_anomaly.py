"""Expected values: vectors are mean colours (conftest.py), so for a red picture "red thing" is likely and "blue thing"
is not. The head's scale is 10."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from calmclip.models.bundle.manifest import MANIFEST
from calmclip.service.settings import Limits, Settings
from tests.asking import b64, raw

STATES = {"thing": "thing", "normal": ["red {}"], "damaged": ["blue {}"], "templates": ["a photo of a {}"]}
DAMAGED = 1 / (1 + math.exp(-10))  # of a blue picture, whose cosines are 1 and 0


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB")).astype(int)


def test_score_verdict_and_heat_map_in_every_shape_of_the_body(client, picture):
    blue = picture("blue")
    answers = [
        client.post("/v1/anomaly", json={**STATES, "image": b64(blue), "threshold": 0.9}),
        client.post("/v1/anomaly", files={"image": blue}, data={**STATES, "threshold": 0.9}),
        client.post("/v1/anomaly", params={**STATES, "threshold": 0.9}, **raw(blue)),
    ]
    assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text
    assert answers[0].json() == answers[1].json() == answers[2].json()
    answer = answers[0].json()
    heat = pixels(base64.b64decode(answer.pop("heat")))
    assert answer == {
        "model": "colours-int8", "method": "text", "image": {"width": 64, "height": 48},
        "score": pytest.approx(DAMAGED, abs=1e-6), "threshold": 0.9, "damaged": True,
    }  # fmt: skip
    assert heat.shape == (48, 64, 3)
    assert heat.min() == 255  # white: the highest level
    answer = client.post("/v1/anomaly", params=STATES, **raw(picture("red"))).json()
    assert (answer["score"], answer["threshold"], answer["damaged"]) == (
        pytest.approx(1 - DAMAGED, abs=1e-6),
        None,
        None,
    )
    assert pixels(base64.b64decode(answer["heat"])).max() == 0


def test_the_heat_map_alone_shows_where(client, picture):
    halves = picture("red", "red", "blue", "blue", size=(60, 120))
    answer = client.post("/v1/anomaly", params={**STATES, "format": "png"}, **raw(halves))
    assert answer.headers["content-type"] == "image/png"
    assert "infer;dur=" in answer.headers["server-timing"]
    heat = pixels(answer.content).sum(axis=2)
    assert heat.shape == (120, 60)
    assert heat[-1].min() > heat[0].max() + 100
    assert (np.diff(heat[:, 30]) >= 0).all()


def test_thing_and_phrases_have_defaults(client, picture):
    """The word of the thing is the only one with a colour, so both states are alike."""
    answer = client.post("/v1/anomaly", params={"thing": "blue"}, **raw(picture("red"))).json()
    assert answer["score"] == pytest.approx(0.5, abs=1e-6)


def test_normal_pictures_are_fitted_and_give_threshold_and_verdict(limited, picture):
    normal = [("normal", picture("red")), ("normal", picture("yellow"))]
    form = {"method": "memory", "params": json.dumps({"quantile": 1.0}), "model": "colours-int8"}
    answer = limited.post("/v1/classifiers/reds/fit", files=normal, data=form)
    assert answer.status_code == 200, answer.text
    fitted = answer.json()
    assert (fitted["labels"], fitted["head"], fitted["fitted"]) == (["normal", "damaged"], "memory", True)
    assert (fitted["report"]["pictures"], fitted["report"]["after"]) == (2, None)
    apart = (1 - math.sqrt(0.5)) / 2  # of red and yellow, whose cosine is sqrt(1/2)
    for colours, score in ((["red"], 0.0), (["white"], (1 - 2 / math.sqrt(6)) / 2), (["blue"], 0.5)):
        looked = limited.post("/v1/anomaly", params={"classifier": "reds"}, **raw(picture(*colours))).json()
        assert looked["method"] == "memory"
        assert looked["score"] == pytest.approx(score, abs=1e-4)
        assert looked["threshold"] == pytest.approx(apart, abs=1e-4)
        assert looked["damaged"] == (score > apart)
    part = picture("red", "red", "red", "blue", size=(64, 64))
    answer = limited.post("/v1/anomaly", params={"classifier": "reds", "format": "png"}, **raw(part))
    heat = pixels(answer.content).sum(axis=2)
    assert heat[:16, :16].max() == 0 < heat[48:, 48:].min()
    answer = limited.post("/v1/anomaly", params={"classifier": "reds", "model": "other"}, **raw(part))
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/classifier-bundle-mismatch")
    limited.put("/v1/classifiers/words", json={"labels": ["red", "blue"]})
    answer = limited.post("/v1/anomaly", params={"classifier": "words"}, **raw(part))
    assert (answer.status_code, "head 'memory'" in answer.text) == (422, True)
    answer = limited.post("/v1/classifiers/more/fit", files=normal, data={"method": "memory", "model": "words"})
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/task-not-served")


@pytest.mark.parametrize(
    ("changed", "status", "slug", "says"),
    [
        ({"normal": ["perfect"]}, 422, "invalid-request", "needs a '{}'"),
        ({"damaged": ["{}"] * 5}, 422, "invalid-request", "at most 4"),
        ({"templates": ["{}"] * 5}, 422, "invalid-request", "5 templates were given; at most 4"),
        ({"thing": "x" * 1001}, 422, "invalid-request", "thing has 1001 characters"),
        ({"threshold": -1}, 422, "invalid-request", "threshold"),
        ({"format": "svg"}, 422, "invalid-request", "png"),
        ({"method": "nothing"}, 422, "invalid-request", "text"),
        ({"classifier": "nothing"}, 404, "classifier-not-found", "nothing"),
        ({"model": "nothing"}, 404, "model-not-found", "nothing"),
        ({"model": "words"}, 409, "task-not-served", "words"),
        ({"image": {"b64": ""}}, 415, "unsupported-image", ""),
        ({"image": b64(bytes(9000))}, 413, "image-too-large", "at most 8000"),
    ],
)
def test_wrong_requests_are_problems(limited, picture, changed, status, slug, says):
    answer = limited.post("/v1/anomaly", json={"image": b64(picture("red")), **STATES} | changed)
    assert (answer.status_code, answer.json()["type"]) == (status, f"/problems/{slug}"), answer.text
    assert says in answer.text


@pytest.fixture(scope="module")
def limited(serve, bundle_maker, tmp_path_factory):
    """A service with low limits, over the bundle and another one, `words`, that has no graph `dense`."""
    folder = tmp_path_factory.mktemp("limited")
    bundle_maker(folder / "bundles", "colours-int8")
    bundle_maker(folder / "bundles", "other", note="of another family")
    file = bundle_maker(folder / "bundles", "words").directory / MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["graphs"]["dense"]
    file.write_text(json.dumps(manifest | {"tasks": ["classify", "embed"]}))
    limits = Limits(templates=4, image_bytes=8000)
    with serve(Settings(bundles_dir=folder / "bundles", data_dir=folder / "data", threads=1, limits=limits)) as client:
        yield client
