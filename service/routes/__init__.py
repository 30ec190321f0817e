"""One file per task: parse, call the engine, shape the answer. Routes do not catch, count or time."""

from time import perf_counter

from fastapi.responses import Response

from service.context import Context
from service.schemas import Answer, encode


def respond(own: Context, answer: Answer, status: int = 200) -> Response:
    """Raises `DeadlineExceeded` where the answer comes too late."""
    if own.left_s < 0:
        raise own.late()
    own.answered = perf_counter()  # from here to the headers is `serialize`, which the middleware adds up
    return Response(encode(answer), status, media_type="application/json")
