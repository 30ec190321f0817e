"""Every object of every body in /openapi.json: an unknown field and a null that it does not allow are 422.

A null that it allows stands for a field that is left out. The bodies are the specification's examples with all optional
objects, so that every object is sent once.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import httpx
import pytest

from calmclip.service.endpoints import PIXEL

PICTURE = {"b64": PIXEL}
# The examples' missing objects: route -> fields.
MORE: dict[str, dict[str, Any]] = {
    "POST /v1/detect": {
        "grid": {"sizes": [0.5], "ratios": [1.0], "stride": 1.0},
        "examples": [{"image": PICTURE, "box": [0, 0, 1, 1], "label": "a"}],
        "classifier": "kept",
    },
    "PUT /v1/classifiers/{name}": {
        "head": {"name": "cosine", "params": {"scale": 10.0}},
        "descriptions": {"cat": ["a cat"]},
    },
    "POST /v1/collections/{name}/search": {"filter": {"year": {"gte": 2020}, "title": "dunes"}},
    "POST /v2/models/{name}/infer": {
        "inputs": [
            {"name": name, "datatype": "INT64", "shape": [1, 2], "data": [1, 1], "parameters": {}}
            for name in ("ids", "mask")
        ],
        "parameters": {},
        "outputs": [{"name": "text_embeds", "parameters": {}}],
    },
}
NAMES = {"/v2/models/{name}/infer": "mini-int8.text"}
# Statuses of a wrong request, other than 422: OpenAI's.
WRONG = dict.fromkeys(("/v1/embeddings", "/v1/models", "/v1/models/{name}"), 400)


@pytest.fixture(scope="module")
def client(serve, bundle_maker, tmp_path_factory):
    """A service over the bundle that the examples name."""
    from calmclip.service.settings import Settings

    folder = tmp_path_factory.mktemp("bodies")
    bundle_maker(folder / "bundles", "mini-int8")
    with serve(Settings(bundles_dir=folder / "bundles", data_dir=folder / "data", threads=1)) as client:
        assert client.put("/v1/collections/kept", json={"keep_originals": True})  # as the example.status_code == 201
        assert client.put("/v1/classifiers/kept", json={"labels": ["cat", "dog", "car"]}).status_code == 200
        yield client


@pytest.fixture(scope="module")
def spec(client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def resolve(schema: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = spec["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def choices(schema: dict[str, Any], spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The schema, or the alternatives of its ``anyOf``."""
    schema = resolve(schema, spec)
    return [each for inner in schema["anyOf"] for each in choices(inner, spec)] if "anyOf" in schema else [schema]


Place = tuple[str | int, ...]


def objects(
    value: Any, schema: dict[str, Any], spec: dict[str, Any], place: Place = ()
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Place and schema of each object in ``value`` that has declared fields."""
    for choice in choices(schema, spec):
        if isinstance(value, list) and choice.get("type") == "array":
            for index, inner in enumerate(value):
                yield from objects(inner, choice.get("items", {}), spec, (*place, index))
        elif isinstance(value, dict) and "properties" in choice:
            yield place, choice
            for name, inner in value.items():
                yield from objects(inner, choice["properties"].get(name, {}), spec, (*place, name))


def changed(body: dict[str, Any], place: Place, change: dict[str, Any], without: str | None = None) -> dict[str, Any]:
    body = deepcopy(body)
    target: Any = body
    for step in place:
        target = target[step]
    target |= change
    if without is not None:
        target.pop(without, None)
    return body


def bodies(spec: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Verb, path, schema and a body with all its objects, of each route with a JSON body."""
    for path, verbs in spec["paths"].items():
        for verb, operation in verbs.items():
            if "application/json" in operation.get("requestBody", {}).get("content", {}):
                content = operation["requestBody"]["content"]["application/json"]
                yield verb.upper(), path, content["schema"], content["example"] | MORE.get(f"{verb.upper()} {path}", {})


def test_the_bodies_hold_every_object(spec):
    sent, all_ = set(), set()
    for _, _, schema, body in bodies(spec):
        sent |= {choice.get("title") for _, choice in objects(body, schema, spec)}
        rest = [schema]
        while rest:
            for choice in choices(rest.pop(), spec):
                if "properties" in choice:
                    if choice.get("title") in all_ - {None}:
                        continue
                    all_.add(choice.get("title"))
                    rest += choice["properties"].values()
                rest += [choice["items"]] if "items" in choice else []
    assert {"SearchBody", "QueryInput", "ExampleBody", "InputTensor", "HeadBody", "KnownPicture"} <= all_
    assert sent == all_


def lasting(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two equal fits."""
    report = answer.get("report") and {**answer["report"], "seconds": 0}
    return {**answer, "version": 0, "report": report}


def meant(answer: httpx.Response) -> Any:
    """A picture as its bytes, JSON as what lasts."""
    picture = answer.headers["content-type"].startswith("image/")
    return answer.content if picture else lasting(answer.json())


def test_unknown_fields_and_nulls(client, spec):
    def send(verb: str, path: str, body: dict[str, Any], query: str = ""):
        return client.request(verb, path.replace("{name}", NAMES.get(path, "kept")) + query, json=body)

    checked = 0
    for verb, path, schema, body in bodies(spec):
        usual = send(verb, path, body)
        assert usual.is_success, (verb, path, usual.text)
        unknown = send(verb, path, body, "?unknown=1")
        assert (unknown.status_code, unknown.json()["errors"][0]["where"]) == (WRONG.get(path, 422), "unknown"), (
            verb,
            path,
        )
        for place, choice in objects(body, schema, spec):
            where = (verb, path, place)
            if not choice.get("additionalProperties"):  # a filter names fields of the metadata
                answer = send(verb, path, changed(body, place, {"unknown": 1}))
                assert answer.status_code == WRONG.get(path, 422), (where, answer.text)
            for name, field in choice["properties"].items():
                answer = send(verb, path, changed(body, place, {name: None}))
                if any(each.get("type") == "null" for each in choices(field, spec)):
                    absent = send(verb, path, changed(body, place, {}, without=name))
                    assert answer.status_code == absent.status_code, (where, name, answer.text, absent.text)
                    if answer.is_success and verb == "POST":
                        assert meant(answer) == meant(absent), (where, name)
                else:
                    assert answer.status_code == WRONG.get(path, 422), (where, name, answer.text)
                checked += 1
    assert checked > 80


def test_the_query_of_a_route_without_a_body(client, spec):
    for path, verbs in spec["paths"].items():
        for verb, operation in verbs.items():
            if "requestBody" in operation:
                continue
            url = path.replace("{slug}", "overloaded").replace("{name}", "kept")
            answer = client.request(verb, f"{url}?unknown=1")
            if path in ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"):
                assert answer.status_code == 200, path  # probes and scrapes may have a query
            else:
                assert answer.status_code == WRONG.get(path, 422), path
                assert answer.json()["detail"].startswith("the field 'unknown' of the query is unknown"), path
    assert client.get("/app.js?v=1").status_code == 200
    assert client.get("/v1/collections/kept").status_code == 200  # the DELETE was refused
