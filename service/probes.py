"""`Probes`: /healthz and /readyz at a port of their own, from a thread of its own. CALMCLIP_PROBES_PORT turns it on.

At the main port a probe waits behind the requests that the event loop has accepted, so a busy service would look dead.
Here a probe waits for nothing that a request can hold. A service whose event loop stands still for `STALLED_S` is dead
all the same, and both paths say so.
"""

import asyncio
import socket
import threading
from collections.abc import Callable
from time import monotonic

from calmclip.service.parts import Service

BEAT_S = 0.5
STALLED_S = 10.0  # an overloaded loop is late by a second or two
HEAD_S = 2.0  # for a probe to send its head and to take the answer
HEAD_BYTES = 8 << 10


class Probes:
    """``now``: a clock in seconds."""

    def __init__(self, parts: Service, listener: socket.socket, now: Callable[[], float] = monotonic) -> None:
        self._parts = parts
        self._listener = listener
        self._now = now
        self._beat: float | None = None  # clock at the last turn of the service's event loop; None: it has not begun
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="probes", daemon=True)

    def start(self) -> None:
        """Answer from now on, until the process ends."""
        self._thread.start()

    async def beat(self) -> None:
        """A task of the service's event loop: it shows that the loop turns."""
        while True:
            self._beat = self._now()
            await asyncio.sleep(BEAT_S)

    def answer(self, path: str) -> tuple[int, str]:
        """-> status, and the body as JSON. The main port's /readyz also says what is not ready."""
        alive = self._beat is None or self._now() - self._beat < STALLED_S
        if path == "/healthz":
            return (200, '{"status":"ok"}') if alive else (503, '{"status":"stalled"}')
        if path == "/readyz":
            ready = alive and self._parts.ready
            return 200 if ready else 503, f'{{"ready":{str(ready).lower()}}}'
        return 404, '{"detail":"this port has /healthz and /readyz alone"}'

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._converse, sock=self._listener, limit=HEAD_BYTES)
        await server.serve_forever()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HEAD_S):
                method, target, *_ = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split(maxsplit=2)
                writer.write(self._respond(method, target))
                await writer.drain()
        except (TimeoutError, OSError, EOFError, ValueError, asyncio.LimitOverrunError):
            pass  # not a probe, or it has gone
        finally:
            writer.close()

    def _respond(self, method: str, target: str) -> bytes:
        status, body = self.answer(target.partition("?")[0]) if method in ("GET", "HEAD") else (405, "{}")
        head = (
            f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return (head + ("" if method == "HEAD" else body)).encode()
