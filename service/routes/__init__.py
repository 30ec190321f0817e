"""One file per task: parse, call the engine, shape the answer. Routes do not catch, count or time."""

from collections.abc import AsyncIterator
from time import perf_counter

from fastapi import Request
from fastapi.responses import Response

from service.context import Context, service
from service.schemas import Answer, encode


async def admitted(request: Request) -> AsyncIterator[None]:
    """A dependency: a place among the requests under way, taken before the body is read."""
    async with service(request).engine.admit():
        yield


def respond(own: Context, answer: Answer, status: int = 200) -> Response:
    own.answered = perf_counter()  # from here to the headers is `serialize`, which the middleware adds up
    return Response(encode(answer), status, media_type="application/json")
