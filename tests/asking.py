"""Requests that tests send to the service, over httpx or a bare socket, and the metrics that they read."""

import base64
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx


def b64(data: bytes) -> dict[str, str]:
    """A picture in JSON."""
    return {"b64": base64.b64encode(data).decode()}


def raw(data: bytes, kind: str = "image/png", **headers: str) -> dict[str, Any]:
    """Arguments of httpx for a request whose body is a picture."""
    return {"content": data, "headers": {"content-type": kind, **headers}}


def picture_head(length: int, target: str = "POST /v1/classify?labels=red", more: str = "") -> bytes:
    """The head of a request with a PNG of ``length`` bytes. ``more``: header lines, each with its line end."""
    return f"{target} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def dial(client: httpx.Client, data: bytes = b"", receive: int = 0) -> socket.socket:
    """A new connection to the client's server. ``receive``: the size of the socket's receive buffer in bytes."""
    connection = socket.socket()
    if receive:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(10)
    connection.connect((client.base_url.host, client.base_url.port))
    connection.sendall(data)
    return connection


def metric(client: httpx.Client, line: str) -> float:
    """The value of the first series whose line starts with ``line``; 0 if there is no such series yet."""
    lines = [entry for entry in client.get("/metrics").text.splitlines() if entry.startswith(line)]
    return float(lines[0].split()[-1]) if lines else 0.0


def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
