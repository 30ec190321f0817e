"""`Server`: uvicorn that leaves without dropping anybody. `Protocol`: one that waits for nobody without end.

SIGTERM, the way out of a rollout: first `/readyz` says 503 and every answer ends its connection, while requests are
still served, for `CALMCLIP_GRACE_S`, so that load balancers look elsewhere; then new requests are turned away until
those under way are answered; only then the sockets close, so a probe for life is answered all along. Ctrl-C, or a
second signal, goes straight to the last step, which also finishes what is under way.
"""

import asyncio
import fcntl
import signal
import socket
import sys
import termios
from contextlib import suppress
from math import inf
from types import FrameType

import uvicorn
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from calmclip.service.parts import Service

POLL_S = 0.02
HEAD_S = 10.0
HEAD_BYTES = 64 << 10  # of a request's line and headers: 256 labels fit into a query
TOO_LONG = f"the request's line and headers, or its trailers, have more than {HEAD_BYTES} bytes"
AHEAD = 64  # requests that may wait behind the one under way; each costs a hundred times the bytes it came in
TAKEN_S, TAKEN_BYTES = 10.0, 1 << 16  # how much of an answer must be taken in how long, while more than that waits


class Protocol(HttpToolsProtocol):
    """A connection that keeps nobody waiting.

    It is closed where a request's line and headers are not there within `HEAD_S`, however they drip, answered 400 where
    they are longer than `HEAD_BYTES` or more than `AHEAD` requests come ahead of their turn, and cut off where an
    answer is not taken. It is one of the app's `Connections`.

    uvicorn's own clock runs between requests alone, and llhttp takes headers and trailers without end. From the headers
    on it is the request's deadline that counts. Trailers are dropped: uvicorn takes them for headers, and what comes
    before us has not looked at them.
    """

    _clock: asyncio.TimerHandle | None = None
    _look: asyncio.TimerHandle | None = None
    _head = 0  # bytes of a request since it began, or since the last of its body
    _body = False  # what comes next belongs to one
    _at_work: RequestResponseCycle | None = None  # uvicorn's own `cycle` is the last that came in

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        parts: Service = self.config.app.state.service  # type: ignore[union-attr]
        self._all = parts.connections
        self._all.opened(self, self._let_go)
        self._wind()

    def data_received(self, data: bytes) -> None:
        self._head += len(data)
        super().data_received(data)
        if self._head > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(TOO_LONG)
        self._wind()

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            raise ValueError(TOO_LONG)  # httptools makes it a parser's error, and uvicorn that a 400
        if len(self.pipeline) >= AHEAD:
            raise ValueError(f"more than {AHEAD} requests wait for their turn")
        self._body = True
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._body:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._body, self._head = False, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wind()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._look = _stopped(self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._at_work and not self._at_work.response_complete:
            self._at_work.disconnected = True
            self._at_work.message_event.set()
        self._all.lost(self)
        self._clock, self._look = _stopped(self._clock), _stopped(self._look)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._at_work = cycle
        super()._start_asgi_task(cycle, app)

    def _wind(self) -> None:
        """The clock runs while no request is under way; more bytes do not set it back."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._clock = _stopped(self._clock)
            self._all.works(self)
        elif self._clock is None and self in self.connections:
            self._clock = self.loop.call_later(HEAD_S, self._let_go)
            if not self.transport.is_closing():
                self._all.waits(self, self._let_go)

    def _let_go(self) -> None:
        """Close it, once what was answered is taken."""
        self._all.works(self)
        self.transport.close()
        self._watch()

    def _watch(self, before: float = inf) -> None:
        """Whether enough is taken of what waits to be sent, ``before`` bytes when it was last looked at."""
        if before is inf and self._look:
            return
        left = _untaken(self.transport)
        if before - left < TAKEN_BYTES:
            self.transport.abort()
        else:
            self._look = self.loop.call_later(TAKEN_S, self._watch, left)


def _untaken(transport: asyncio.Transport) -> int:
    """Bytes of answers that lie here or in the kernel, which takes in megabytes, and more when a third is gone."""
    left = transport.get_write_buffer_size()
    with suppress(OSError, ValueError):  # another kind of socket; one that is closed
        in_kernel = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        left += int.from_bytes(in_kernel, sys.byteorder)
    return left


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, in its place."""
    if timer:
        timer.cancel()
    return None


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, parts: Service) -> None:
        super().__init__(config)
        self.parts = parts
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and self._loop and not self.parts.admission.leaving:
            self.parts.admission.leaving = True
            self._loop.call_soon_threadsafe(self._leave)
        else:
            super().handle_exit(sig, frame)

    def _leave(self) -> None:
        self._leaving = asyncio.get_running_loop().create_task(self._finish(), name="leave")

    async def _finish(self) -> None:
        admission, settings = self.parts.admission, self.parts.settings
        self.parts.hub.drain()
        await asyncio.sleep(settings.grace_s)
        admission.closed = True
        loop = asyncio.get_running_loop()
        latest = loop.time() + settings.deadline_ms / 1000
        while admission.pending and loop.time() < latest:
            await asyncio.sleep(POLL_S)
        self.should_exit = True
