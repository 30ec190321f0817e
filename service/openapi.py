"""/openapi.json of the endpoints: bodies in three content types, and every problem."""

from copy import deepcopy
from itertools import chain
from operator import attrgetter
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from calmclip.models.errors import UnknownName, suggestion
from calmclip.service.access import OPEN, Access
from calmclip.service.descriptions import describe
from calmclip.service.endpoints import Endpoint, Table
from calmclip.service.problems import MEDIA_TYPE, PROBLEMS
from calmclip.service.schemas import Body, Faulty, PictureBody, PicturesBody, ProblemAnswer, Results, is_list, is_object
from calmclip.service.schemas.classifiers import FitBody
from calmclip.service.schemas.embed import EmbedBody
from calmclip.service.schemas.rank import RankBody
from calmclip.service.uploads import PICTURES

_NESTED = ("image", "images", "inputs", "examples", "boxes", "grid")  # a query cannot hold them
_REF = "#/components/schemas/{model}"
PROBLEM = {"content": {MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="ProblemAnswer")}}}}
BINARY = {"type": "string", "format": "binary"}
JSON, PNG = "application/json", "image/png"
LINES = "application/x-ndjson"  # for each result a line, a JSON object
PNG_FILE = {200: {"content": {PNG: {"schema": BINARY}}}}  # `Endpoint.responses` of an answer that is or may be a PNG
NOT_IN_FORMS = ("items", "validation", "unlabelled")  # of a fit
RETRY_AFTER = {
    "Retry-After": {
        "description": "seconds until a retry is likely to succeed",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    }
}


def operation(endpoint: Endpoint) -> dict[str, Any]:
    """Arguments of ``add_api_route`` that describe ``endpoint``. Raises `UnknownName` for an unknown problem."""
    return {
        "summary": endpoint.summary or None,
        "description": endpoint.description,
        "tags": [*endpoint.tags],
        "status_code": endpoint.status,
        "response_class": JSONResponse if endpoint.answer else Response,
        "responses": _answers(endpoint),
        "openapi_extra": _body(endpoint, endpoint.body) if endpoint.body else _file(endpoint),
        "include_in_schema": endpoint.listed,
        "operation_id": endpoint.handler.__name__ if endpoint.handler else None,  # of a generated client's method
    }


def _file(endpoint: Endpoint) -> dict[str, Any] | None:
    if not endpoint.kinds:
        return None
    return {"requestBody": {"required": True, "content": {kind: {"schema": BINARY} for kind in endpoint.kinds}}}


def _body(endpoint: Endpoint, model: type[Body]) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": _ref(model), "example": endpoint.example}}
    extra: dict[str, Any] = {"requestBody": {"required": not endpoint.optional, "content": content}}
    content |= {kind: {"schema": BINARY} for kind in endpoint.kinds}
    flat = {name: field for name, field in model.model_fields.items() if name not in _NESTED}
    properties = model.model_json_schema(ref_template=_REF)["properties"]
    schemas = {name: _form_field(schema) for name, schema in properties.items()}
    if issubclass(model, PictureBody):
        fields = {name: schemas[name] for name in flat}
        files = {"examples": {"type": "array", "items": BINARY}} if "examples" in model.model_fields else {}
        picture: dict[str, Any] = BINARY
        if issubclass(model, PicturesBody):
            many = {"type": "array", "minItems": 1, "items": BINARY, "description": "many files are many pictures"}
            picture = {"anyOf": [BINARY, many]}
        content["multipart/form-data"] = _form({"image": picture, **files, **fields}, required=["image"])
    if issubclass(model, EmbedBody):
        many = {
            name: {"type": "array", "minItems": 1, "items": kind}
            for name, kind in (("text", {"type": "string"}), ("image", BINARY))
        }
        content["multipart/form-data"] = _form({**many, **{name: schemas[name] for name in flat}}, required=[])
        content["multipart/form-data"]["schema"]["anyOf"] = [{"required": [name]} for name in many]
    if issubclass(model, RankBody):
        images = {"type": "array", "minItems": 1, "items": BINARY}
        content["multipart/form-data"] = _form({**schemas, "images": images}, required=["images"])
    if issubclass(model, FitBody):
        fields = {name: schemas[name] for name in flat if name not in NOT_IN_FORMS} | {
            "caption": {"type": "array", "items": {"type": "string"}, "description": "each after its picture"},
        }
        content["multipart/form-data"] = _form(fields, required=["method"])
        content["multipart/form-data"]["schema"]["additionalProperties"] = {
            **BINARY,  # not an array of them, of which openapi-python-client makes no Python
            "description": "a picture; the name of the field is its label, and may be repeated",
        }
    if model.raw:
        content |= {kind: {"schema": BINARY} for kind in PICTURES}
        extra["parameters"] = [
            {
                "name": name,
                "in": "query",
                "required": False,
                **({"content": {JSON: {"schema": schemas[name]}}} if is_object(field) else {"schema": schemas[name]}),
                "description": "only beside a raw picture" + ("; may be repeated" if is_list(field) else ""),
            }
            for name, field in flat.items()
        ]
    return extra


SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
ANY_QUERY = (*OPEN, "metrics")  # scopes of probes, scrapes and the page: no query changes their answers
EVERYWHERE = ("invalid-header", "deadline-exceeded", "internal")
CHALLENGE = {"WWW-Authenticate": {"description": "RFC 6750", "required": True, "schema": {"type": "string"}}}


def _answers(endpoint: Endpoint) -> dict[int | str, dict[str, Any]]:
    """The endpoint's answer and its problems, with those that every request may have."""
    done: dict[str, Any] = {"model": endpoint.answer} if endpoint.answer else {"description": "Done"}
    if endpoint.many:
        results: Any = Results
        done = {
            "model": endpoint.answer | results[endpoint.answer],
            "content": {LINES: {"schema": _line(endpoint.answer)}},
        }
    responses: dict[int | str, dict[str, Any]] = {endpoint.status: done}
    query = () if endpoint.scope in ANY_QUERY else ("invalid-request",)  # it may have an unknown field
    for slug in dict.fromkeys((*endpoint.problems, *query, *EVERYWHERE)):
        if slug not in PROBLEMS:
            raise UnknownName(f"{endpoint.name}: there is no problem {slug!r}; {suggestion(slug, PROBLEMS)}")
        status = endpoint.dialect.status(PROBLEMS[slug].status)
        response = responses.setdefault(status, {"description": "", **PROBLEM})
        response["description"] = ", ".join(filter(None, [response.get("description"), slug]))
        if slug == "overloaded":
            response["headers"] = RETRY_AFTER
    for status, more in endpoint.responses.items():
        responses[status] = {**responses.get(status, {}), **deepcopy(dict(more))}  # FastAPI changes it
    return responses


def _line(answer: type[BaseModel]) -> dict[str, Any]:
    """The schema of each line; FastAPI has the components from `Results`."""
    return {
        "description": "of each line: the result of one picture or input, in the order in which they are done",
        "anyOf": [_ref_to(f"Answered_{answer.__name__}_"), _ref(Faulty)],
    }


def install(app: FastAPI, access: Access, endpoints: Table) -> None:
    """Add the models of bodies to the components, and remove FastAPI's own 422.

    With keys, mark the operations that need one. Leave out operations at another port. Raises `ValueError` for two
    bodies, or two operations, of one name.
    """
    plain = app.openapi
    models: dict[str, type[BaseModel]] = {ProblemAnswer.__name__: ProblemAnswer}
    handlers: dict[str, Endpoint] = {}
    for endpoint in endpoints.all:
        if endpoint.handler and endpoint.listed:
            other = handlers.setdefault(endpoint.handler.__name__, endpoint)
            if other is not endpoint:
                raise ValueError(f"{endpoint.name}: the function of {other.name} has the same name; choose another")
        if endpoint.body and models.setdefault(endpoint.body.__name__, endpoint.body) is not endpoint.body:
            raise ValueError(f"{endpoint.name}: another model is called {endpoint.body.__name__}; choose another name")

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            spec = plain()
            schemas = spec["components"]["schemas"]
            if access.keys:
                spec["components"]["securitySchemes"] = SCHEMES
            for endpoint in filter(attrgetter("listed"), endpoints.all):
                if endpoint.scope == "metrics" and access.metrics_port:
                    del spec["paths"][endpoint.path]
                elif access.keys and endpoint.scope not in OPEN:
                    _require_key(spec["paths"][endpoint.path][endpoint.method.lower()], endpoint.scope)
            for operation in chain.from_iterable(path.values() for path in spec["paths"].values()):
                if "HTTPValidationError" in str(operation["responses"].get("422")):  # ours are problems
                    del operation["responses"]["422"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for name, model in models.items():
                schema = model.model_json_schema(ref_template=_REF)
                schemas |= schema.pop("$defs", {})
                schemas[name] = schema
            describe(spec)
            _complete(spec)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(schema: Any) -> None:
    """A list of anything says so: generators of clients leave out what holds an array without `items`."""
    if isinstance(schema, dict) and schema.get("type") == "array":
        schema.setdefault("items", {})
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _complete(inner)


def _require_key(operation: dict[str, Any], scope: str) -> None:
    operation["security"] = [{name: [scope]} for name in SCHEMES]
    for slug in ("unauthorized", "forbidden"):
        operation["responses"][str(PROBLEMS[slug].status)] = {"description": slug, "headers": CHALLENGE, **PROBLEM}


def _form_field(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field in a form or query, which has no null."""
    kinds: list[dict[str, Any]] = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    if len(kinds) != 1:
        return schema
    return {key: value for key, value in schema.items() if key != "anyOf" and value is not None} | kinds[0]


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return _ref_to(model.__name__)


def _ref_to(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}


def _form(fields: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"schema": {"type": "object", "properties": fields, "required": required}}
