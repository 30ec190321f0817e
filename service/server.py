"""`Server`: uvicorn with a graceful shutdown and a bounded drain. `Protocol`: a connection with time and size limits.

SIGTERM starts three steps. For `CALMCLIP_GRACE_S` requests are served, but `/readyz` answers 503 and every answer ends
its connection, so that load balancers go elsewhere. Then new requests get 503 until those in flight are answered. Then
the sockets close; until then liveness probes are answered. Ctrl-C, or a second signal, starts the last step at once,
which also finishes the requests in flight.
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
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from calmclip.service.parts import Service
from calmclip.service.probes import Probes

POLL_S = 0.02
HEAD_S = 10.0
HEAD_BYTES = 64 << 10  # of request line and headers; 256 labels fit into a query
TOO_LONG = f"the request's line and headers, or its trailers, have more than {HEAD_BYTES} bytes"
AHEAD = 64  # pipelined requests behind the current one; each costs a hundred times its bytes on the wire
TAKEN_S, TAKEN_BYTES = 10.0, 1 << 16  # a client must take so many bytes of an answer in so many seconds


class Protocol(HttpToolsProtocol):
    """A connection with limits; one of the app's `Connections`.

    It closes if request line and headers do not arrive within `HEAD_S`. It answers 400 if they have more than
    `HEAD_BYTES`, or if more than `AHEAD` requests are pipelined. It aborts if the client does not take an answer.

    uvicorn's own timeout runs only between requests, and llhttp bounds neither headers nor trailers. After the headers
    the request's deadline applies. Trailers are dropped: uvicorn treats them as headers, and no proxy has checked them.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _taken_timer: asyncio.TimerHandle | None = None
    _head = 0  # bytes since the request began, or since the last bytes of its body
    _body = False  # whether the parser is between headers and the message's end
    _running: RequestResponseCycle | None = None  # uvicorn's own `cycle` is the last that arrived

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        parts: Service = self.config.app.state.service  # type: ignore[union-attr]
        self._connections = parts.connections
        self._connections.opened(self, self._close)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        self._head += len(data)
        super().data_received(data)
        if self._head > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(TOO_LONG)
        self._update_timer()

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            raise ValueError(TOO_LONG)  # httptools makes this a parser error, which uvicorn answers with 400
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
        self._update_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._check_taken()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._taken_timer = _cancel(self._taken_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._running and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self._connections.lost(self)
        self._head_timer, self._taken_timer = _cancel(self._head_timer), _cancel(self._taken_timer)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _update_timer(self) -> None:
        """The head's timer runs while no request is in flight; more bytes do not restart it."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._head_timer = _cancel(self._head_timer)
            self._connections.busy(self)
        elif self._head_timer is None and self in self.connections:
            self._head_timer = self.loop.call_later(HEAD_S, self._close)
            if not self.transport.is_closing():
                self._connections.waiting(self, self._close)

    def _close(self) -> None:
        """Close the connection once the client has taken the answers."""
        self._connections.busy(self)
        self.transport.close()
        self._check_taken()

    def _check_taken(self, before: float = inf) -> None:
        """Abort unless the client took enough since the last check, when ``before`` bytes were left to send."""
        if before is inf and self._taken_timer:
            return
        unsent = _unsent(self.transport)
        if before - unsent < TAKEN_BYTES:
            self.transport.abort()
        else:
            self._taken_timer = self.loop.call_later(TAKEN_S, self._check_taken, unsent)


def _unsent(transport: asyncio.Transport) -> int:
    """Bytes of answers in asyncio's buffer and in the kernel's, which holds megabytes and refills by a third."""
    count = transport.get_write_buffer_size()
    with suppress(OSError, ValueError):  # not a TCP socket, or a closed one
        in_kernel = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        count += int.from_bytes(in_kernel, sys.byteorder)
    return count


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """-> None, which takes the timer's place."""
    if timer:
        timer.cancel()
    return None


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, parts: Service, probes: Probes | None = None) -> None:
        super().__init__(config)
        self.parts = parts
        self.probes = probes
        self._beating: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finishing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if self.probes:
            self._beating = self._loop.create_task(self.probes.beat(), name="beat")
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and self._loop and not self.parts.admission.leaving:
            self.parts.admission.leaving = True
            self._loop.call_soon_threadsafe(self._leave)
        else:
            super().handle_exit(sig, frame)

    def _leave(self) -> None:
        self._finishing = asyncio.get_running_loop().create_task(self._finish(), name="finish")

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
