"""Banks over HTTP: files that numpy writes, into collections that a bundle fills and into those that none fills."""

import io
from unittest.mock import ANY

import numpy as np
import pytest

from tests.asking import b64, metric, until

URL = "/v1/collections/{}/bank"


def npz(**changes: object) -> bytes:
    """A bank of another program: three vectors of two numbers."""
    file = io.BytesIO()
    whole = {"ids": np.array(["a", "b", "c"]), "vectors": np.array([[1, 0], [0, 2], [3, 3]], np.float32)}
    whole |= {"model": np.array("UniME"), "dim": np.array(2), "normalized": np.array(False)}
    np.savez(file, **(whole | {"meta": np.array(['{"n": 1}', '{"n": 2}', "{}"])} | changes))
    return file.getvalue()


def put(client, name, data, kind="application/x-npz", **params):
    return client.put(URL.format(name), content=data, headers={"content-type": kind}, params=params)


@pytest.fixture(scope="module")
def foreign(client):
    answer = put(client, "foreign", npz())
    assert answer.status_code == 201, answer.text
    fields = {key: answer.json()[key] for key in ("name", "model", "digest", "dim", "items", "scaled", "originals")}
    assert fields == {
        "name": "foreign", "model": "UniME", "digest": "", "dim": 2, "items": 3, "scaled": 2, "originals": False
    }  # fmt: skip
    return client


def test_another_programs_vectors_are_searched_by_vector(foreign):
    url = "/v1/collections/foreign"
    assert foreign.get(url).json()["model"] == "UniME"
    for query, model in (([5, 5], None), ([1e-30, 1e-30], "UniME")):
        body = {"query": {"vector": query}, **({"model": model} if model else {})}
        hits = foreign.post(f"{url}/search", json=body).json()["hits"]
        assert hits[0] == {"id": "c", "score": pytest.approx(1, abs=1e-6), "relevance": None, "meta": {}}
        assert sorted(hit["score"] for hit in hits)[:2] == pytest.approx([0.5**0.5] * 2, abs=1e-6)
    (hit,) = foreign.post(f"{url}/search", json={"query": {"vector": [1, 1]}, "filter": {"n": 2}}).json()["hits"]
    assert hit["id"] == "b"
    added = [{"id": "d", "vector": [-2, 0], "meta": {"n": 4}}]
    assert foreign.post(f"{url}/items", json={"items": added}).json()["items"] == 4
    (hit,) = foreign.post(f"{url}/search", json={"query": {"vector": [-1, 0]}, "top_k": 1}).json()["hits"]
    assert (hit["id"], hit["score"]) == ("d", 1)
    foreign.request("DELETE", f"{url}/items", json={"ids": ["d"]})


def test_no_text_and_no_picture_goes_to_another_programs_vectors(foreign, picture):
    url = "/v1/collections/foreign"
    for query in ({"text": "red"}, {"image": b64(picture("red"))}):
        for path, body in (("search", {"query": query}), ("items", {"items": [{"id": "x", **query}]})):
            answer = foreign.post(f"{url}/{path}", json=body)
            assert (answer.status_code, answer.json()["type"]) == (409, "/problems/collection-bundle-mismatch")
            assert "Send a `vector` of 2 numbers that 'UniME' made" in answer.json()["detail"]
    for vector, says in (
        ([1, 2, 3], "has 3 numbers; the collection 'foreign' holds vectors of 'UniME', which have 2"),
        ([0, 0], "has the length 0"),
        ([1, 1e39], "finite numbers of float32"),
        ([], "vector"),
        (["1", 2], "vector"),
    ):
        answer = foreign.post(f"{url}/search", json={"query": {"vector": vector}})
        assert (answer.status_code, says in answer.text) == (422, True), answer.text
    search = {"query": {"vector": [1, 0]}, "model": "colours-int8"}
    assert foreign.post(f"{url}/search", json=search).status_code == 409
    assert foreign.post(f"{url}/search", json={**search, "model": "no"}).status_code == 404
    answer = foreign.put(url, json={})
    assert (answer.status_code, "'UniME', which is no bundle" in answer.json()["detail"]) == (409, True)
    fit = {"method": "prototype", "collection": "foreign", "label": "n"}
    assert foreign.post("/v1/classifiers/c/fit", json=fit).status_code == 409
    assert foreign.post(f"{url}/search", json={"query": {"vector": [1, 0]}}).status_code == 200


def test_another_programs_collection_is_served_after_a_restart_and_is_not_degraded(settings, serve):
    with serve(settings()) as client:
        assert put(client, "foreign", npz()).status_code == 201
    with serve(settings()) as client:
        assert client.get("/readyz").json()["degraded"] == {}
        assert metric(client, "calmclip_collections_unbound") == 0
        until(lambda: metric(client, 'calmclip_collection_items{collection="foreign"}') == 3)
        search = {"query": {"vector": [2, 0]}, "top_k": 1}
        (hit,) = client.post("/v1/collections/foreign/search", json=search).json()["hits"]
        assert (hit["id"], hit["score"]) == ("a", 1)


