"""The whole app: its imports, two of them at once, what it says of itself, and what it answers."""

import base64
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from service.app import create_app


def test_the_service_loads_no_torch_and_no_export():
    program = "import sys, service.app, service.cli; print([m for m in sys.modules if m.split('.')[0] in %r])"
    unwanted = ("torch", "export", "onnx", "transformers", "lancedb")  # LanceDB only when a store is opened
    found = subprocess.run([sys.executable, "-c", program % (unwanted,)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_store_loads_no_torch_either(settings, tmp_path):
    program = "import sys; from service.stores import open_store; open_store(%r); print('torch' in sys.modules)"
    place = f"lancedb:{tmp_path}"
    found = subprocess.run([sys.executable, "-c", program % place], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_two_apps_in_one_process_do_not_meet(settings, serve, tmp_path):
    with (
        serve(settings(data_dir=tmp_path / "a")) as one,
        serve(settings(data_dir=tmp_path / "b", limits={"labels": 1})) as two,
    ):
        one.put("/v1/collections/mine", json={})
        assert two.get("/v1/collections").json() == {"collections": []}
        assert one.put("/v1/label-sets/l", json={"labels": ["a", "b"]}).status_code == 200
        assert two.put("/v1/label-sets/l", json={"labels": ["a", "b"]}).status_code == 422


def test_a_fault_of_ours_is_500_without_details(settings, serve, monkeypatch, picture):
    def fail(*_: object):
        raise RuntimeError("secret path")

    monkeypatch.setattr("service.routes.classify.classify", fail)
    with serve(settings()) as client:
        send = {"content": picture("red"), "headers": {"content-type": "image/png"}}
        answer = client.post("/v1/classify?labels=red", **send)
        assert (answer.status_code, answer.json()["type"]) == (500, "/problems/internal")
        assert "secret" not in answer.text
        assert answer.json()["request_id"] in answer.json()["detail"]
        metrics = client.get("/metrics").text
        assert 'calmclip_requests_total{model="colours-int8",outcome="error",task="classify"} 1.0' in metrics
        assert "calmclip_requests_pending 0.0" in metrics


@pytest.mark.parametrize("broken", ["service.hub.Bundle.warm", "service.hub.names"])
def test_a_bundle_that_breaks_while_loading_is_told_and_loading_ends(settings, serve, monkeypatch, caplog, broken):
    def fail(*_: object):
        raise MemoryError("too large")

    monkeypatch.setattr(broken, fail)
    with serve(settings(), ready=False) as client:
        for _ in range(500):
            if failed := client.get("/readyz").json()["failed"]:
                break
            time.sleep(0.01)
        assert "too large" in next(iter(failed.values()))
        assert client.post("/v1/embed", json={"inputs": [{"text": "red"}]}).status_code == 409  # no longer "loading"
    assert any(record.exc_info for record in caplog.records)


def test_a_store_that_hangs_is_answered_504(settings, serve, monkeypatch):
    gate = threading.Event()
    with serve(settings(deadline_ms=1500)) as client:
        assert [client.put(f"/v1/collections/{name}", json={}).status_code for name in "ab"] == [201, 201]
        for call in ("LanceTable.count", "LanceTable.page", "LanceStore.create", "LanceStore.drop"):
            monkeypatch.setattr(f"service.stores.lancedb.{call}", lambda *_: gate.wait(8))
        calls = [("GET", ""), ("GET", "/a"), ("GET", "/a/items"), ("PUT", "/new"), ("DELETE", "/b")]
        try:
            with ThreadPoolExecutor(len(calls)) as pool:
                found = pool.map(lambda c: client.request(c[0], f"/v1/collections{c[1]}", json={}).status_code, calls)
                assert list(found) == [504] * len(calls)
        finally:
            gate.set()


@pytest.fixture(scope="module")
def spec(client):
    return client.get("/openapi.json").json()


def test_every_reference_in_the_specification_leads_somewhere(spec):
    def references(value):
        if isinstance(value, dict):
            yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            for one in value.values():
                yield from references(one)
        elif isinstance(value, list):
            for one in value:
                yield from references(one)

    found = set(references(spec))
    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in spec["components"]["schemas"], reference
    for schema in spec["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_answers_are_as_the_specification_says(client, spec, picture):
    image = {"b64": base64.b64encode(picture("red")).decode()}
    client.put("/v1/collections/spec", json={})
    client.put("/v1/label-sets/spec", json={"labels": ["red"]})
    item = {"id": "a", "image": image, "meta": {"n": 1}}
    calls = [
        ("post", "/v1/classify", {"image": image, "labels": ["red", "blue"]}),
        ("post", "/v1/detect", {"image": image, "labels": ["red"], "min_score": 0.1}),
        ("post", "/v1/embed", {"inputs": [{"text": "red"}, {"image": image}]}),
        ("get", "/v1/models", None),
        ("get", "/v1/models/{name}", None),
        ("get", "/v1/collections", None),
        ("put", "/v1/collections/{name}", {}),
        ("post", "/v1/collections/{name}/items", {"items": [item]}),
        ("get", "/v1/collections/{name}/items", None),
        ("post", "/v1/collections/{name}/search", {"query": {"text": "red"}}),
        ("get", "/v1/collections/{name}", None),
        ("delete", "/v1/collections/{name}/items", {"ids": ["a"]}),
        ("get", "/v1/label-sets", None),
        ("put", "/v1/label-sets/{name}", {"labels": ["red"]}),
        ("get", "/v1/label-sets/{name}", None),
        ("get", "/readyz", None),
        ("post", "/v1/classify", {"image": image, "labels": []}),
        ("post", "/v1/detect", {"image": image, "labels": ["red"], "sigma": -1}),
        ("get", "/v1/models/{unknown}", None),
    ]
    for method, path, body in calls:
        name = "colours-int8" if "models" in path else "spec"
        answer = client.request(method, path.replace("{name}", name), json=body)
        described = spec["paths"][path.replace("{unknown}", "{name}")][method]["responses"][str(answer.status_code)]
        (content,) = described["content"].items()
        assert answer.headers["content-type"] == content[0]
        schema = {"components": spec["components"], **content[1]["schema"]}
        jsonschema.validate(json.loads(answer.text), schema)


def test_examples_in_the_specification_are_valid(spec):
    for path in spec["paths"].values():
        for operation in path.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                if "example" in content:
                    schema = {"components": spec["components"], **content["schema"]}
                    jsonschema.validate(content["example"], schema)


def test_nothing_happens_before_the_app_starts(settings, tmp_path):
    create_app(settings(data_dir=tmp_path / "untouched"))
    assert not (tmp_path / "untouched").exists()
