"""One file per task: parse, call the engine, shape the answer. Routes do not catch, count or time."""

from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from calmclip.service.context import Context
from calmclip.service.schemas import Answer, encode


def respond(own: Context, answer: Answer, status: int = 200) -> Response:
    """Raises `DeadlineExceeded` where the answer comes too late."""
    if own.left_s < 0:
        raise own.late()
    own.answered = perf_counter()  # from here to the headers is `serialize`, which the middleware adds up
    return Response(encode(answer), status, media_type="application/json")


class Straight(APIRoute):
    """Its endpoint takes the request and nothing else: the search for what else it may want takes time with each
    request, and there is nothing to find. What it says of itself in /openapi.json stays FastAPI's work.
    """

    def get_route_handler(self) -> Callable[[Request], Any]:
        endpoint: Callable[[Request], Awaitable[Response]] = self.endpoint
        return endpoint
