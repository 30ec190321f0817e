"""Collections over HTTP; the vectors are the colours of tests/service/conftest.py."""

import math

import numpy as np
import pytest

from calmclip.service.client import Client
from tests.asking import b64


def fill(client, name, picture):
    items = [
        {"id": "r", "image": b64(picture("red")), "meta": {"title": "röd", "year": 2019}},
        {"id": "g", "text": "green", "meta": {"year": 2020}},
        {"id": "b", "text": "blue", "meta": {"year": 2021}},
    ]
    return client.post(f"/v1/collections/{name}/items", json={"items": items})


def test_fill_search_filter_remove(client, picture):
    assert client.put("/v1/collections/photos", json={}).status_code == 201
    assert fill(client, "photos", picture).json() == {"collection": "photos", "count": 3, "items": 3}
    again = client.put("/v1/collections/photos", json={"model": "colours-int8"})
    assert (again.status_code, again.json()["items"]) == (200, 3)  # it changed nothing
    url = "/v1/collections/photos/search"

    hits = client.post(url, json={"query": {"text": "yellow"}, "top_k": 2}).json()["hits"]
    assert {hit["id"] for hit in hits} == {"r", "g"}  # yellow = red + green: both at 45 degrees
    assert [hit["score"] for hit in hits] == pytest.approx([math.sqrt(0.5)] * 2, abs=1e-5)

    hits = client.post(url, json={"query": {"image": b64(picture("red"))}, "top_k": 1}).json()["hits"]
    assert hits == [{"id": "r", "score": pytest.approx(1, abs=1e-5), "meta": {"title": "röd", "year": 2019}}]

    for wanted, where in [
        ("gb", {"year": {"gte": 2020}}),
        ("g", {"year": {"gt": 2019, "lt": 2021}}),
        ("b", {"year": 2021}),
        ("rb", {"year": {"in": [2019, 2021]}}),
        ("r", {"title": "röd", "year": {"lte": 2030}}),
    ]:
        hits = client.post(url, json={"query": {"text": "white"}, "filter": where}).json()["hits"]
        assert {hit["id"] for hit in hits} == set(wanted), where

    gone = client.request("DELETE", "/v1/collections/photos/items", json={"ids": ["r", "never"]})
    assert gone.json() == {"collection": "photos", "count": 1, "items": 2}
    assert client.delete("/v1/collections/photos").status_code == 204


def test_a_collection_survives_a_restart_and_refuses_another_bundle(settings, serve, bundle_maker, picture, tmp_path):
    bundles = tmp_path / "bundles"
    bundle_maker(bundles)
    with serve(settings(bundles_dir=bundles)) as client:
        assert client.put("/v1/collections/kept", json={}).status_code == 201
        assert fill(client, "kept", picture).status_code == 200
    with serve(settings(bundles_dir=bundles)) as client:
        hits = client.post("/v1/collections/kept/search", json={"query": {"text": "blue"}, "top_k": 1}).json()["hits"]
        assert hits[0]["id"] == "b"
        metrics = client.get("/metrics").text
        assert 'calmclip_collection_items{collection="kept"} 3.0' in metrics

    other = tmp_path / "other"
    bundle_maker(other, mean=(0.5, 0, 0))
    with serve(settings(bundles_dir=other)) as client:
        for answer in (
            client.post("/v1/collections/kept/search", json={"query": {"text": "blue"}}),
            client.post("/v1/collections/kept/items", json={"items": [{"id": "x", "text": "red"}]}),
            client.put("/v1/collections/kept", json={}),
        ):
            assert answer.status_code == 409, answer.text
            assert answer.json()["type"] == "/problems/collection-bundle-mismatch"
        assert client.get("/v1/collections/kept").json()["items"] == 3
        assert client.put("/v1/collections/new", json={}).status_code == 201

    with serve(settings(bundles_dir=bundles)) as client:
        bundle_maker(bundles, "other-int8", mean=(0.5, 0, 0))
    with serve(settings(bundles_dir=bundles)) as client:
        search = {"query": {"text": "blue"}, "model": "other-int8"}
        assert client.post("/v1/collections/kept/search", json=search).status_code == 409


def test_search_and_items_have_their_own_prompts(settings, serve, bundle_maker, tmp_path):
    """An item is "blue green", so the query "red green" has the cosine 1/2 with it, and "blue green" 1."""
    bundle_maker(tmp_path / "bundles", prompts={"query": "red ", "document": "blue "})
    with serve(settings(bundles_dir=tmp_path / "bundles")) as client:
        client.put("/v1/collections/things", json={})
        client.post("/v1/collections/things/items", json={"items": [{"id": "g", "text": "green"}]})
        url, query = "/v1/collections/things/search", {"query": {"text": "green"}}
        for asked, score in (({}, 0.5), ({"prompt_name": "document"}, 1.0)):
            hits = client.post(url, json=query | asked).json()["hits"]
            assert hits[0]["score"] == pytest.approx(score, abs=1e-5)
        answer = client.post(url, json=query | {"prompt_name": "documents"})
        assert answer.status_code == 422
        assert answer.json()["known"] == ["document", "query"]
        vectors = Client(str(client.base_url)).embed(texts=["green"], prompt_name="query").embeddings
        assert np.array(vectors) == pytest.approx(np.array([[1, 1, 0]]) / 2**0.5, abs=1e-6)
        assert Client(str(client.base_url)).search("things", "green", prompt_name="document")[0].score == 1.0
        body = {"model": "colours-int8", "input": "green", "prompt_name": "query"}
        answer = client.post("/v1/embeddings", json=body).json()
        assert answer["data"][0]["embedding"] == pytest.approx([0.5**0.5, 0.5**0.5, 0], abs=1e-6)
        assert answer["usage"]["prompt_tokens"] == 2
        form = {"text": (None, "green"), "prompt_name": (None, "query")}
        assert client.post("/v1/embed", files=form).json()["embeddings"] == vectors
        assert client.post("/v1/embed", json={"inputs": [query["query"]], "prompt_name": "q"}).status_code == 422
