"""The app as a whole: two apps in one process, its faults, its specification and its answers."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from calmclip.service.app import create_app
from calmclip.service.endpoints import Table, registered
from calmclip.service.routes.catalog import page
from tests.asking import raw


def test_two_apps_in_one_process_share_no_state(settings, serve, tmp_path):
    with (
        serve(settings(data_dir=tmp_path / "a")) as first,
        serve(settings(data_dir=tmp_path / "b", limits={"labels": 1})) as second,
    ):
        first.put("/v1/collections/mine", json={})
        assert second.get("/v1/collections").json() == {"collections": []}
        assert first.put("/v1/classifiers/l", json={"labels": ["a", "b"]}).status_code == 200
        assert second.put("/v1/classifiers/l", json={"labels": ["a", "b"]}).status_code == 422


def test_a_fault_of_the_service_is_500_without_details(settings, serve, monkeypatch, picture):
    def fail(*_: object):
        raise RuntimeError("secret path")

    monkeypatch.setattr("calmclip.service.routes.classify.ClassifyRequest", fail)
    with serve(settings()) as client:
        answer = client.post("/v1/classify?labels=red", **raw(picture("red")))
        assert (answer.status_code, answer.json()["type"]) == (500, "/problems/internal")
        assert "secret" not in answer.text
        assert answer.json()["request_id"] in answer.json()["detail"]
        metrics = client.get("/metrics").text
        assert 'calmclip_requests_total{model="colours-int8",outcome="error",task="classify"} 1.0' in metrics
        assert "calmclip_requests_pending 0.0" in metrics
        assert "calmclip_ready 1.0" in metrics
        assert 'calmclip_failed{kind="bundles"} 0.0' in metrics


@pytest.mark.parametrize("broken", ["calmclip.service.hub.Bundle.warm", "calmclip.service.hub.names"])
def test_a_bundle_that_fails_to_load_is_reported_and_loading_ends(settings, serve, monkeypatch, caplog, broken):
    def fail(*_: object):
        raise MemoryError("too large")

    monkeypatch.setattr(broken, fail)
    with serve(settings(), ready=False) as client:
        for _ in range(500):
            if failed := client.get("/readyz").json()["failed"]:
                break
            time.sleep(0.01)
        assert "too large" in next(iter(failed.values()))
        metrics = client.get("/metrics").text
        assert "calmclip_ready 0.0" in metrics
        assert 'calmclip_failed{kind="bundles"} 1.0' in metrics
        assert client.post("/v1/embed", json={"inputs": [{"text": "red"}]}).status_code == 409  # no longer "loading"
    assert any(record.exc_info for record in caplog.records)


def test_a_store_that_hangs_is_answered_504(settings, serve, monkeypatch):
    """Only the calls that hang have a short deadline: the set-up may be slow on a busy machine."""
    gate, late = threading.Event(), {"x-request-deadline-ms": "300"}
    with serve(settings()) as client:
        assert [client.put(f"/v1/collections/{name}", json={}).status_code for name in "ab"] == [201, 201]
        for call in ("LanceTable.count", "LanceTable.page", "LanceStore.create", "LanceStore.drop"):
            monkeypatch.setattr(f"calmclip.service.stores.lancedb.{call}", lambda *_: gate.wait(15))
        calls = [("GET", ""), ("GET", "/a"), ("GET", "/a/items"), ("PUT", "/new"), ("DELETE", "/b")]
        try:
            with ThreadPoolExecutor(5) as pool:
                answers = pool.map(
                    lambda c: client.request(c[0], f"/v1/collections{c[1]}", json={}, headers=late), calls
                )
                assert [answer.status_code for answer in answers] == [504] * len(calls)
        finally:
            gate.set()


@pytest.fixture(scope="module")
def spec(client):
    return client.get("/openapi.json").json()


def test_every_reference_in_the_specification_resolves(spec):
    def references(value):
        if isinstance(value, dict):
            yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            for child in value.values():
                yield from references(child)
        elif isinstance(value, list):
            for child in value:
                yield from references(child)

    targets = set(references(spec))
    assert targets
    for reference in targets:
        assert reference.removeprefix("#/components/schemas/") in spec["components"]["schemas"], reference
    for schema in spec["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_operation_declares_its_answers(spec):
    """`declared` in conftest.py also compares the actual answers of all these tests with the specification."""
    ready = {"/readyz", "/v2/health/ready"}  # their "not ready" is 503 or 400, without a problem
    checked = 0
    for path, verbs in spec["paths"].items():
        for verb, operation in verbs.items():
            responses = operation["responses"]
            must = {"500"}
            if "requestBody" in operation:
                must |= {"413", "503", "504"} | ({"400"} if path == "/v1/embeddings" else {"415", "422"})
            if "{" in path and verb != "put":
                must |= {"404"}
            assert must <= responses.keys(), f"{verb} {path} declares {sorted(responses)}; expected {sorted(must)} too"
            assert responses.keys() & {"200", "201", "204"}
            for status, response in responses.items():
                assert response["description"], f"{verb} {path} {status}"
                if status >= "400" and path not in ready:
                    (kind,) = response["content"]
                    assert kind == "application/problem+json"
                    assert response["content"][kind]["schema"] == {"$ref": "#/components/schemas/ProblemAnswer"}
                if status == "503" and path not in ready:
                    assert response["headers"]["Retry-After"]["required"]
                checked += 1
    assert checked > 100
    assert "HTTPValidationError" not in spec["components"]["schemas"]


def test_examples_in_the_specification_are_valid_and_answered(client, spec):
    """GET operations are called too. conftest.py compares the answers with the specification."""
    client.put("/v1/collections/colours-int8", json={"keep_originals": True})
    for path, verbs in spec["paths"].items():
        name = "colours-int8.text" if path.startswith("/v2") else "colours-int8"
        url = path.replace("{name}", name).replace("{slug}", "overloaded").replace("{id}", "a1")
        for verb, operation in verbs.items():
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                if "example" in content:
                    jsonschema.validate(content["example"], {"components": spec["components"], **content["schema"]})
                    text = json.dumps(content["example"]).replace("mini-int8", "colours-int8")
                    answer = client.request(verb, url, **raw(text.encode(), kind))
                    assert answer.is_success, f"{verb} {path}: {answer.text}"
        if "get" in verbs:
            assert client.get(url).is_success, path


def test_create_app_writes_nothing(settings, tmp_path):
    create_app(settings(data_dir=tmp_path / "untouched"))
    assert not (tmp_path / "untouched").exists()


def test_every_operation_has_the_task_of_its_endpoint_and_every_write_may_be_shed(client):
    table = Table([*registered(), *page()])
    for path, verbs in client.get("/openapi.json").json()["paths"].items():
        for verb, operation in verbs.items():
            url = path.replace("{name}", "a.b-c").replace("{slug}", "overloaded")
            assert table.find(verb.upper(), url).name == f"{verb.upper()} {path}"
            assert verb in ("get", "head") or "503" in operation["responses"], (verb, path)
    counts = {
        "POST /v1/classify": "classify", "POST /v1/detect": "detect", "POST /v1/embed": "embed", "GET /": "catalog",
        "POST /v1/embeddings": "embed", "POST /v1/collections/x/search": "search", "GET /v2": "catalog",
        "POST /v1/collections/x/items": "index", "GET /v1/collections/x/items": "collections",
        "PUT /v1/collections/x": "collections",
        "POST /v1/classifiers/x/fit": "classifiers", "POST /v2/models/a.b/infer": "infer", "HEAD /app.js": "catalog",
        "POST /v1/nothing": "other", "GET /wp-login.php/x": "other", "PUT /v1/classify": "other",
        "POST /v1/collections/x/y/search": "other", "POST /v1/collections//search": "other",
    }  # fmt: skip
    assert {name: table.find(*name.split()).task for name in counts} == counts
