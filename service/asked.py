"""`Asked`: the argument of an endpoint's handler; `serve`: an endpoint on the router, body read and answer sent."""

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import Parameter, Signature, signature
from time import perf_counter
from typing import Annotated, Any, Generic, TypeAlias, TypeVar, get_args, get_origin

from fastapi import Depends, FastAPI, Request
from fastapi.params import Param, ParamTypes, Query
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.convertors import StringConvertor, register_url_convertor

from calmclip.models.flow import Flow
from calmclip.service.endpoints import REST, Endpoint
from calmclip.service.hub import Loaded
from calmclip.service.openapi import ANY_QUERY, JSON, LINES, PNG, operation
from calmclip.service.parts import Service
from calmclip.service.request import Context
from calmclip.service.schemas import Answer, encode
from calmclip.service.settings import Limits
from calmclip.service.uploads import check_picture, check_query, read_body, read_bytes

_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")
B = TypeVar("B")
T = TypeVar("T")
Content: TypeAlias = Answer | Mapping[str, Any] | list[Any] | bytes


class Asked(Generic[B]):
    """One request to an endpoint: its validated body and the parts of the app. ``B`` is None if it has no body."""

    __slots__ = ("body", "context", "parts", "request")

    def __init__(self, request: Request, body: B) -> None:
        self.request = request
        self.body = body
        self.context: Context = Context.of(request)
        self.parts: Service = Service.of(request)

    @property
    def limits(self) -> Limits:
        return self.parts.settings.limits

    @property
    def streams(self) -> bool:
        """Whether the client asks for a line for each result, as soon as it is there: its `Accept` has `LINES`, and no
        other content type with a higher quality."""
        quality = _qualities(self.request.headers.get("accept", ""))
        return 0 < quality.get(LINES, 0) >= max(quality.values())

    def bundle(self, name: str | None, task: str = "") -> Loaded:
        """The loaded bundle of that name, or the first that serves ``task`` (default: the endpoint's). Log and metrics
        name it. Raises `BundleNotFound`, `TaskNotServed`; `Overloaded` while bundles are loading.
        """
        loaded = self.parts.hub.get(name, task or self.context.task)
        self.context.model = loaded.name
        return loaded

    def check(self, picture: bytes, where: str = "", *, whole: bool = False) -> None:
        """Check a picture's size and header, as `uploads.check_picture`."""
        check_picture(picture, self.context, self.limits, where, whole=whole)

    async def run(self, loaded: Loaded, flow: Flow[T]) -> T:
        """The result of ``flow``. Raises what it raises, `DeadlineExceeded`."""
        return await self.parts.engine.answer(loaded, flow, self.context)

    def respond(self, answer: Content, status: int = 200, kind: str = PNG, *, late: bool = False) -> Response:
        """For handlers that answer with more than one status, or not with an `Answer`. ``answer``: JSON, or the bytes
        of a file, whose content type is ``kind``. ``late``: also after the deadline, because a part of it was in time.

        Raises `DeadlineExceeded` after the deadline.
        """
        if self.context.left_s < 0 and not late:
            raise self.context.late()
        self.context.answered = perf_counter()  # from here to the headers is the stage `serialize`
        if isinstance(answer, bytes):
            return Response(answer, status, media_type=kind)
        return Response(encode(answer), status, media_type=JSON)


def _qualities(accept: str) -> dict[str, float]:
    """Content type -> its quality in an `Accept` header, 0 for a broken one (RFC 9110, section 12.5.1)."""
    qualities = {}
    for entry in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in entry.split(";"))
        quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        qualities[kind] = float(quality) if _QUALITY.fullmatch(quality) else 0.0
    return qualities


class DirectRoute(APIRoute):
    """A route whose endpoint takes the request alone. FastAPI would search for further parameters on each request.

    FastAPI still describes the route in /openapi.json.
    """

    def get_route_handler(self) -> Callable[[Request], Any]:
        endpoint: Callable[[Request], Awaitable[Response]] = self.endpoint
        return endpoint


class Rest(StringConvertor):
    """The last parameter of an endpoint with `rest`."""

    regex = REST

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("rest", Rest())


def serve(app: FastAPI, endpoint: Endpoint) -> None:
    """Add an endpoint to the app's router. Its handler returns an answer, a PNG file as bytes, None or a response.

    FastAPI reads the handler's further parameters from path, query and headers.
    """
    handler = endpoint.handler
    assert handler, f"{endpoint.name} has no handler"
    first, *more = signature(handler, eval_str=True).parameters.values()
    query = {name for name, _ in _query(endpoint, more)}
    repeated = {name for name, parameter in _query(endpoint, more) if _is_list(parameter)}
    checks_query = endpoint.scope not in ANY_QUERY and not (endpoint.body and endpoint.body.raw)

    async def ask(request: Request) -> Asked[Any]:
        if checks_query:
            check_query(request, query, repeated)
        if endpoint.kinds:
            return Asked(request, await read_bytes(request, (*([JSON] if endpoint.body else []), *endpoint.kinds)))
        if endpoint.body is None:
            return Asked(request, None)
        return Asked(request, await read_body(request, endpoint.body))

    async def send(asked: Asked[Any], **more: Any) -> Response:
        answer = await handler(asked, **more)
        if isinstance(answer, Response):
            return answer
        return Response(status_code=endpoint.status) if answer is None else asked.respond(answer, endpoint.status)

    async def direct(request: Request) -> Response:
        return await send(await ask(request))

    parameter = first.replace(name="asked", annotation=Annotated[Any, Depends(ask)])
    send.__signature__ = Signature([parameter, *more])  # type: ignore[attr-defined]  # FastAPI reads it
    options: dict[str, Any] = {
        "name": handler.__name__,
        "response_model": None,
        "route_class_override": None if more else DirectRoute,
    }
    add = partial(app.router.add_api_route, endpoint.route, send if more else direct, **options)
    add(methods=[endpoint.method], **operation(endpoint))
    if endpoint.head:
        add(methods=["HEAD"], include_in_schema=False)


def _query(endpoint: Endpoint, parameters: Sequence[Parameter]) -> Iterator[tuple[str, Parameter]]:
    """Those parameters that FastAPI reads from the query, with their names there."""
    for parameter in parameters:
        (kind,) = [m for m in getattr(parameter.annotation, "__metadata__", ()) if isinstance(m, Param)] or [Query()]
        if f"{{{parameter.name}}}" not in endpoint.path and kind.in_ is ParamTypes.query:
            yield kind.alias or parameter.name, parameter


def _is_list(parameter: Parameter) -> bool:
    """Whether the query may repeat it: a tuple in `Annotated`."""
    kinds = get_args(parameter.annotation)
    return bool(kinds) and get_origin(kinds[0]) is tuple
