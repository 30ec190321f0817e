"""Shortened vectors over HTTP: a bundle of colours whose first two of three numbers hold (red and green, no blue)."""

import base64

import numpy as np
import pytest

from tests.asking import b64, raw

DIAGONAL = 0.5**0.5


@pytest.fixture(scope="module")
def short(serve, bundle_maker, tmp_path_factory):
    from calmclip.service.settings import Settings

    folder = tmp_path_factory.mktemp("short")
    bundle_maker(folder / "bundles", dimensions=(2,))
    with serve(Settings(bundles_dir=folder / "bundles", data_dir=folder / "data", threads=1)) as client:
        yield client


def embedded(answer) -> list[list[float]]:
    assert answer.status_code == 200, answer.text
    assert answer.json()["dim"] == len(answer.json()["embeddings"][0])
    return answer.json()["embeddings"]


def test_embed_answers_prefixes_of_unit_length(short, picture):
    inputs = [
        {"text": "a white thing"},
        {"image": b64(picture("yellow"))},
        {"image": b64(picture("red", "red", "blue", "white", size=(8, 8))), "boxes": [[0, 0, 8, 4], [4, 4, 8, 8]]},
    ]
    rows = embedded(short.post("/v1/embed", json={"inputs": inputs, "dimensions": 2}))
    assert np.array(rows) == pytest.approx(np.array([[DIAGONAL] * 2, [DIAGONAL] * 2, [1, 0], [DIAGONAL] * 2]), abs=1e-6)
    whole = embedded(short.post("/v1/embed", json={"inputs": inputs}))
    assert embedded(short.post("/v1/embed", json={"inputs": inputs, "dimensions": 3})) == whole
    form = short.post("/v1/embed", files=[("text", (None, "green")), ("dimensions", (None, "2"))])
    assert embedded(form) == [[0, 1]]
    assert embedded(short.post("/v1/embed?dimensions=2", **raw(picture("red")))) == [[1, 0]]


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openais_route_takes_dimensions(short, encoding):
    body = {"model": "colours-int8", "input": ["white"], "dimensions": 2, "encoding_format": encoding}
    (row,) = short.post("/v1/embeddings", json=body).json()["data"]
    numbers = row["embedding"] if encoding == "float" else np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
    assert [*numbers] == pytest.approx([DIAGONAL] * 2, abs=1e-6)


def test_other_lengths_are_refused_with_those_that_hold(short):
    (model,) = short.get("/v1/models").json()["models"]
    assert (model["dim"], model["dimensions"]) == (3, [2, 3])
    says = "dimensions is 1; the vectors of 'colours-int8' have 3; expected one of 2, 3"
    for url, body in (
        ("POST /v1/embed", {"inputs": [{"text": "red"}]}),
        ("POST /v1/embeddings", {"input": "red", "model": "colours-int8"}),
        ("PUT /v1/collections/wrong", {}),
    ):
        method, path = url.split()
        status = 400 if path == "/v1/embeddings" else 422
        answer = short.request(method, path, json={**body, "dimensions": 1})
        assert (answer.status_code, answer.json()["detail"]) == (status, says)
        assert short.request(method, path, json={**body, "dimensions": 0}).status_code == status
    assert short.get("/v1/collections/wrong").status_code == 404


def test_a_collection_of_prefixes_shortens_items_and_queries_alike(short, picture):
    url = "/v1/collections/short"
    assert short.put(url, json={"dimensions": 2}).json()["dim"] == 2
    for body, status in (({}, 200), ({"dimensions": 2}, 200), ({"dimensions": 3}, 409)):
        assert short.put(url, json=body).status_code == status
    items = [{"id": "w", "image": b64(picture("white"))}, {"id": "r", "text": "red"}]
    assert short.post(f"{url}/items", json={"items": items}).status_code == 200
    hits = short.post(f"{url}/search", json={"query": {"text": "yellow"}}).json()["hits"]
    assert [(hit["id"], hit["score"]) for hit in hits] == [
        ("w", pytest.approx(1, abs=1e-5)),  # without blue, white is yellow
        ("r", pytest.approx(DIAGONAL, abs=1e-5)),
    ]
    body = {"method": "prototype", "collection": "short", "label": "kind"}
    answer = short.post("/v1/classifiers/c/fit", json=body)
    assert (answer.status_code, "holds the first 2 of 3 numbers" in answer.json()["detail"]) == (422, True)


def test_a_collection_of_prefixes_outlives_the_claim_that_they_hold(serve, settings, bundle_maker, tmp_path):
    """Another export of the same graphs embeds the same; what was shortened stays comparable."""
    bundles = tmp_path / "bundles"
    bundle_maker(bundles, dimensions=(2,))
    with serve(settings(bundles_dir=bundles)) as client:
        assert client.put("/v1/collections/kept", json={"dimensions": 2}).status_code == 201
        client.post("/v1/collections/kept/items", json={"items": [{"id": "w", "text": "white"}]})
    bundle_maker(bundles, replace=True)
    with serve(settings(bundles_dir=bundles)) as client:
        (hit,) = client.post("/v1/collections/kept/search", json={"query": {"text": "yellow"}}).json()["hits"]
        assert hit["score"] == pytest.approx(1, abs=1e-5)
        assert client.put("/v1/collections/more", json={"dimensions": 2}).status_code == 422
