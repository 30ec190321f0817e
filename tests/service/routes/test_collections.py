"""Collections over HTTP; the vectors are the colours of tests/service/conftest.py."""

import json
import math
from unittest.mock import ANY

import numpy as np
import pytest

from calmclip.service.client import Client, Item
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
    assert hits == [
        {"id": "r", "score": pytest.approx(1, abs=1e-5), "relevance": ANY, "meta": {"title": "röd", "year": 2019}}
    ]

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


def test_one_item_by_id_and_vectors_on_request(client, picture):
    """Vectors are float32: (1, 1, 1) / sqrt(3) reads back as the nearest float32."""
    client.put("/v1/collections/read", json={})
    ids = ["a", "dir/b c.jpg", "%2F", "é?#&+", "line\nend\n", "it's", "..x", "/"]
    items = [{"id": id_, "text": "white", "meta": {"n": i, "m": "x"}} for i, id_ in enumerate(ids)]
    client.post("/v1/collections/read/items", json={"items": items})
    with Client(str(client.base_url)) as ours:
        for i, id_ in enumerate(ids):
            item = ours.item("read", id_, vectors=True)
            assert (item.id, item.meta) == (id_, {"n": i, "m": "x"})
            assert np.array(item.vector) == pytest.approx(3**-0.5, abs=1e-6)
            assert np.float32(item.vector[0]).item() == pytest.approx(item.vector[0], abs=5e-9)
            assert ours.item("read", id_).vector is None
        page = ours.page("read", limit=3, vectors=True, fields=["n", "never"])
        assert [item.id for item in page.items] == sorted(ids)[:3]
        assert all(len(item.vector) == 3 and item.meta == {"n": ids.index(item.id)} for item in page.items)
        assert [item.vector for item in ours.items("read", page_size=2)] == [None] * 8
    url = "/v1/collections/read/items"
    assert client.get(f"{url}/dir/b%20c.jpg").json() == {
        "id": "dir/b c.jpg", "meta": {"n": 1, "m": "x"}, "vector": None
    }  # fmt: skip
    for path, status, slug in [
        ("/never", 404, "item-not-found"), ("/A", 404, "item-not-found"), ("/", 404, "item-not-found"),
        ("/a%00", 422, "invalid-request"), ("/a?vectors=maybe", 422, "invalid-request"),
        ("/a?vector=true", 422, "invalid-request"), ("?vectors=true&vectors=false", 422, "invalid-request"),
        ("?fields", 200, None), (f"/{'x' * 9000}", 404, "item-not-found"),
    ]:  # fmt: skip
        answer = client.get(f"{url}{path}")
        assert answer.status_code == status, (path, answer.text)
        assert slug is None or answer.json()["type"] == f"/problems/{slug}", path
    assert client.get("/v1/collections/never/items/a").json()["type"] == "/problems/collection-not-found"
    assert client.post(f"{url}/a", json={}).status_code == 405


