"""`RequestContext`: plain ASGI around the app. Request id, keys, admission, Server-Timing, metrics, access log."""

import asyncio
import logging
import math
import re
import secrets
from time import perf_counter

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calmclip.service.access import Access
from calmclip.service.admission import Admission, Reservation
from calmclip.service.endpoints import READING, Table
from calmclip.service.errors import InvalidHeader
from calmclip.service.metrics import STAGES, Metrics
from calmclip.service.problems import CLIENT_GONE, answer
from calmclip.service.request import Context, Operation
from calmclip.service.settings import Settings
from calmclip.service.tracing import UNTRACED, Untraced

access = logging.getLogger("calmclip.access")

_MS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
DRAIN_BYTES = 1 << 20  # of an unread body, so that a connection reset does not lose an early answer
DRAIN_S = 0.5
UNFINISHED = (CLIENT_GONE, 504)  # given up, so not counted as finished work


class RequestContext:
    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        admission: Admission,
        access: Access,
        endpoints: Table,
        tracing: Untraced,
    ) -> None:
        self.app = app
        self.access = access
        self.endpoints = endpoints
        self.metrics = metrics
        self.tracing = tracing
        self.admission = admission
        self.deadline_s = settings.deadline_ms / 1000

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        endpoint = self.endpoints.find(scope["method"], scope["path"])
        context = scope["calmclip.context"] = Context(
            _request_id(scope),
            self.deadline_s,
            self.tracing.clock(),
            task=endpoint.task,
            dialect=endpoint.dialect,
            operation=Operation(endpoint.operation) if endpoint.operation else None,
        )
        announced = _announced(scope)
        wire = _Wire(context, receive, send, announced, scope, self.admission)
        try:
            context.key = self.access.check(scope, endpoint.scope)
            context.deadline_s = min(self.deadline_s, _deadline_s(scope))
            if scope["method"] not in READING:
                reservation = self.admission.admit(context.task, context.left_s, announced)
                reservation.set_waits(announced != 0)
                wire.reservation = reservation
                context.reserve_bytes, context.reserve_pixels = reservation.reserve_bytes, reservation.reserve_pixels
                context.weigh, context.wait = reservation.weigh, reservation.set_waits
            await self.app(scope, wire.receive, wire.send)
        except asyncio.CancelledError:
            context.status = CLIENT_GONE
            task = asyncio.current_task()
            if not wire.gone or task is None:
                raise
            task.uncancel()
        except Exception as error:
            response = await answer(Request(scope), error)
            if context.status:  # the answer has begun, so it can only be broken off
                raise
            await response(scope, wire.receive, wire.send)
        finally:
            wire.close()
            if endpoint.scope not in UNTRACED:
                context.trace = self.tracing.record(scope, context)
            self.metrics.observe(context)
            self._log(scope, context)

    def _log(self, scope: Scope, context: Context) -> None:
        level = logging.ERROR if context.status == 500 else logging.WARNING if context.status > 500 else logging.INFO
        fields = {
            "id": context.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": context.status,
            "ms": round(context.clock.elapsed * 1000, 2),
            "task": context.task,
            "model": context.model,
            "problem": context.problem,
            "key": context.key,
            "trace_id": context.trace,
            "stages_ms": {name: round(s * 1000, 2) for name, s in list(context.clock.stages.items())},
        }
        # !r: a path may hold a decoded newline, and a log line is one line
        access.log(level, "%s %r %d", scope["method"], scope["path"], context.status, extra={"fields": fields})


