"""Boxes in /v1/embed and /v1/detect. The map has 4 x 4 cells; a picture of 64 x 64 pixels has 16 for each."""

import numpy as np
import pytest

from tests.asking import b64

QUARTERS = ("red", "green", "green", "blue")


def test_each_box_is_an_input_of_embed(client, picture):
    inputs = [
        {"text": "green"},
        {"image": b64(picture(*QUARTERS, size=(8, 8))), "boxes": [[4, 4, 8, 8], [0, 0, 4, 4], [0, 0, 8, 4]]},
        {"image": b64(picture("white"))},
    ]
    answer = client.post("/v1/embed", json={"inputs": inputs})
    assert answer.status_code == 200, answer.text
    wanted = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]], float)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert np.array(answer.json()["embeddings"]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": []}, "boxes"),
        ({"boxes": [[0, 0, 1]]}, "boxes"),
        ({"boxes": [[0, 0, 1, True]]}, "boxes"),
        ({"boxes": [[0, 0, 1, "1"]]}, "boxes"),
        ({"boxes": [[0, 0, 8, 8], [4, 0, 4, 8]]}, "box 1 is [4.0, 0.0, 4.0, 8.0]; expected x0, y0, x1, y1"),
        ({"boxes": [[70, 0, 80, 8]]}, "box 0, [70.0, 0.0, 80.0, 8.0], lies outside of its picture, 64 x 48 pixels"),
        ({"boxes": [[0, 0, 8, 8]] * 257}, "257 inputs were given; at most 256 are read at once"),
        ({"boxes": [[0, 0, 8, 8]] * 1001}, "boxes"),
        ({"image": None, "text": "red", "boxes": [[0, 0, 8, 8]]}, "`boxes` belong to an `image`"),
    ],
)
def test_impossible_boxes_are_refused_with_a_reason(client, picture, change, words):
    answer = client.post("/v1/embed", json={"inputs": [{"image": b64(picture("red")), **change}]})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert words in answer.json()["detail"] or words in answer.json()["errors"][0]["where"]


def found(answer) -> list[tuple[str, list[float]]]:
    assert answer.status_code == 200, answer.text
    return sorted((d["label"], [*d["box"].values()]) for d in answer.json()["detections"])


def test_detect_over_boxes_names_these_boxes(client, picture):
    boxes = [[0, 0, 32, 32], [32, 0, 64, 32], [40, 40, 64, 64]]
    body = {"image": b64(picture(*QUARTERS, size=(64, 64))), "labels": ["blue", "red"], "min_score": 0.99}
    assert found(client.post("/v1/detect", json={**body, "boxes": boxes})) == [("blue", boxes[2]), ("red", boxes[0])]
    shown = {"examples": [{"image": b64(picture("green")), "label": "leaf"}], "labels": []}
    assert found(client.post("/v1/detect", json={**body, **shown, "boxes": boxes})) == [("leaf", boxes[1])]
    boxed = {"image": body["image"], "box": [40, 40, 60, 60], "label": "sea"}
    shown = {"examples": [boxed], "labels": []}
    assert found(client.post("/v1/detect", json={**body, **shown, "boxes": boxes})) == [("sea", boxes[2])]


def test_detect_over_a_grid_finds_windows(client, picture):
    """Squares of half the side at steps of a whole: the four quarters, as for `regions`."""
    grid = {"sizes": [0.5], "ratios": [1], "stride": 1}
    body = {"image": b64(picture(*QUARTERS, size=(64, 64))), "labels": ["blue"], "min_score": 0.99, "grid": grid}
    assert found(client.post("/v1/detect", json=body)) == [("blue", [32, 32, 64, 64])]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": [[0, 0, 8, 8]], "grid": {}}, "boxes and grid were given; expected one of them"),
        ({"boxes": [[0, 0, 0, 8]]}, "box 0 is"),
        ({"grid": {"sizes": [0.02], "stride": 0.1}}, "windows or more"),
        ({"grid": {"sizes": [2]}}, "grid.sizes.0"),
        ({"grid": {"sizes": []}}, "grid.sizes"),
        ({"grid": {"shape": 1}}, "grid.shape"),
    ],
)
def test_impossible_places_are_refused_with_a_reason(client, picture, change, words):
    answer = client.post("/v1/detect", json={"image": b64(picture("red")), "labels": ["red"], **change})
    assert answer.status_code == 422
    assert words in answer.json()["detail"] or words in answer.json()["errors"][0]["where"]


def test_a_query_and_a_form_have_no_boxes(client):
    """They are lists of lists, which only JSON holds."""
    spec = client.get("/openapi.json").json()["paths"]["/v1/detect"]["post"]
    form = spec["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    names = {*form, *(parameter["name"] for parameter in spec["parameters"])}
    assert {"boxes", "grid"}.isdisjoint(names)
