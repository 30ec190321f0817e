"""`RequestContext`, plain ASGI around everything: request id, keys, Server-Timing, metrics, access log, hang-ups."""

import asyncio
import logging
import math
import re
import secrets
from time import perf_counter

import orjson
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calmclip.service.access import Access
from calmclip.service.admission import Admission
from calmclip.service.endpoints import LOOKING, Table
from calmclip.service.metrics import STAGES, Metrics
from calmclip.service.problems import CLIENT_GONE, InvalidHeader, answer
from calmclip.service.request import Context
from calmclip.service.settings import Settings
from calmclip.service.tracing import UNTRACED, Untraced

access = logging.getLogger("calmclip.access")

_MS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
DRAIN_BYTES = 1 << 20  # of a body nobody reads, so that an early answer is not lost to a reset
DRAIN_S = 0.5
UNFINISHED = (CLIENT_GONE, 504)  # says nothing about how fast work is done


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
        self.json = settings.log == "json"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        endpoint = self.endpoints.find(scope["method"], scope["path"])
        own = scope["calmclip.context"] = Context(
            _request_id(scope),
            self.deadline_s,
            self.tracing.clock(),
            task=endpoint.task,
        )
        announced = _announced(scope)
        wire = _Wire(own, receive, send, announced, scope, self.admission)
        try:
            own.key = self.access.check(scope, endpoint.scope)
            own.deadline_s = min(self.deadline_s, _deadline_s(scope))
            if scope["method"] not in LOOKING:
                own.place = self.admission.admit(own, announced)
                own.place.waits(announced != 0)
            await self.app(scope, wire.receive, wire.send)
        except asyncio.CancelledError:
            own.status = CLIENT_GONE
            task = asyncio.current_task()
            if not wire.gone or task is None:
                raise
            task.uncancel()
        except Exception as error:
            response = await answer(Request(scope), error)
            if own.status:  # the answer had begun; all that is left is to break it off
                raise
            await response(scope, wire.receive, wire.send)
        finally:
            wire.close()
            if own.place:
                own.place.leave(finished=own.status not in UNFINISHED)
            if endpoint.scope not in UNTRACED:
                own.trace = self.tracing.record(scope, own)
            self.metrics.observe(own)
            self._log(scope, own)

    def _log(self, scope: Scope, own: Context) -> None:
        ms = own.clock.elapsed * 1000
        if self.json:
            line = {
                "id": own.id,
                "trace_id": own.trace,
                "method": scope["method"],
                "path": scope["path"],
                "status": own.status,
                "ms": round(ms, 2),
                "task": own.task,
                "model": own.model,
                "problem": own.problem,
                "key": own.key,
                "stages_ms": {name: round(s * 1000, 2) for name, s in list(own.clock.stages.items())},
            }
            access.info(orjson.dumps(line).decode())
        else:
            # !r: a path may hold a decoded newline, and a log line is one line
            access.info(
                "%s %s %r %d %.1f ms %s %s %s %s",
                own.id,
                scope["method"],
                scope["path"],
                own.status,
                ms,
                own.model,
                own.problem,
                own.key,
                own.trace,
            )


class _Wire:
    """One request's receive and send. Once the body is read, a hang-up cancels the task that answers.

    ``announced``: bytes of the body, None where the headers do not say.
    """

    def __init__(
        self, own: Context, receive: Receive, send: Send, announced: int | None, scope: Scope, admission: Admission
    ) -> None:
        self.own = own
        self.admission = admission
        self.gone = False
        self._receive = receive
        self._send = send
        self._read = announced == 0
        self._asks = any(name == b"expect" for name, _ in scope["headers"])
        self._stays = not self._asks and _stays(scope, announced)
        self._lingers = False
        self._watch: asyncio.Task[None] | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body") and self._watch is None:
            self._read = True
            if self.own.place and not self.own.status:
                self.own.place.waits(False)
            self._watch = asyncio.create_task(self._until_gone(asyncio.current_task()))
        elif message["type"] == "http.disconnect":
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.own.status = message["status"]
            self.own.head_s = self.own.clock.elapsed
            if self.own.place:
                self.own.place.waits(True)
            if self.own.answered is not None:
                self.own.clock.add("serialize", perf_counter() - self.own.answered)
            seen = dict(self.own.clock.stages)
            timing = ", ".join(f"{stage};dur={seen[stage] * 1000:.2f}" for stage in STAGES if stage in seen)
            total = f"total;dur={self.own.clock.elapsed * 1000:.2f}"
            # What is left of a small body the server drops as it comes; with a large one the connection goes. So does
            # every connection when the service is leaving: the next request should find another. And one whose client
            # asks before it sends: what comes next may be the body, or the next request of one who took this for a no.
            unread = not self._read and (message["status"] >= 400 or self._asks)
            last = self.admission.leaving or (unread and not self._stays)
            self._lingers = unread and last
            message["headers"] = [
                *message["headers"],
                *([(b"connection", b"close")] if last else []),
                (b"x-request-id", self.own.id.encode()),
                (b"server-timing", f"{timing}, {total}".lstrip(", ").encode()),
            ]
        elif self._lingers and not message.get("more_body"):
            await self._send({**message, "more_body": True})  # the client has all of the answer now
            await self._drain()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    def close(self) -> None:
        if self._watch:
            self._watch.cancel()

    async def _until_gone(self, answering: "asyncio.Task[object] | None") -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if answering and not self.own.status:
            self.gone = True
            answering.cancel()

    async def _drain(self) -> None:
        """Read on for a moment: a client still writing would see a reset instead of the answer."""
        left = DRAIN_BYTES
        try:
            async with asyncio.timeout(DRAIN_S):
                while left > 0:
                    message = await self.receive()
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return
                    left -= len(message.get("body", b""))
        except TimeoutError:
            pass


def _request_id(scope: Scope) -> str:
    """The caller's `X-Request-Id` where it is a plain one, else a new one."""
    for name, value in scope["headers"]:
        given = str(value, "latin-1")
        if name == b"x-request-id" and _ID.fullmatch(given):
            return given
    return secrets.token_hex(8)


def _stays(scope: Scope, announced: int | None) -> bool:
    """Whether the connection may go on behind a body that nobody read."""
    asked = b",".join(value for name, value in scope["headers"] if name == b"connection").lower()
    return (
        announced is not None and announced <= DRAIN_BYTES and scope["http_version"] != "1.0" and b"close" not in asked
    )


def _announced(scope: Scope) -> int | None:
    """Bytes of the body, as the headers have it; None where they do not say."""
    found = dict(scope["headers"])
    if b"transfer-encoding" in found:
        return None
    given = found.get(b"content-length", b"0")
    return int(given) if given.isdigit() else None


def _deadline_s(scope: Scope) -> float:
    """What `X-Request-Deadline-Ms` asks for, infinity without it. Raises `InvalidHeader`."""
    given = [str(value, "latin-1").strip() for name, value in scope["headers"] if name == b"x-request-deadline-ms"]
    if not given:
        return math.inf
    if len(given) > 1 or not _MS.fullmatch(given[0]) or not float(given[0]):
        raise InvalidHeader(
            f"X-Request-Deadline-Ms is {', '.join(given)[:40]!r}; expected one number of milliseconds over 0, "
            "such as 250; leave it out for the longest that the service allows"
        )
    return float(given[0]) / 1000
