"""Many clients at once, over bare connections: libraries of HTTP clients take as long as the service."""

import asyncio
import time
from dataclasses import dataclass, field


@dataclass
class Flood:
    """What came back. ``answers``: (status, content type, Retry-After, body) -> how often, except for successes."""

    seconds: float = 0.0
    succeeded: int = 0
    broken: int = 0  # connections that ended without an answer
    answers: dict[tuple[int, str, str, bytes], int] = field(default_factory=dict)

    @property
    def asked(self) -> int:
        return self.succeeded + self.broken + sum(self.answers.values())


def flood(port: int, request: bytes, clients: int, seconds: float, pause_s: float = 0.0) -> Flood:
    """``clients`` connections ask for ``seconds``; each waits for its answer, and begins at most every ``pause_s``."""
    result = Flood()
    start = time.monotonic()
    asyncio.run(_all(port, request, clients, start + seconds, pause_s, result))
    result.seconds = time.monotonic() - start
    return result


async def _all(port: int, request: bytes, clients: int, end: float, pause_s: float, result: Flood) -> None:
    offsets = [pause_s * at / clients for at in range(clients)]
    await asyncio.gather(*(_client(port, request, offset, end, pause_s, result) for offset in offsets))


async def _client(port: int, request: bytes, offset: float, end: float, pause_s: float, result: Flood) -> None:
    await asyncio.sleep(offset)
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None
    while (begin := time.monotonic()) < end:
        try:
            if reader is None or writer is None or reader.at_eof():  # the service closes idle connections
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:] if line)
            body = await reader.readexactly(int(headers["content-length"]))
        except (OSError, EOFError):
            result.broken += 1
            writer = None
        else:
            status = int(lines[0].split()[1])
            if status == 200:
                result.succeeded += 1
            else:
                key = status, headers.get("content-type", ""), headers.get("retry-after", ""), body
                result.answers[key] = result.answers.get(key, 0) + 1
            if headers.get("connection") == "close":
                writer.close()
                writer = None
        await asyncio.sleep(max(0.0, pause_s - (time.monotonic() - begin)))
    if writer:
        writer.close()
