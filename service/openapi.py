"""What endpoints say of themselves in /openapi.json: bodies in three shapes, and every problem."""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from calmclip.models.errors import UnknownName, suggestion
from calmclip.service.access import OPEN, Access
from calmclip.service.endpoints import Endpoint, Table
from calmclip.service.problems import MEDIA_TYPE, PROBLEMS
from calmclip.service.schemas import Body, EmbedBody, PictureBody, ProblemAnswer
from calmclip.service.uploads import PICTURES, is_list

_REF = "#/components/schemas/{model}"
PROBLEM = {"content": {MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="ProblemAnswer")}}}}
BINARY = {"type": "string", "format": "binary"}
JSON = "application/json"
RETRY_AFTER = {
    "Retry-After": {
        "description": "seconds until there is likely to be room",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    }
}


def operation(endpoint: Endpoint) -> dict[str, Any]:
    """Of ``add_api_route`` what it says of ``endpoint``. Raises `UnknownName` for a problem that is none."""
    return {
        "summary": endpoint.summary or None,
        "description": endpoint.description,
        "tags": [*endpoint.tags],
        "status_code": endpoint.status,
        "response_class": JSONResponse if endpoint.answer else Response,
        "responses": _answers(endpoint),
        "openapi_extra": _takes(endpoint, endpoint.body) if endpoint.body else None,
        "include_in_schema": endpoint.listed,
    }


def _takes(endpoint: Endpoint, model: type[Body]) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": _ref(model), "example": endpoint.example}}
    extra: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    content |= {kind: {"schema": BINARY} for kind in endpoint.kinds}
    flat = {name: field for name, field in model.model_fields.items() if name not in ("image", "inputs", "examples")}
    schemas = {name: _said(one) for name, one in model.model_json_schema(ref_template=_REF)["properties"].items()}
    if issubclass(model, PictureBody):
        fields = {name: schemas[name] for name in flat}
        files = {"examples": {"type": "array", "items": BINARY}} if "examples" in model.model_fields else {}
        content["multipart/form-data"] = _form({"image": BINARY, **files, **fields}, required=["image"])
    if issubclass(model, EmbedBody):
        many = {
            name: {"type": "array", "minItems": 1, "items": kind}
            for name, kind in (("text", {"type": "string"}), ("image", BINARY))
        }
        content["multipart/form-data"] = _form({**many, **{name: schemas[name] for name in flat}}, required=[])
        content["multipart/form-data"]["schema"]["anyOf"] = [{"required": [name]} for name in many]
    if issubclass(model, (PictureBody, EmbedBody)):
        content |= {kind: {"schema": BINARY} for kind in PICTURES}
        extra["parameters"] = [
            {
                "name": name,
                "in": "query",
                "required": False,
                "schema": schemas[name],
                "description": "only beside a raw picture" + ("; may be repeated" if is_list(field) else ""),
            }
            for name, field in flat.items()
        ]
    return extra


SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
EVERYWHERE = ("invalid-header", "deadline-exceeded", "internal")
CHALLENGE = {"WWW-Authenticate": {"description": "RFC 6750", "required": True, "schema": {"type": "string"}}}


def _answers(endpoint: Endpoint) -> dict[int | str, dict[str, Any]]:
    """Its answer, and the problems it may come to, with those every request may."""
    done = {"model": endpoint.answer} if endpoint.answer else {"description": "Done"}
    found: dict[int | str, dict[str, Any]] = {endpoint.status: done}
    for slug in dict.fromkeys((*endpoint.problems, *EVERYWHERE)):
        if slug not in PROBLEMS:
            raise UnknownName(f"{endpoint.name}: there is no problem {slug!r}; {suggestion(slug, PROBLEMS)}")
        known = found.setdefault(PROBLEMS[slug].status, {"description": "", **PROBLEM})
        known["description"] = ", ".join(filter(None, [known.get("description"), slug]))
        if slug == "overloaded":
            known["headers"] = RETRY_AFTER
    for status, more in endpoint.responses.items():
        found[status] = {**found.get(status, {}), **more}
    return found


def install(app: FastAPI, access: Access, endpoints: Table) -> None:
    """Puts the models that endpoints read by hand among the components, and takes FastAPI's own 422 away.

    Says which operations need a key, where there are keys; leaves out what is at another port. Raises `ValueError` for
    two bodies of one name.
    """
    plain = app.openapi
    models: dict[str, type[BaseModel]] = {ProblemAnswer.__name__: ProblemAnswer}
    for endpoint in endpoints.all:
        if endpoint.body and models.setdefault(endpoint.body.__name__, endpoint.body) is not endpoint.body:
            raise ValueError(f"{endpoint.name}: another model is called {endpoint.body.__name__}; choose another name")

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            spec = plain()
            schemas = spec["components"]["schemas"]
            if access.keys:
                spec["components"]["securitySchemes"] = SCHEMES
            for endpoint in (one for one in endpoints.all if one.listed):
                if endpoint.scope == "metrics" and access.metrics_port:
                    del spec["paths"][endpoint.path]
                elif access.keys and endpoint.scope not in OPEN:
                    _close(spec["paths"][endpoint.path][endpoint.method.lower()], endpoint.scope)
            for operation in (one for path in spec["paths"].values() for one in path.values()):
                if "HTTPValidationError" in str(operation["responses"].get("422")):  # ours are problems
                    del operation["responses"]["422"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for name, model in models.items():
                schema = model.model_json_schema(ref_template=_REF)
                schemas |= schema.pop("$defs", {})
                schemas[name] = schema
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _close(operation: dict[str, Any], scope: str) -> None:
    operation["security"] = [{name: [scope]} for name in SCHEMES]
    for slug in ("unauthorized", "forbidden"):
        operation["responses"][str(PROBLEMS[slug].status)] = {"description": slug, "headers": CHALLENGE, **PROBLEM}


def _said(schema: dict[str, Any]) -> dict[str, Any]:
    """As a field of a form or query says it: there is no null, only its absence."""
    kinds: list[dict[str, Any]] = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    if len(kinds) != 1:
        return schema
    return {key: value for key, value in schema.items() if key != "anyOf" and value is not None} | kinds[0]


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _form(fields: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"schema": {"type": "object", "properties": fields, "required": required}}
