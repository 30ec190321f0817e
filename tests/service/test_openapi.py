"""/openapi.json as a generator of clients reads it: stable names, and a description of everything."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from calmclip.service import descriptions, openapi
from calmclip.service.access import Access
from calmclip.service.app import create_app
from calmclip.service.asked import Asked
from calmclip.service.endpoints import Endpoint, Table
from calmclip.service.settings import Settings

# A client that was generated from an older version has methods of these names: one may be added, and none changed.
OPERATIONS = {
    "add_items", "calibrate_classifier", "classify_picture", "compress_texts", "create_embeddings",
    "delete_classifier", "delete_collection", "delete_items", "describe_graph", "describe_server", "detect_boxes",
    "embed_inputs", "enhance_picture", "explain_caption", "explain_problem", "find_anomaly", "fit_classifier",
    "get_bank", "get_classifier", "get_collection", "get_item", "get_model", "graph_ready", "healthz", "infer",
    "list_classifiers", "list_collections", "list_items", "list_models", "make_collection", "metrics", "put_bank",
    "put_classifier", "rank_pictures", "readyz", "search_collection", "segment_picture", "server_live", "server_ready",
    "tag_picture",
}  # fmt: skip
STRINGS = {"minLength", "maxLength", "pattern"}  # keywords that say nothing about another type
DATA = ("example", "examples", "default", "enum", "const")  # keys whose value is no schema
CONSTRAINTS = ("oneOf", "not", "allOf")  # they repeat properties that are described beside them


@pytest.fixture(scope="module")
def spec(bundles, tmp_path_factory) -> dict[str, Any]:
    return create_app(Settings(bundles_dir=bundles, data_dir=tmp_path_factory.mktemp("data"))).openapi()


def schemas(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object below ``node`` that may be a schema, with its place."""
    if isinstance(node, dict):
        yield where, node
    elif not isinstance(node, list):
        return
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
        if key not in DATA:
            yield from schemas(inner, f"{where}/{key}")


def test_every_property_and_parameter_is_described(spec):
    undescribed = []
    for where, schema in schemas(spec):
        constrains = any(f"/{word}/" in where for word in CONSTRAINTS)
        if not constrains and isinstance(fields := schema.get("properties"), dict) and "type" in schema:
            undescribed += [f"{where}/{name}" for name, field in fields.items() if not field.get("description")]
        if "in" in schema and "schema" in schema:
            undescribed += [] if schema.get("description") else [f"{where}: {schema['name']}"]
    for path, operations in spec["paths"].items():
        undescribed += [f"{verb} {path}" for verb, operation in operations.items() if not operation.get("summary")]
    assert undescribed == []


def test_no_description_of_the_table_is_left_over(spec):
    models = spec["components"]["schemas"]
    named = {f"{model}.{name}" for model, schema in models.items() for name in schema.get("properties", {})}
    known = {key.rpartition(".")[2] for key in named} | named
    assert [key for key in descriptions.PROPERTIES if key not in known] == []


def test_every_array_says_what_it_holds(spec):
    """openapi-python-client leaves out an endpoint whose body has an array without `items`."""
    assert [where for where, schema in schemas(spec) if schema.get("type") == "array" and "items" not in schema] == []


def test_a_keyword_of_strings_stands_beside_a_string(spec):
    wrong = [
        where
        for where, schema in schemas(spec)
        if STRINGS & schema.keys() and schema.get("type") != "string" and not where.endswith("/properties")
    ]
    assert wrong == []


def test_operation_ids_are_the_names_of_functions_and_stay(spec):
    ids = [operation["operationId"] for verbs in spec["paths"].values() for operation in verbs.values()]
    assert len(ids) == len({*ids})
    assert {*ids} >= OPERATIONS
    assert all(id_.isidentifier() and id_.islower() for id_ in ids)


def test_two_functions_of_one_name_are_refused(settings):
    async def shout(asked: Asked[None]) -> None: ...

    table = Table([Endpoint("GET", f"/v1/{path}", task="t", handler=shout) for path in ("a", "b")])
    with pytest.raises(ValueError, match=r"GET /v1/b: the function of GET /v1/a has the same name"):
        openapi.install(FastAPI(), Access(settings()), table)
