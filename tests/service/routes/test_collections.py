"""Collections over HTTP; vectors are colours known by hand (tests/service/conftest.py)."""

import base64
import math
from concurrent.futures import ThreadPoolExecutor

import pytest


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


@pytest.fixture
def name(client, request):
    name = f"c{abs(hash(request.node.name)) % 10**9}"
    assert client.put(f"/v1/collections/{name}", json={}).status_code == 201
    yield name
    client.delete(f"/v1/collections/{name}")


def fill(client, name, picture):
    items = [
        {"id": "r", "image": b64(picture("red")), "meta": {"title": "röd", "year": 2019}},
        {"id": "g", "text": "green", "meta": {"year": 2020}},
        {"id": "b", "text": "blue", "meta": {"year": 2021}},
    ]
    return client.post(f"/v1/collections/{name}/items", json={"items": items})


def test_fill_search_filter_remove(client, name, picture):
    assert fill(client, name, picture).json() == {"collection": name, "count": 3, "items": 3}
    url = f"/v1/collections/{name}/search"

    hits = client.post(url, json={"query": {"text": "yellow"}, "top_k": 2}).json()["hits"]
    assert {one["id"] for one in hits} == {"r", "g"}  # yellow = red + green: both at 45 degrees
    assert [one["score"] for one in hits] == pytest.approx([math.sqrt(0.5)] * 2, abs=1e-5)

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
        assert {one["id"] for one in hits} == set(wanted), where

    gone = client.request("DELETE", f"/v1/collections/{name}/items", json={"ids": ["r", "never"]})
    assert gone.json() == {"collection": name, "count": 1, "items": 2}


def test_items_are_paged_by_id(client, name, picture):
    fill(client, name, picture)
    page = client.get(f"/v1/collections/{name}/items", params={"limit": 2}).json()
    assert [one["id"] for one in page["items"]] == ["b", "g"]
    page = client.get(f"/v1/collections/{name}/items", params={"limit": 2, "after": page["next"]}).json()
    assert page == {
        "collection": name,
        "items": [{"id": "r", "meta": {"title": "röd", "year": 2019}}],
        "next": None,
    }


def test_put_again_changes_nothing(client, name, picture):
    fill(client, name, picture)
    again = client.put(f"/v1/collections/{name}", json={"model": "colours-int8"})
    assert again.status_code == 200
    assert again.json()["items"] == 3


def test_list_and_delete(client, name):
    names = [one["name"] for one in client.get("/v1/collections").json()["collections"]]
    assert name in names
    assert client.delete(f"/v1/collections/{name}").status_code == 204
    assert client.get(f"/v1/collections/{name}").status_code == 404
    assert client.put(f"/v1/collections/{name}", json={}).status_code == 201


def test_writes_of_many_clients_all_arrive(client, name):
    def write(i: int) -> int:
        items = [{"id": f"{i}-{j}", "text": "red"} for j in range(5)]
        return client.post(f"/v1/collections/{name}/items", json={"items": items}).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(write, range(24))) == {200}
    assert client.get(f"/v1/collections/{name}").json()["items"] == 120


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
    bundle_maker(other, note="trained longer")
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
        bundle_maker(bundles, "other-int8")
    with serve(settings(bundles_dir=bundles)) as client:
        asked = {"query": {"text": "blue"}, "model": "other-int8"}
        assert client.post("/v1/collections/kept/search", json=asked).status_code == 409
