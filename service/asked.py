"""`Asked`: what a handler of an endpoint is given; `serve`: an endpoint on the router, body read and answer sent."""

from collections.abc import Awaitable, Callable
from functools import partial
from inspect import Signature, signature
from time import perf_counter
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from calmclip.models.flow import Flow
from calmclip.service.endpoints import Endpoint
from calmclip.service.hub import Loaded
from calmclip.service.openapi import JSON, operation
from calmclip.service.parts import Service, service
from calmclip.service.request import Context, context
from calmclip.service.schemas import Answer, encode
from calmclip.service.settings import Limits
from calmclip.service.uploads import check_picture, read_body, read_bytes

B = TypeVar("B")
T = TypeVar("T")


class Asked(Generic[B]):
    """One request to an endpoint: its body, validated, and the parts of the app. ``B`` is None where it has no body."""

    __slots__ = ("body", "own", "parts", "request")

    def __init__(self, request: Request, body: B) -> None:
        self.request = request
        self.body = body
        self.own: Context = context(request)
        self.parts: Service = service(request)

    @property
    def limits(self) -> Limits:
        return self.parts.settings.limits

    def bundle(self, name: str | None, task: str = "") -> Loaded:
        """The loaded bundle of that name, or the first that serves ``task``, else the endpoint's own; noted for log and
        metrics. Raises `BundleNotFound`, `TaskNotServed`; `Overloaded` while bundles are still loading.
        """
        loaded = self.parts.hub.get(name, task or self.own.task)
        self.own.model = loaded.name
        return loaded

    def check(self, picture: bytes, where: str = "") -> None:
        """Its bytes and header, as `uploads.check_picture` does."""
        check_picture(picture, self.own, self.limits, where)

    async def run(self, loaded: Loaded, flow: Flow[T]) -> T:
        """What the flow returns. Raises what it raises, `DeadlineExceeded`."""
        return await self.parts.engine.answer(loaded, flow, self.own)

    def respond(self, answer: Answer, status: int = 200) -> Response:
        """For handlers that answer with more than one status. Raises `DeadlineExceeded` where it comes too late."""
        if self.own.left_s < 0:
            raise self.own.late()
        self.own.answered = perf_counter()  # from here to the headers is `serialize`, which the middleware adds up
        return Response(encode(answer), status, media_type=JSON)


class Straight(APIRoute):
    """Its endpoint takes the request and nothing else: the search for what else it may want takes time with each
    request, and there is nothing to find. What it says of itself in /openapi.json stays FastAPI's work.
    """

    def get_route_handler(self) -> Callable[[Request], Any]:
        endpoint: Callable[[Request], Awaitable[Response]] = self.endpoint
        return endpoint


def serve(app: FastAPI, endpoint: Endpoint) -> None:
    """On the app's router. A handler returns an answer or nothing, sent with the endpoint's status, or a response.

    What it takes behind the `Asked` FastAPI reads of path, query and headers.
    """
    handler = endpoint.handler
    assert handler, f"{endpoint.name} has no handler"
    given, *more = signature(handler, eval_str=True).parameters.values()

    async def ask(request: Request) -> Asked[Any]:
        if endpoint.body is None:
            return Asked(request, None)
        if endpoint.kinds:
            return Asked(request, await read_bytes(request, (JSON, *endpoint.kinds)))
        return Asked(request, await read_body(request, endpoint.body))

    async def send(asked: Asked[Any], **more: Any) -> Response:
        found = await handler(asked, **more)
        if isinstance(found, Response):
            return found
        return Response(status_code=endpoint.status) if found is None else asked.respond(found, endpoint.status)

    async def straight(request: Request) -> Response:
        return await send(await ask(request))

    asks = given.replace(name="asked", annotation=Annotated[Any, Depends(ask)])
    send.__signature__ = Signature([asks, *more])  # type: ignore[attr-defined]  # by which FastAPI calls it
    how: dict[str, Any] = {
        "name": handler.__name__,
        "response_model": None,
        "route_class_override": None if more else Straight,
    }
    add = partial(app.router.add_api_route, endpoint.path, send if more else straight, **how)
    add(methods=[endpoint.method], **operation(endpoint))
    if endpoint.head:
        add(methods=["HEAD"], include_in_schema=False)
