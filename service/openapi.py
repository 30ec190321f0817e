"""What the routes say of themselves in /openapi.json: bodies in three shapes, and every problem."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from calmclip.service.access import METRICS, Access, needs
from calmclip.service.problems import MEDIA_TYPE, PROBLEMS
from calmclip.service.schemas import Body, EmbedBody, LabelledPicture, ProblemAnswer
from calmclip.service.uploads import PICTURES, is_list

_REF = "#/components/schemas/{model}"
PROBLEM = {"content": {MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="ProblemAnswer")}}}}
BINARY = {"type": "string", "format": "binary"}
# A PNG, for examples that work.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGM4UaEBAAN0AWnL+tDXAAAAAElFTkSuQmCC"
RETRY_AFTER = {
    "Retry-After": {
        "description": "seconds until there is likely to be room",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    }
}


def takes(model: type[Body], example: dict[str, Any]) -> dict[str, Any]:
    """``openapi_extra`` of a route that reads ``model`` through `uploads.read_body`."""
    content: dict[str, Any] = {"application/json": {"schema": _ref(model), "example": example}}
    extra: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    flat = {name: field for name, field in model.model_fields.items() if name not in ("image", "inputs", "examples")}
    schemas = {name: _said(one) for name, one in model.model_json_schema(ref_template=_REF)["properties"].items()}
    if issubclass(model, LabelledPicture):
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
    if issubclass(model, (LabelledPicture, EmbedBody)):
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
CHALLENGE = {"WWW-Authenticate": {"description": "RFC 6750", "required": True, "schema": {"type": "string"}}}


def answers(model: Any, *slugs: str, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route: its answer, and the problems it may come to, with those every route may."""
    found: dict[int | str, dict[str, Any]] = {status: {"model": model}} if model else {status: {"description": "Done"}}
    for slug in dict.fromkeys((*slugs, "invalid-header", "deadline-exceeded", "internal")):
        known = found.setdefault(PROBLEMS[slug].status, {"description": "", **PROBLEM})
        known["description"] = ", ".join(filter(None, [known.get("description"), slug]))
        if slug == "overloaded":
            known["headers"] = RETRY_AFTER
    return found


ENGINE = ("overloaded", "model-not-found", "task-not-served")
INPUT = ("invalid-request", "picture-not-fetched", "unsupported-media-type", "body-too-large")
PICTURE = ("unsupported-image", "image-too-large")


def install(app: FastAPI, access: Access, *models: type[Body]) -> None:
    """Puts the models that routes read by hand among the components, and takes FastAPI's own 422 away.

    Says which operations need a key, where there are keys; leaves out what is at another port.
    """
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            spec = plain()
            schemas = spec["components"]["schemas"]
            if access.metrics_port:
                spec["paths"].pop(METRICS)
            if access.keys:
                spec["components"]["securitySchemes"] = SCHEMES
                for path, verbs in spec["paths"].items():
                    for method, operation in verbs.items():
                        if not access.is_open(method.upper(), path):
                            _close(operation, needs(method.upper(), path))
            for operation in (one for path in spec["paths"].values() for one in path.values()):
                if "HTTPValidationError" in str(operation["responses"].get("422")):  # ours are problems
                    del operation["responses"]["422"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            named: tuple[type[BaseModel], ...] = (*models, ProblemAnswer)
            for model in named:
                schema = model.model_json_schema(ref_template=_REF)
                schemas |= schema.pop("$defs", {})
                schemas[model.__name__] = schema
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
