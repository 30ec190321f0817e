"""FAMILY endpoints, a module per task; here is what tasks share. Handlers catch no errors and measure no time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi.responses import Response

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Flow
from calmclip.models.preprocess.truncation import Truncation
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENDPOINTS, Endpoint
from calmclip.service.many import Many, results
from calmclip.service.schemas import Answer

__all__ = ["ENDPOINTS", "check_characters", "check_count", "task_route"]


class NamesModel(Protocol):
    @property
    def model(self) -> str | None: ...


B = TypeVar("B", bound=NamesModel)
R = TypeVar("R")
A = TypeVar("A")
ToRequest = Callable[[Asked[B], Bundle], R]


def task_route(
    endpoint: Endpoint,
    flow: Callable[[Bundle, R], Flow[A]],
    to_answer: Callable[[B, Bundle, A], Answer],
    count: Callable[[Asked[B], A], None] = lambda asked, result: None,
    many: Many[R] | None = None,
) -> Callable[[ToRequest[B, R]], ToRequest[B, R]]:
    """Register an endpoint that runs one task on the bundle that the body names.

    The decorated function makes the task's request from the body, and raises what is wrong with it. ``flow`` is the
    task's. ``to_answer`` makes the response from the body, the bundle and the task's result. ``count`` adds the result
    to the metrics. ``many``: how a request with many pictures, or for lines, becomes requests for each; the endpoint
    says `many` too.
    """

    def register(to_request: ToRequest[B, R]) -> ToRequest[B, R]:
        async def handler(asked: Asked[B]) -> Answer | Response:
            loaded = asked.bundle(asked.body.model)

            def finish(result: A) -> Answer:
                count(asked, result)
                return to_answer(asked.body, loaded.bundle, result)

            request = to_request(asked, loaded.bundle)
            run = partial(flow, loaded.bundle)
            if many and (asked.streams or many.asked(asked.body)):
                return await results(asked, loaded, many, request, run, finish)
            if many:
                many.check(asked)
            return finish(await asked.run(loaded, run(request)))

        handler.__name__, handler.__module__ = to_request.__name__, to_request.__module__
        endpoint(handler)
        return to_request

    return register


def check_count(asked: Asked[Any], count: int, kind: str) -> None:
    """Raises `BadRequest` for more items than one request may have."""
    if count > (limit := asked.limits.texts):
        raise BadRequest(f"{count} {kind} were given; at most {limit} are read at once")


def check_characters(
    asked: Asked[Any], bundle: Bundle, inputs: Sequence[object], truncation: Truncation | None = None
) -> None:
    """Raises `BadRequest` if the texts among ``inputs`` that are read as a whole have too many characters: tokens are
    counted before a deadline can end the request. ``truncation``: None for the bundle's.
    """
    texts = [value for value in inputs if isinstance(value, str)]
    how = truncation or (bundle.text().truncation if texts else Truncation())
    if how.whole and (count := sum(map(len, texts))) > (limit := asked.limits.long_characters):
        raise BadRequest(
            f"the texts have {count} characters; with {how.method} at most {limit} are read at once. Send fewer texts"
        )