class _Wire:
    """One request's receive and send. Once the body is read, a disconnect cancels the task that answers, also in the
    middle of a stream.

    ``announced``: bytes of the body, None if the headers do not say.
    """

    def __init__(
        self, context: Context, receive: Receive, send: Send, announced: int | None, scope: Scope, admission: Admission
    ) -> None:
        self.context = context
        self.admission = admission
        self.reservation: Reservation | None = None
        self.gone = False
        self._receive = receive
        self._send = send
        self._read = announced == 0
        self._expects = any(name == b"expect" for name, _ in scope["headers"])
        self._can_stay = not self._expects and _can_stay(scope, announced)
        self._lingers = False
        self._watch: asyncio.Task[None] | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body") and self._watch is None:
            self._read = True
            if self.reservation and not self.context.status:
                self.reservation.set_waits(False)
            self._watch = asyncio.create_task(self._until_gone(asyncio.current_task()))
        elif message["type"] == "http.disconnect":
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.context.status = message["status"]
            self.context.head_s = self.context.clock.elapsed
            if self.reservation and not self.context.streams:
                self.reservation.set_waits(True)
            if self.context.answered is not None:
                self.context.clock.add("serialize", perf_counter() - self.context.answered)
            seconds = self.context.stages()
            timing = ", ".join(f"{stage};dur={seconds[stage] * 1000:.2f}" for stage in STAGES if stage in seconds)
            total = f"total;dur={self.context.clock.elapsed * 1000:.2f}"
            # The server drops the rest of a small unread body. The connection ends instead if that body is large, if
            # the service shuts down (the next request should go elsewhere), or if the client sent `Expect`: what it
            # sends next may be the body, or the next request if it took this answer for a refusal.
            unread = not self._read and (message["status"] >= 400 or self._expects)
            last = self.admission.leaving or (unread and not self._can_stay)
            self._lingers = unread and last
            message["headers"] = [
                *message["headers"],
                *([(b"connection", b"close")] if last else []),
                (b"x-request-id", self.context.id.encode()),
                (b"server-timing", f"{timing}, {total}".lstrip(", ").encode()),
            ]
        elif self.context.streams and not message.get("more_body"):
            self.context.streams = False  # the server reports a disconnect after an answer's end
        elif self._lingers and not message.get("more_body"):
            await self._send({**message, "more_body": True})  # the client now has the whole answer
            await self._drain()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    def close(self) -> None:
        if self._watch:
            self._watch.cancel()
        if self.reservation:
            self.reservation.release(finished=self.context.status not in UNFINISHED)

    async def _until_gone(self, answering: "asyncio.Task[object] | None") -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if answering and (self.context.streams or not self.context.status):
            self.gone = True
            answering.cancel()

    async def _drain(self) -> None:
        """Read on for a moment: a client that still writes would see a reset instead of the answer."""
        budget = DRAIN_BYTES
        try:
            async with asyncio.timeout(DRAIN_S):
                while budget > 0:
                    message = await self.receive()
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return
                    budget -= len(message.get("body", b""))
        except TimeoutError:
            pass


def _request_id(scope: Scope) -> str:
    """The client's `X-Request-Id` if it is well-formed, else a new id."""
    for name, value in scope["headers"]:
        request_id = str(value, "latin-1")
        if name == b"x-request-id" and _ID.fullmatch(request_id):
            return request_id
    return secrets.token_hex(8)


def _can_stay(scope: Scope, announced: int | None) -> bool:
    """Whether the connection may go on after an unread body."""
    options = b",".join(value for name, value in scope["headers"] if name == b"connection").lower()
    small = announced is not None and announced <= DRAIN_BYTES
    return small and scope["http_version"] != "1.0" and b"close" not in options


def _announced(scope: Scope) -> int | None:
    """Bytes of the body, from the headers; None if they do not say."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    return int(length) if length.isdigit() and b"transfer-encoding" not in headers else None


def _deadline_s(scope: Scope) -> float:
    """Seconds of `X-Request-Deadline-Ms`, infinity without it. Raises `InvalidHeader`."""
    values = [str(value, "latin-1").strip() for name, value in scope["headers"] if name == b"x-request-deadline-ms"]
    if not values:
        return math.inf
    if len(values) > 1 or not _MS.fullmatch(values[0]) or not float(values[0]):
        raise InvalidHeader(
            f"X-Request-Deadline-Ms is {', '.join(values)[:40]!r}; expected one number of milliseconds over 0, "
            "such as 250; leave it out for the longest deadline that the service allows"
        )
    return float(values[0]) / 1000
