"""`Server`: uvicorn that leaves without dropping anybody. `Protocol`: one that does not wait for headers without end.

SIGTERM, the way out of a rollout: first `/readyz` says 503 and every answer ends its connection, while requests are
still served, for `CALMCLIP_GRACE_S`, so that load balancers look elsewhere; then new requests are turned away until
those under way are answered; only then the sockets close, so a probe for life is answered all along. Ctrl-C, or a
second signal, goes straight to the last step, which also finishes what is under way.
"""

import asyncio
import signal
import socket
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.context import Service

POLL_S = 0.02
HEAD_S = 10.0
HEAD_BYTES = 64 << 10  # of a request's line and headers: 256 labels fit into a query
TOO_LONG = f"the request's line and headers have more than {HEAD_BYTES} bytes"


class Protocol(HttpToolsProtocol):
    """A connection that is closed where a request's line and headers are not there within `HEAD_S`, however they drip,
    and answered 400 where they are longer than `HEAD_BYTES`.

    uvicorn's own clock runs between requests alone, and llhttp takes headers without end. From the headers on it is the
    request's deadline that counts.
    """

    _clock: asyncio.TimerHandle | None = None
    _head = 0  # bytes of a request whose headers have not ended
    _body = False  # what comes next belongs to one

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wind()

    def data_received(self, data: bytes) -> None:
        if not self._body:
            self._head += len(data)
        super().data_received(data)
        if not self._body and self._head > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(TOO_LONG)
        self._wind()

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            raise ValueError(TOO_LONG)  # httptools makes it a parser's error, and uvicorn that a 400
        self._body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._body, self._head = False, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wind()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _wind(self) -> None:
        """The clock runs while no request is under way; more bytes do not set it back."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._clock is None and not self.transport.is_closing():
            self._clock = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop(self) -> None:
        if self._clock:
            self._clock.cancel()
            self._clock = None


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
