"""One file per task: parse, call the engine, shape the answer. Routes do not catch, count or time."""

from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import Response

from service.context import Context, service
from service.schemas import Answer, encode


async def admitted(request: Request) -> AsyncIterator[None]:
    """A dependency: a place among the requests under way, taken before the body is read."""
    async with service(request).engine.admit():
        yield


def respond(own: Context, answer: Answer, status: int = 200) -> Response:
    with own.clock.stage("serialize"):
        return Response(encode(answer), status, media_type="application/json")
