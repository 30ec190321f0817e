"""Exception -> RFC 9457 problem, in one table. Routes do not catch; they let it rise.

`/problems/{slug}` explains each one; service/README.md lists them; a test compares.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from calmclip.models import errors
from calmclip.models.errors import CalmclipError, Overloaded, Unavailable
from calmclip.service.access import Forbidden, Unauthorized
from calmclip.service.fetching import NotFetched
from calmclip.service.request import context

log = logging.getLogger("calmclip")
MEDIA_TYPE = "application/problem+json"
MOST = 100  # findings and names in an answer; characters of a place
VERBS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
CLIENT_GONE = 499  # never seen by anybody: the client hung up


class BodyTooLarge(errors.InputError):
    """More bytes than a request may have."""


class WrongContentType(errors.InputError):
    """A body in none of the shapes the route reads."""


class InvalidHeader(errors.InputError):
    """A header of ours with a value that makes no sense."""


class InvalidRequest(errors.InputError):
    """A body that does not fit the schema; ``errors`` says where."""

    def __init__(self, message: str, errors: Sequence[Mapping[str, str]] = ()) -> None:
        super().__init__(message)
        self.errors = list(errors)


class Problem(NamedTuple):
    slug: str
    status: int
    title: str
    explanation: str


INTERNAL = Problem(
    "internal", 500, "Internal error", "A fault of the service. The log has the details under the request id."
)
NOT_FOUND = Problem("not-found", 404, "Not found", "No route has this path. GET /openapi.json lists the routes.")
METHOD = Problem("method-not-allowed", 405, "Method not allowed", "The path exists; the `Allow` header says its verbs.")

_INVALID = Problem(
    "invalid-request",
    422,
    "Invalid request",
    "The body does not fit the schema, or its values make no sense together. `errors` lists where, if it can.",
)

# The most special class wins: a class is looked up along its bases.
TABLE: dict[type[BaseException], Problem] = {
    errors.InputError: _INVALID,
    errors.BadImage: Problem(
        "unsupported-image", 415, "Unsupported image", "The bytes are no whole JPEG, PNG or WebP file."
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
    NotFetched: Problem(
        "picture-not-fetched",
        422,
        "Picture not fetched",
        "The address of a picture is not one that is asked, or it gave none. CALMCLIP_URL_HOSTS names the hosts.",
    ),
    BodyTooLarge: Problem(
        "body-too-large",
        413,
        "Body too large",
        "The request has more bytes than CALMCLIP_LIMITS__BODY_BYTES, or than its route reads.",
    ),
    WrongContentType: Problem(
        "unsupported-media-type",
        415,
        "Unsupported media type",
        "Send application/json, multipart/form-data or, where one picture is all, image/jpeg, image/png, image/webp.",
    ),
    InvalidHeader: Problem(
        "invalid-header", 400, "Invalid header", "A header has a value that makes no sense; `detail` says which."
    ),
    Unauthorized: Problem(
        "unauthorized", 401, "Unauthorized", "The service has keys, and the request brought none that it knows."
    ),
    Forbidden: Problem(
        "forbidden",
        403,
        "Forbidden",
        "The key is known, but not for this; `detail` says what it needs to be for.",
    ),
    errors.BundleNotFound: Problem("model-not-found", 404, "Model not found", "No bundle of that name is loaded."),
    errors.UnknownName: NOT_FOUND,
    errors.CollectionNotFound: Problem(
        "collection-not-found", 404, "Collection not found", "PUT /v1/collections/{name} makes one."
    ),
    errors.ClassifierNotFound: Problem(
        "classifier-not-found", 404, "Classifier not found", "PUT /v1/classifiers/{name} registers one."
    ),
    errors.ClassifierMismatch: Problem(
        "classifier-bundle-mismatch",
        409,
        "Wrong bundle for this classifier",
        "It was fitted to vectors of other bundles. Ask with a bundle of its family, or fit it anew.",
    ),
    errors.TaskNotServed: Problem(
        "task-not-served",
        409,
        "Task not served",
        "The bundle exists, but it does not do this. GET /v1/models says what it does.",
    ),
    errors.CollectionMismatch: Problem(
        "collection-bundle-mismatch",
        409,
        "Wrong bundle for this collection",
        "Vectors of different bundles cannot be compared. Ask with the bundle that filled it, or fill a new one.",
    ),
    errors.Overloaded: Problem(
        "overloaded",
        503,
        "Overloaded",
        "Too much is under way, or the service is loading or leaving. `Retry-After` says when to try again.",
    ),
    errors.StoreUnavailable: Problem(
        "store-unavailable",
        503,
        "Store unavailable",
        "The database of the collections does not answer; all else does. `Retry-After` says when to try again.",
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
    own = context(request)
    own.problem = problem.slug
    body = {
        "type": f"/problems/{problem.slug}",
        "title": problem.title,
        "status": problem.status,
        "detail": detail,
        "instance": request.url.path,
        "request_id": own.id,
        **(
            {"error": detail} if request.url.path.startswith("/v2/") else {}
        ),  # the Open Inference Protocol's one member
        **(extra or {}),
    }
    return Response(orjson.dumps(body), problem.status, headers, MEDIA_TYPE)


def invalid(error: ValidationError | RequestValidationError, what: str) -> InvalidRequest:
    """Pydantic's findings as ours, the first `MOST`, without the values that were sent."""
    plain = {"include_url": False, "include_input": False, "include_context": False}
    all_ = error.errors(**plain) if isinstance(error, ValidationError) else error.errors()
    found = [
        {
            "where": ".".join(map(str, one["loc"]))[:MOST] or "body",  # a place may be a key of the caller's
            "message": one["msg"].removeprefix("Value error, "),
        }
        for one in all_[:MOST]
    ]
    more = f" (and {len(all_) - 1} more)" if len(all_) > 1 else ""
    return InvalidRequest(f"{what}: {found[0]['where']}: {found[0]['message']}{more}", found)