Q = {"query": {"text": "red"}}
ITEM = {"id": "x", "text": "red"}
ODD = [
    # method, path below /v1/collections, body, status, words of the answer
    ("POST", "/odd/search", {**Q, "filter": {"$or": [{"year": 1}]}}, 422, "a name with '$'"),
    ("POST", "/odd/search", {**Q, "filter": {"OR": [{"year": 1}]}}, 422, "filter.OR is a list"),
    (
        "POST",
        "/odd/search",
        {**Q, "filter": {"not": {"year": 1}}},
        422,
        "filter.not.year is no operator; known: contains",
    ),
    ("POST", "/odd/search", {**Q, "filter": {"tags": {"has": ["x", "y"]}}}, 422, "filter.tags.has is a list"),
    ("POST", "/odd/search", {**Q, "filter": {"tags": {"exists": "true"}}}, 422, "expected true or false"),
    ("POST", "/odd/search", {**Q, "filter": {"title": {"like": "%a%"}}}, 422, "filter.title.like is no operator"),
    ("POST", "/odd/search", {**Q, "filter": {"or": [[{"year": 1}]]}}, 422, "filter.or.0 is a list; expected an object"),
    ("POST", "/odd/search", {**Q, "top_k": 2**70}, 422, "integer of more than 64 bits"),
    ("POST", "/odd/search", {**Q, "top_k": 0}, 422, "top_k"),
    ("POST", "/odd/search", {**Q, "top_k": 1001}, 422, "at most 1000"),
    ("POST", "/odd/search", {**Q, "top_k": 2.5}, 422, "top_k"),
    ("POST", "/odd/search", {"query": "red"}, 422, ": expected an object"),
    ("POST", "/odd/search", {"query": {"txt": "red"}}, 422, "txt: there is no such field"),
    ("POST", "/odd/search", {}, 422, "query: Field required"),
    ("GET", "/odd/search", None, 405, "does not take GET"),
    ("POST", "/od/search", Q, 404, "did you mean 'odd'?"),
    ("GET", "/odd/items?limit=0", None, 422, "limit"),
    ("GET", "/odd/items?limit=1e2", None, 422, "limit"),
    ("GET", f"/odd/items?limit={2**70}", None, 422, "at most 1000"),
    (
        "GET",
        "/odd/items?offset=10",
        None,
        422,
        "'offset' of the query is unknown; the query may have after, fields, limit",
    ),
    ("GET", "/odd/items?vectors=ja", None, 422, "vectors"),
    ("GET", "/odd/items?fields[]=year", None, 422, "'fields[]' of the query is unknown"),
    ("GET", "/odd/items/nope", None, 404, "has no item 'nope'"),
    ("GET", "/odd/items/x?fields=year", None, 422, "the query may have vectors"),
    ("PATCH", "/odd/items/x", {}, 405, "does not take PATCH"),
    ("DELETE", "/odd/items", {"ids": "x"}, 422, "ids: expected a list"),
    ("DELETE", "/odd/items", {"ids": [1]}, 422, "ids.0: expected a string"),
    ("DELETE", "/odd/items?ids=x", {"ids": ["x"]}, 422, "'ids' of the query is unknown"),
    ("POST", "/odd/items", {"items": ITEM}, 422, "items: expected a list"),
    ("POST", "/odd/items", [ITEM], 422, "the body is a list; expected an object"),
    ("POST", "/odd/items", {"items": [{**ITEM, "id": 1}]}, 422, "items.0.id: expected a string"),
    ("POST", "/odd/items", {"items": [{**ITEM, "id": "x" * 513}]}, 422, "at most 512"),
    ("POST", "/odd/items", {"items": [ITEM, ITEM]}, 422, "the id 'x' is given twice"),
    ("POST", "/odd/items", {"items": [{**ITEM, "metadata": {}}]}, 422, "items.0.metadata: there is no such field"),
    ("POST", "/odd/items", {"items": [{**ITEM, "meta": None}]}, 422, "items.0.meta: expected an object"),
    ("POST", "/odd/items", {"items": [{**ITEM, "meta": {"n": -(2**64)}}]}, 422, "integer of more than 64 bits"),
    ("POST", "/odd/items", {"items": [{**ITEM, "meta": {"n": "y" * 20000}}]}, 422, "at most 16384"),
    ("PUT", "/a%20b", {}, 422, "is not a name for a collection"),
    ("PUT", "/odd", {"model": "nope"}, 404, "known: colours-int8"),
    ("PUT", "/new", {"dim": 2}, 422, "dim: there is no such field"),
    ("PUT", "/new", {"dimensions": 7}, 422, "dimensions is 7"),
    ("PUT", "/new", {"dimensions": True}, 422, "dimensions"),
    ("PUT", "/new", {"dimensions": 2**64}, 422, "integer of more than 64 bits"),
    ("PUT", "/new", {"keep_originals": "yes"}, 422, "keep_originals"),
    ("POST", "", {"name": "new"}, 405, "does not take POST"),
    ("DELETE", "/od", None, 404, "did you mean 'odd'?"),
    ("DELETE", "/odd?force=true", None, 422, "'force' of the query is unknown"),
]


def test_odd_requests_are_refused_in_words(client):
    client.put("/v1/collections/odd", json={})
    client.post("/v1/collections/odd/items", json={"items": [ITEM]})
    for method, path, body, status, words in ODD:
        sent = {} if body is None else {"content": json.dumps(body), "headers": {"content-type": "application/json"}}
        answer = client.request(method, f"/v1/collections{path}", **sent)
        assert answer.status_code == status, (method, path, body, answer.text)
        assert words in answer.json()["detail"], (method, path, body, answer.text)
    assert client.get("/v1/collections").json()["collections"][-1]["name"] != "new"
    assert client.get("/v1/collections/odd").json()["items"] == 1


def test_vectors_go_from_one_collection_into_another(client, picture):
    """Of a bundle that reads texts: a vector is an item's own, and so is a query's."""
    for name in ("from", "to"):
        client.put(f"/v1/collections/{name}", json={})
    fill(client, "from", picture)
    with Client(str(client.base_url)) as ours:
        read = [*ours.items("from", vectors=True)]
        items = [Item(item.id, vector=[2 * number for number in item.vector], meta=item.meta) for item in read]
        assert ours.upsert("to", [*items, Item("white", text="white")]).items == 4
        assert [[*np.float32(item.vector)] for item in ours.items("to", vectors=True)][:3] == [
            [*np.float32(item.vector)] for item in read
        ]
        assert [hit.id for hit in ours.search("to", "red", top_k=1)] == ["r"]
        assert [hit.id for hit in ours.search("to", vector=[0, 0, 9], top_k=1)] == ["b"]
    for vector, words in [
        ([1, 0], "item 'x' has 2 numbers; the collection 'to' holds vectors of 'colours-int8', which have 3"),
        ([0, 0, 0], "item 'x' has the length 0"), (["1", 0, 0], "vector"), ([1e300, 0, 0], "number 0 is 1e+300"),
    ]:  # fmt: skip
        answer = client.post("/v1/collections/to/items", json={"items": [{"id": "x", "vector": vector}]})
        assert (answer.status_code, words in answer.json()["detail"]) == (422, True), answer.text
    assert client.get("/v1/collections/to").json()["items"] == 4
