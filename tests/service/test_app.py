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

from calmclip.service.app import create_app
from calmclip.service.context import task_of


def test_the_service_loads_no_torch_and_no_export():
    program = "import sys, calmclip.service.app, calmclip.service.cli; print([m for m in %r if m in sys.modules])"
    unwanted = ("torch", "calmclip.export", "onnx", "transformers", "lancedb")  # LanceDB only when a store is opened
    found = subprocess.run([sys.executable, "-c", program % (unwanted,)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_store_loads_no_torch_either(settings, tmp_path):
    program = (
        "import sys; from calmclip.service.stores import open_store; open_store(%r); print('torch' in sys.modules)"
    )
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

    monkeypatch.setattr("calmclip.service.routes.classify.classify", fail)
    with serve(settings()) as client:
        send = {"content": picture("red"), "headers": {"content-type": "image/png"}}
        answer = client.post("/v1/classify?labels=red", **send)
        assert (answer.status_code, answer.json()["type"]) == (500, "/problems/internal")
        assert "secret" not in answer.text
        assert answer.json()["request_id"] in answer.json()["detail"]
        metrics = client.get("/metrics").text
        assert 'calmclip_requests_total{model="colours-int8",outcome="error",task="classify"} 1.0' in metrics
        assert "calmclip_requests_pending 0.0" in metrics
        assert "calmclip_ready 1.0" in metrics
        assert 'calmclip_failed{kind="bundles"} 0.0' in metrics


@pytest.mark.parametrize("broken", ["calmclip.service.hub.Bundle.warm", "calmclip.service.hub.names"])
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
        metrics = client.get("/metrics").text
        assert "calmclip_ready 0.0" in metrics
        assert 'calmclip_failed{kind="bundles"} 1.0' in metrics
        assert client.post("/v1/embed", json={"inputs": [{"text": "red"}]}).status_code == 409  # no longer "loading"
    assert any(record.exc_info for record in caplog.records)


def test_a_store_that_hangs_is_answered_504(settings, serve, monkeypatch):
    """The calls that hang have a deadline of their own: what is made before may take its time on a busy machine."""
    gate, late = threading.Event(), {"x-request-deadline-ms": "300"}
    with serve(settings()) as client:
        assert [client.put(f"/v1/collections/{name}", json={}).status_code for name in "ab"] == [201, 201]
        for call in ("LanceTable.count", "LanceTable.page", "LanceStore.create", "LanceStore.drop"):
            monkeypatch.setattr(f"calmclip.service.stores.lancedb.{call}", lambda *_: gate.wait(15))
        calls = [("GET", ""), ("GET", "/a"), ("GET", "/a/items"), ("PUT", "/new"), ("DELETE", "/b")]
        try:
            with ThreadPoolExecutor(len(calls)) as pool:
                found = pool.map(lambda c: client.request(c[0], f"/v1/collections{c[1]}", json={}, headers=late), calls)
                assert [answer.status_code for answer in found] == [504] * len(calls)
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
    ids = {"datatype": "INT64", "shape": [1, 1], "data": [1]}
    calls = [
        ("post", "/v1/classify", {"image": image, "labels": ["red", "blue"]}),
        ("post", "/v1/detect", {"image": image, "labels": ["red"], "min_score": 0.1}),
        ("post", "/v1/embed", {"inputs": [{"text": "red"}, {"image": image}]}),
        ("post", "/v1/embeddings", {"model": "colours-int8", "input": ["red"], "encoding_format": "base64"}),
        ("post", "/v1/embeddings", {"model": "colours-int8", "input": "red"}),
        ("get", "/v2", None),
        ("get", "/v2/health/live", None),
        ("get", "/v2/health/ready", None),
        ("get", "/v2/models/{name}.text", None),
        ("get", "/v2/models/{name}.text/ready", None),
        ("post", "/v2/models/{name}.text/infer", {"inputs": [ids | {"name": name} for name in ("ids", "mask")]}),
        ("post", "/v2/models/{name}.text/infer", {"inputs": []}),
        ("get", "/healthz", None),
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
        template = path.replace("{unknown}", "{name}").replace(".text", "")
        described = spec["paths"][template][method]["responses"][str(answer.status_code)]
        content = described["content"][answer.headers["content-type"]]
        schema = {"components": spec["components"], **content["schema"]}
        jsonschema.validate(json.loads(answer.text), schema)


def test_every_operation_declares_what_it_may_answer(spec):
    """What it did answer in all these tests is held against it too: `declared` in conftest.py."""
    ready = {"/readyz", "/v2/health/ready"}  # 503, and 400, are their answers
    seen = 0
    for path, verbs in spec["paths"].items():
        for verb, operation in verbs.items():
            responses = operation["responses"]
            must = {"500"}
            if "requestBody" in operation:
                must |= {"413", "415", "422", "503", "504"}
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
                seen += 1
    assert seen > 100
    assert "HTTPValidationError" not in spec["components"]["schemas"]


def test_examples_in_the_specification_are_valid(spec):
    for path in spec["paths"].values():
        for operation in path.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                if "example" in content:
                    schema = {"components": spec["components"], **content["schema"]}
                    jsonschema.validate(content["example"], schema)


def test_examples_in_the_specification_are_answered(client, spec):
    client.put("/v1/collections/colours-int8", json={})
    for path, verbs in spec["paths"].items():
        for verb, operation in verbs.items():
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                if "example" in content:
                    name = "colours-int8.text" if path.startswith("/v2") else "colours-int8"
                    text = json.dumps(content["example"]).replace("mini-int8", "colours-int8")
                    asked = {"content": text, "headers": {"content-type": kind}}
                    answer = client.request(verb, path.replace("{name}", name), **asked)
                    assert answer.is_success, f"{verb} {path}: {answer.text}"


def test_nothing_happens_before_the_app_starts(settings, tmp_path):
    create_app(settings(data_dir=tmp_path / "untouched"))
    assert not (tmp_path / "untouched").exists()


def test_every_operation_counts_as_something_and_whoever_passes_the_gate_may_be_turned_away(client):
    for path, verbs in client.get("/openapi.json").json()["paths"].items():
        for verb, operation in verbs.items():
            asked = path.replace("{name}", "a.b-c").replace("{slug}", "overloaded")
            assert task_of(verb.upper(), asked) != "other", (verb, path)
            assert verb in ("get", "head") or "503" in operation["responses"], (verb, path)
    assert task_of("POST", "/v1/collections/x/items") == "index"
    assert task_of("GET", "/v1/collections/x/items") == "collections"
    assert task_of("GET", "/") == task_of("GET", "/app.js") == "catalog"
    assert task_of("POST", "/v1/nothing") == task_of("GET", "/wp-login.php/x") == "other"
