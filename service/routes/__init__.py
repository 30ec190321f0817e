"""One file per task: parse, call the engine, shape the answer. Routes do not catch, count or time."""

from collections.abc import AsyncIterator
from time import perf_counter

from fastapi import Request
from fastapi.responses import Response

from service.context import Context, context, service
from service.schemas import Answer, encode


async def admitted(request: Request) -> AsyncIterator[None]:
    """A dependency: a place among the requests under way, taken before the body is read."""
    own = context(request)
    announced = request.headers.get("content-length", "")
    async with service(request).admission.admit(own, int(announced) if announced.isdigit() else 0) as own.place:
        yield


def respond(own: Context, answer: Answer, status: int = 200) -> Response:
    """Raises `DeadlineExceeded` where the answer comes too late."""
    if own.left_s < 0:
        raise own.late()
    own.answered = perf_counter()  # from here to the headers is `serialize`, which the middleware adds up
    return Response(encode(answer), status, media_type="application/json")
