"""Exception -> RFC 9457 problem, in one table. Routes do not catch exceptions.

`/problems/{slug}` explains each one; service/README.md lists them; a test compares.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from calmclip.models import errors
from calmclip.models.errors import CalmclipError, Overloaded, Unavailable
from calmclip.models.preprocess.formats import NAMES
from calmclip.service import errors as http_errors
from calmclip.service.dialects import Fault
from calmclip.service.request import Context

log = logging.getLogger("calmclip")
MEDIA_TYPE = "application/problem+json"
VERBS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
CLIENT_GONE = 499  # only in logs and metrics: the client has disconnected


class Problem(NamedTuple):
    slug: str
    status: int
    title: str
    explanation: str


INTERNAL = Problem(
    "internal", 500, "Internal error", "A fault of the service. The log has the details under the request id."
)
NOT_FOUND = Problem("not-found", 404, "Not found", "No route has this path. GET /openapi.json lists the routes.")
METHOD = Problem("method-not-allowed", 405, "Method not allowed", "The path exists; `Allow` lists its methods.")

_INVALID = Problem(
    "invalid-request",
    422,
    "Invalid request",
    "The body does not fit the schema, or its values contradict each other. `errors` lists the places, if known.",
)

# A class without an entry has the problem of its nearest base.
TABLE: dict[type[BaseException], Problem] = {
    errors.InputError: _INVALID,
    errors.BadImage: Problem(
        "unsupported-image", 415, "Unsupported image", f"The bytes are not a complete {NAMES} file."
    ),
    errors.ImageTooLarge: Problem(
        "image-too-large", 413, "Image too large", "The picture has more bytes or pixels than CALMCLIP_LIMITS allow."
    ),
    errors.TooManyLabels: Problem(
        "too-many-labels", 422, "Too few or too many labels", "Send at least one and at most CALMCLIP_LIMITS__LABELS."
    ),
    errors.TextTooLong: Problem(
        "text-too-long", 422, "Text too long", "A text has more tokens than the model reads. Shorten it."
    ),
    http_errors.NotFetched: Problem(
        "picture-not-fetched",
        422,
        "Picture not fetched",
        "The address of a picture is not allowed, or it gave no picture. CALMCLIP_URL_HOSTS lists the hosts; "
        "without it the service fetches nothing.",
    ),
    http_errors.BodyTooLarge: Problem(
        "body-too-large",
        413,
        "Body too large",
        "The request has more bytes than CALMCLIP_LIMITS__BODY_BYTES or its route allow.",
    ),
    http_errors.WrongContentType: Problem(
        "unsupported-media-type",
        415,
        "Unsupported media type",
        "Send application/json, multipart/form-data or, for one picture alone, image/*, such as image/jpeg.",
    ),
    http_errors.InvalidHeader: Problem(
        "invalid-header", 400, "Invalid header", "A header has a value that cannot be used; `detail` says which."
    ),
    http_errors.NotSupported: Problem(
        "not-supported",
        400,
        "Not supported",
        "A part of Triton's protocol that this service does not have; `detail` says what to do instead.",
    ),
    http_errors.Unauthorized: Problem(
        "unauthorized", 401, "Unauthorized", "The service needs a key, and the request has no known one."
    ),
    http_errors.Forbidden: Problem(
        "forbidden", 403, "Forbidden", "The key is known, but lacks a scope; `detail` says which one is needed."
    ),
    errors.ExtraMissing: Problem(
        "extra-missing",
        422,
        "Package missing",
        "The method needs an optional package that this service lacks; `detail` names it. Choose another method.",
    ),
    errors.BundleNotFound: Problem("model-not-found", 404, "Model not found", "No bundle of that name is loaded."),
    errors.UnknownName: NOT_FOUND,
    errors.CollectionNotFound: Problem(
        "collection-not-found", 404, "Collection not found", "PUT /v1/collections/{name} creates one."
    ),
    errors.ItemNotFound: Problem(
        "item-not-found",
        404,
        "Item not found",
        "The collection has no item with this id. GET /v1/collections/{name}/items lists them.",
    ),
    errors.CollectionExists: Problem(
        "collection-exists",
        409,
        "Collection exists",
        "The name is in use. Choose another one, or delete the collection.",
    ),
    errors.ClassifierNotFound: Problem(
        "classifier-not-found",
        404,
        "Classifier not found",
        "PUT /v1/classifiers/{name} registers one, and POST /v1/classifiers/{name}/fit fits one.",
    ),
    errors.ClassifierExists: Problem(
        "classifier-exists",
        409,
        "Classifier exists",
        "The name is in use. Choose another one, or send `replace`.",
    ),
    errors.ClassifierMismatch: Problem(
        "classifier-bundle-mismatch",
        409,
        "Wrong bundle for this classifier",
        "It was fitted to vectors of other bundles. Use a bundle of its family, or fit it again.",
    ),
    errors.TaskNotServed: Problem(
        "task-not-served",
        409,
        "Task not served",
        "The bundle exists, but does not serve this task. GET /v1/models lists its tasks.",
    ),
    errors.CollectionMismatch: Problem(
        "collection-bundle-mismatch",
        409,
        "Wrong bundle for this collection",
        "Vectors of different bundles cannot be compared. Load the bundle that filled it, or let the operator run "
        "`calmclip collection re-embed`.",
    ),
    errors.CollectionDamaged: Problem(
        "collection-damaged",
        500,
        "Collection damaged",
        "The collection does not open; the others do. `detail` says why. Restore it from a backup, or delete it.",
    ),
    errors.Overloaded: Problem(
        "overloaded",
        503,
        "Overloaded",
        "Too much work is in flight, or the service is loading or shutting down. `Retry-After` says when to try again.",
    ),
    errors.StoreUnavailable: Problem(
        "store-unavailable",
        503,
        "Store unavailable",
        "The database of the collections does not answer; other routes work. `Retry-After` says when to try again.",
    ),
    errors.DeadlineExceeded: Problem(
        "deadline-exceeded",
        504,
        "Deadline exceeded",
        "The answer would have come later than CALMCLIP_DEADLINE_MS, or than X-Request-Deadline-Ms asked for.",
    ),
    errors.CalmclipError: INTERNAL,
}

PROBLEMS = {problem.slug: problem for problem in [*TABLE.values(), METHOD]}


def find(error: BaseException) -> Problem:
    return next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), INTERNAL)


def install(app: FastAPI) -> None:
    app.add_exception_handler(CalmclipError, answer)
    app.add_exception_handler(HTTPException, _starlette)
    app.add_exception_handler(RequestValidationError, _query)
    app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=CLIENT_GONE))


def render(
    request: Request, problem: Problem, detail: str, extra: Mapping[str, Any] | None = None, **headers: str
) -> Response:
    Context.of(request).problem = problem.slug
    body = _body(request, problem, detail, extra or {})
    return Response(orjson.dumps(body), body["status"], headers, MEDIA_TYPE)


def _body(request: Request, problem: Problem, detail: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    context = Context.of(request)
    status = context.dialect.status(problem.status)
    places = extra.get("errors") or [{}]
    fault = Fault(problem.slug, status, detail, places[0].get("where", ""))
    return {
        "type": f"/problems/{problem.slug}",
        "title": problem.title,
        "status": status,
        "detail": detail,
        "instance": request.url.path,
        "request_id": context.id,
        **context.dialect.fields(fault),
        **extra,
    }


def _more(error: Exception) -> dict[str, Any]:
    """What the document of this error has beside the fields of every problem."""
    more: dict[str, Any] = {}
    if known := getattr(error, "known", None):
        more["known"] = known[: http_errors.MAX_FINDINGS]
    if isinstance(error, http_errors.InvalidRequest) and error.errors:
        more["errors"] = error.errors
    return more


def document(request: Request, error: Exception) -> tuple[Problem, dict[str, Any]]:
    """The problem of a part of a request, such as one of its pictures, for an answer that is otherwise good."""
    problem = find(error)
    if problem is INTERNAL:
        _log(request, error)
        return problem, _body(request, problem, _unexpected(request), {})
    more = _more(error)
    if isinstance(error, Unavailable):
        more["retry_after"] = math.ceil(error.retry_after)
    return problem, _body(request, problem, str(error), more)


async def answer(request: Request, error: Exception, results: Mapping[str, Any] | None = None) -> Response:
    """Answer with the problem of ``error``; an error that was not raised on purpose is `internal`. ``results``: fields
    for a request with several problems, of which this one is the first and the others are logged."""
    problem = find(error)
    if problem is INTERNAL:
        if results is None:
            _log(request, error)
        return render(request, INTERNAL, _unexpected(request), results)
    headers: dict[str, str] = {}
    if isinstance(error, http_errors.Unauthorized | http_errors.Forbidden):
        headers["WWW-Authenticate"] = error.challenge
    if isinstance(error, http_errors.WrongCoding):
        headers["Accept-Encoding"] = error.accepted
    if isinstance(error, Overloaded):
        Context.of(request).shed = error.reason
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    return render(request, problem, str(error), _more(error) | dict(results or {}), **headers)


async def _starlette(request: Request, error: Exception) -> Response:
    """The router's 404 and 405."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        return render(request, METHOD, f"{path} does not take {request.method}", Allow=_verbs(request))
    if error.status_code == 404:
        return render(request, NOT_FOUND, f"there is no {path}; GET /openapi.json lists the routes")
    return await answer(request, error)


def _verbs(request: Request) -> str:
    """Methods of all routes with this path; the router's own `Allow` has those of the first route alone."""
    scopes = {verb: {**request.scope, "method": verb} for verb in VERBS}
    routes = request.app.routes
    return ", ".join(v for v, scope in scopes.items() if any(r.matches(scope)[0] is Match.FULL for r in routes))


async def _query(request: Request, error: Exception) -> Response:
    """Errors in path and query parameters, which FastAPI reads."""
    assert isinstance(error, RequestValidationError)
    return await answer(request, http_errors.invalid(error))


def _unexpected(request: Request) -> str:
    return f"the service failed; its log has the details under request {Context.of(request).id}"


def _log(request: Request, error: Exception) -> None:
    log.error("request %s failed", Context.of(request).id, exc_info=error)
