"""What tests send to the service, over httpx or a bare socket, and what they read of its metrics."""

import base64
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx


def b64(data: bytes) -> dict[str, str]:
    """A picture inside of JSON."""
    return {"b64": base64.b64encode(data).decode()}


def raw(data: bytes, kind: str = "image/png", **headers: str) -> dict[str, Any]:
    """A picture as the whole body: arguments of httpx."""
    return {"content": data, "headers": {"content-type": kind, **headers}}


def picture_head(length: int, asked: str = "POST /v1/classify?labels=red", more: str = "") -> bytes:
    """Of a request with a PNG of so many bytes; ``more``: header lines, each with its end."""
    return f"{asked} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def dial(client: httpx.Client, data: bytes = b"", receive: int = 0) -> socket.socket:
    """A connection of its own to the client's server. ``receive``: bytes that the kernel takes before they are read."""
    connection = socket.socket()
    if receive:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(10)
    connection.connect((client.base_url.host, client.base_url.port))
    connection.sendall(data)
    return connection


def metric(client: httpx.Client, line: str) -> float:
    """Of the first series that is written so, at its beginning; 0 where there is none yet."""
    found = [entry for entry in client.get("/metrics").text.splitlines() if entry.startswith(line)]
    return float(found[0].split()[-1]) if found else 0.0


def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