async def answer(request: Request, error: Exception) -> Response:
    """The problem that ``error`` is; one that we did not raise on purpose is `internal`."""
    problem = find(error)
    if problem is INTERNAL:
        return await unexpected(request, error)
    extra: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if known := getattr(error, "known", None):
        extra["known"] = known[:MOST]
    if isinstance(error, InvalidRequest) and error.errors:
        extra["errors"] = error.errors
    if isinstance(error, Unauthorized | Forbidden):
        headers["WWW-Authenticate"] = error.challenge
    if isinstance(error, Overloaded):
        context(request).shed = error.reason
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    return render(request, problem, str(error), extra, **headers)


async def _starlette(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        return render(request, METHOD, f"{path} does not take {request.method}", Allow=_verbs(request))
    if error.status_code == 404:
        return render(request, NOT_FOUND, f"there is no {path}; GET /openapi.json lists the routes")
    return await unexpected(request, error)


def _verbs(request: Request) -> str:
    """Of all routes with this path; the router's own `Allow` knows the first one's only."""
    asked = {verb: {**request.scope, "method": verb} for verb in VERBS}
    routes = request.app.routes
    return ", ".join(v for v, scope in asked.items() if any(r.matches(scope)[0] is Match.FULL for r in routes))


async def _query(request: Request, error: Exception) -> Response:
    """Path and query parameters that FastAPI itself reads."""
    assert isinstance(error, RequestValidationError)
    return await answer(request, invalid(error, "the request does not fit"))


async def unexpected(request: Request, error: Exception) -> Response:
    """For what no handler knows; the middleware calls it. The details go to the log."""
    own = context(request)
    log.error("request %s failed", own.id, exc_info=error)
    return render(request, INTERNAL, f"the service failed; its log has the details under request {own.id}")
