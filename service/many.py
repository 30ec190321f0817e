"""Many pictures in one request: each has its own answer or its own problem, in one JSON answer or a line for each.

`results` runs the flows of all pictures beside each other, so that the batcher merges their calls; what the pictures
share runs once, before them. A picture is decoded when its flow begins. Time grows with the number of pictures, memory
with the bytes of the body and with the largest `Engine.at_once` pictures.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from heapq import nlargest
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest, InputError
from calmclip.models.flow import Flow
from calmclip.service import problems
from calmclip.service.asked import Asked
from calmclip.service.hub import Loaded
from calmclip.service.openapi import LINES
from calmclip.service.request import Context, unbounded
from calmclip.service.schemas import PicturesBody, encode
from calmclip.service.uploads import check_picture

B = TypeVar("B")
R = TypeVar("R")
Outcome: TypeAlias = Any  # the result of a task's flow, or the exception in its place


def _unchanged(bundle: Bundle, request: R) -> Flow[R]:
    return request
    yield  # a flow without a step


class Part(NamedTuple):
    """The fields of a task's request that differ for one picture or input; and the picture, if it is one."""

    fields: Mapping[str, Any]
    picture: bytes | None


@dataclass(frozen=True)
class Many(Generic[R]):
    """How a request with many pictures becomes requests for each.

    ``asked``: whether a body has many. ``split``: its parts, or what is wrong with a part; raises `BadRequest` for too
    many. ``check``: the pictures of a body that has not many. ``shared``: a flow that runs once, before all of them;
    the rows that it embeds are kept for them.
    """

    asked: Callable[[Any], bool]
    split: Callable[[Asked[Any]], Sequence[Part | InputError]]
    check: Callable[[Asked[Any]], None]
    shared: Callable[[Bundle, R], Flow[R]] = _unchanged


def many_pictures(shared: Callable[[Bundle, R], Flow[R]] = _unchanged) -> Many[R]:
    """For a `PicturesBody`, and a task whose request has the field ``image``."""
    return Many(lambda body: body.images is not None, _pictures, lambda asked: asked.check(asked.body.image), shared)


def _pictures(asked: Asked[PicturesBody]) -> list[Part | InputError]:
    given = asked.body.pictures
    if len(given) > (limit := asked.limits.pictures):
        raise BadRequest(f"{len(given)} pictures were given; at most {limit} are read at once")
    return [each if isinstance(each, InputError) else Part({"image": each}, each) for each in given]


async def results(
    asked: Asked[Any],
    loaded: Loaded,
    many: Many[R],
    request: R,
    run: Callable[[R], Flow[Any]],
    finish: Callable[[Any], Any],
) -> Response:
    """The answer of a request with many pictures. ``run``: the task's flow; ``finish``: its result -> the answer.

    Raises `BadRequest` for too many, `Overloaded` for too many pixels, and what the shared flow raises.
    """
    context, engine = asked.context, asked.parts.engine
    parts = [_checked(part, asked) for part in many.split(asked)]
    good = {index: part for index, part in enumerate(parts) if not isinstance(part, InputError)}
    context.reserve_pixels(sum(nlargest(engine.at_once, (pixels for _, pixels in good.values()))))
    context.weigh(len(parts))
    context.kept = {}
    sink = (_Lines if asked.streams else _Document)(asked, loaded.name, finish, len(good))

    async def work() -> None:
        for index, part in enumerate(parts):
            if isinstance(part, InputError):
                await sink.give(index, part, context)
        if good:
            numbers = [*good]
            flows = [run(replace(common, **fields)) for fields, _ in good.values()]  # type: ignore[type-var]
            await engine.each(loaded, flows, context, lambda at, *more: sink.give(numbers[at], *more))

    with loaded.lease():
        common = await engine.answer(loaded, many.shared(loaded.bundle, request), context) if good else request
        return await sink.answer(work)