def test_a_collection_goes_out_and_comes_back_bit_for_bit(client, picture):
    client.put("/v1/collections/photos", json={})
    items = [{"id": "r", "image": b64(picture("red")), "meta": {"title": "röd"}}, {"id": "y", "text": "yellow"}]
    client.post("/v1/collections/photos/items", json={"items": items})
    answer = client.get(URL.format("photos"))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-npz")
    loaded = np.load(io.BytesIO(answer.content), allow_pickle=False)
    rows = dict(zip(loaded["ids"].tolist(), loaded["vectors"].tolist(), strict=True))
    assert rows == {"r": pytest.approx([1, 0, 0], abs=1e-6), "y": pytest.approx([0.5**0.5, 0.5**0.5, 0], abs=1e-6)}
    (model,) = client.get("/v1/models").json()["models"]
    assert loaded["digest"].item() == model["embedding_digest"]

    copied = put(client, "copy", answer.content, "application/octet-stream")
    assert (copied.status_code, copied.json()["scaled"]) == (201, 0)
    assert client.get(URL.format("copy")).content == answer.content
    (hit,) = client.post("/v1/collections/copy/search", json={"query": {"text": "red"}, "top_k": 1}).json()["hits"]
    assert hit == {"id": "r", "score": pytest.approx(1, abs=1e-5), "relevance": ANY, "meta": {"title": "röd"}}
    answer = client.post("/v1/collections/copy/search", json={"query": {"vector": [1, 0, 0]}})
    assert [hit["id"] for hit in answer.json()["hits"]] == ["r", "y"]


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"data": b"no zip"}, 422, "the bank is no npz file"),
        ({"data": b""}, 422, "the bank is no npz file"),
        ({"data": npz(dim=np.array(3))}, 422, "dim is 3"),
        ({"data": npz(ids=np.array(["a", "b", "a"]))}, 422, "the id 'a' twice"),
        ({"normalize": "false"}, 422, "the vector of 'b' has the length 2; expected a unit vector"),
        ({"normalize": "maybe"}, 422, "normalize"),
        ({"other": "1"}, 422, "unknown"),
        ({"kind": "application/json"}, 415, "expected application/x-npz"),
        ({"name": "x%2fy"}, 404, ""),
        ({"name": ".hidden"}, 422, ""),
        ({"data": npz(ids=np.array(["a", "b", "c" * 513]))}, 422, "up to 513 characters"),
        ({"data": npz(meta=np.array(['{"a": "%s"}' % ("x" * 16384), "{}", "{}"]))}, 422, "at most 16384 are stored"),
    ],
)
def test_a_bank_that_is_not_whole_makes_no_collection(client, change, status, says):
    answer = put(client, **({"name": "broken", "data": npz()} | change))
    assert (answer.status_code, says in answer.text) == (status, True), answer.text
    assert client.get("/v1/collections/broken").status_code == 404


def test_a_bank_that_claims_a_bundle_with_shorter_vectors_is_not_served_by_it(client):
    (model,) = client.get("/v1/models").json()["models"]
    vectors = {"vectors": np.eye(3, 4, dtype=np.float32), "dim": np.array(4)}
    assert put(client, "claims", npz(digest=np.array(model["embedding_digest"]), **vectors)).status_code == 201
    answer = client.post("/v1/collections/claims/search", json={"query": {"text": "red"}})
    assert (answer.status_code, "which makes 3; import its bank without" in answer.json()["detail"]) == (409, True)


def test_a_name_in_use_and_a_missing_name(foreign):
    answer = put(foreign, "foreign", npz())
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/collection-exists")
    answer = foreign.get(URL.format("nothing"))
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/collection-not-found")


def test_limits(settings, serve):
    with serve(settings(limits={"bank_bytes": 1500, "collections": 1, "body_bytes": 3000})) as client:
        wide = {"ids": np.array(["a", "b", "c" * 100])}
        answer = put(client, "a", npz(**wide))
        assert (answer.status_code, "at most 1500 are read at once" in answer.json()["detail"]) == (422, True)
        answer = put(client, "a", npz() + bytes(3000))
        assert (answer.status_code, answer.json()["type"]) == (413, "/problems/body-too-large")
        small = npz(ids=np.array(["a", "b", "c"]))
        assert put(client, "a", small).status_code == 201, put(client, "a", small).text
        answer = put(client, "b", small)
        assert (answer.status_code, "which is the limit" in answer.json()["detail"]) == (422, True)
        items = [{"id": f"{i}", "vector": [1, i], "meta": {"t": "x" * 20}} for i in range(30)]
        assert client.post("/v1/collections/a/items", json={"items": items}).status_code == 200
        answer = client.get(URL.format("a"))
        assert (answer.status_code, "calmclip collection export" in answer.json()["detail"]) == (422, True)