def _checked(part: Part | InputError, asked: Asked[Any]) -> tuple[Mapping[str, Any], int] | InputError:
    """What differs, and the pixels of the picture; or what is wrong with it. Its pixels are not yet reserved, because
    only some pictures are in memory at once."""
    if isinstance(part, InputError):
        return part
    if part.picture is None:
        return part.fields, 0
    context = replace(asked.context, reserve_pixels=unbounded)
    try:
        check_picture(part.picture, context, asked.limits)
    except InputError as error:
        return error
    return part.fields, context.pictures[-1][1]


class _Sink:
    """Takes the outcome of each part. ``running``: the number of parts that run."""

    def __init__(self, asked: Asked[Any], model: str, finish: Callable[[Any], Any], running: int) -> None:
        self.asked = asked
        self.context = asked.context
        self.model = model
        self.finish = finish
        self.running = running
        self.failed: dict[int, tuple[Exception, dict[str, Any]]] = {}  # index -> error, result

    def result(self, index: int, outcome: Outcome) -> dict[str, Any]:
        """One of the `results`."""
        if not isinstance(outcome, Exception):
            try:
                return {"index": index, "answer": self.finish(outcome)}
            except Exception as error:  # a fault in one answer must not spoil the others
                outcome = error
        problem, document = problems.document(self.asked.request, outcome)
        self.context.faults.append(problem.slug)
        result = {"index": index, "problem": document}
        self.failed[index] = outcome, result
        return result

    async def problem(self) -> Response:
        """The answer if no part has one: the problem of the first, with all results."""
        rows = [result for _, (_, result) in sorted(self.failed.items())]
        error, _ = self.failed[min(self.failed)]
        return await problems.answer(self.asked.request, error, {"model": self.model, "results": rows})


class _Document(_Sink):
    """All results in one JSON answer, in the order of the request."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.results: dict[int, dict[str, Any]] = {}

    async def give(self, index: int, outcome: Outcome, part: Context) -> None:
        self.results[index] = self.result(index, outcome)

    async def answer(self, work: Callable[[], Awaitable[None]]) -> Response:
        await work()
        if len(self.failed) == len(self.results):
            return await self.problem()
        rows = [result for _, result in sorted(self.results.items())]
        return self.asked.respond({"model": self.model, "results": rows}, late=True)


class _Lines(_Sink):
    """A line for each result as soon as it is there. While lines wait for a slow client, no further part begins.

    The head has the status of the whole answer. So it comes with the first part that is answered; the problems before
    wait for it.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._turn = asyncio.Lock()
        self._held: list[bytes] = []
        self._begun = False
        self._waiting = 0
        self._send: Send

    async def give(self, index: int, outcome: Outcome, part: Context) -> None:
        with part.clock.stage("serialize"):
            result = self.result(index, outcome)
            line = encode(result) + b"\n"
        with self._waits():
            async with self._turn:
                if not self._begun:
                    if "problem" in result:
                        self._held.append(line)
                        return
                    self.context.streams, self.context.head_part = True, part
                    kind = [(b"content-type", LINES.encode())]
                    await self._send({"type": "http.response.start", "status": 200, "headers": kind})
                    self._begun = True
                body = b"".join([*self._held, line])
                await self._send({"type": "http.response.body", "body": body, "more_body": True})
                self._held.clear()
        if part is not self.context:
            self.running -= 1

    @contextmanager
    def _waits(self) -> Iterator[None]:
        """If all parts that have begun wait here, the request waits for its client."""
        self._waiting += 1
        self.context.wait(self._waiting >= min(self.running, self.asked.parts.engine.at_once))
        try:
            yield
        finally:
            self._waiting -= 1
            self.context.wait(False)

    async def answer(self, work: Callable[[], Awaitable[None]]) -> Response:
        return _Streaming(self._run, work)

    async def _run(self, work: Callable[[], Awaitable[None]], scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        await work()
        if self._begun:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await (await self.problem())(scope, receive, send)


class _Streaming(Response):
    """A response whose work is done while it is sent."""

    def __init__(self, run: Callable[..., Awaitable[None]], work: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self._run, self._work = run, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._run(self._work, scope, receive, send)
