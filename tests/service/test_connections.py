"""Many, idle and slow connections: none of them keeps the service from serving others."""

import asyncio
import socket
import time
from contextlib import ExitStack, suppress

import pytest
import uvicorn
from uvicorn.server import ServerState

from calmclip.service import server
from calmclip.service.app import create_app
from calmclip.service.connections import Connections
from calmclip.service.engine import Engine
from tests.asking import dial, metric, picture_head, until

PROBE = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
ITEMS, META = 200, 16_000  # a page of 3 MB


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.settimeout(10)


def test_the_connection_with_the_longest_idle_time_is_closed_and_no_busy_connection():
    closed, crowded = [], []
    connections = Connections(2, lambda: crowded.append(1))

    def arrive(name: str) -> None:
        connections.opened(name, lambda: (closed.append(name), connections.lost(name)))

    arrive("a")
    arrive("b")
    connections.busy("a")
    connections.waiting("a", lambda: closed.append("a"))  # it was answered, and is idle for a shorter time than b
    arrive("c")
    assert closed == ["b"]
    connections.busy("a")
    connections.busy("c")
    arrive("d")  # no other connection is idle
    assert closed == ["b", "d"]
    connections.lost("a")
    arrive("e")
    assert (closed, len(crowded), connections.open) == (["b", "d"], 2, 2)


def test_many_idle_connections_keep_no_client_out(settings, serve):
    with serve(settings(connections=5)) as client, ExitStack() as stack:
        mine = 1  # connection of the client
        idle = []
        for count in range(20):
            idle.append(stack.enter_context(dial(client)))
            until(lambda: metric(client, "calmclip_connections_crowded_total") == max(0, count + 1 + mine - 5))  # noqa: B023
            assert metric(client, "calmclip_connections ") <= 5
        assert [is_open(connection) for connection in idle] == [False] * 16 + [True] * 4
        assert metric(client, "calmclip_connections_limit") == 5
        for connection in idle[-4:]:
            connection.sendall(PROBE)
            assert b" 200 " in connection.recv(4096)


def test_a_pending_request_keeps_its_connection(settings, serve, picture):
    body = picture("red")
    with serve(settings(connections=3)) as client, ExitStack() as stack:
        working = stack.enter_context(dial(client, picture_head(len(body)) + body[:20]))
        until(lambda: metric(client, "calmclip_requests_pending") == 1)
        for _ in range(10):
            stack.enter_context(dial(client))
        until(lambda: metric(client, "calmclip_connections_crowded_total") >= 9)
        working.sendall(body[20:])
        assert b" 200 OK" in working.recv(65536)


@pytest.mark.parametrize("slow", [b"", PROBE[:-2] + b"X-Slow: " + b"x" * 100])
@pytest.mark.parametrize("first", [b"", PROBE])
def test_silent_connections_and_slow_heads_are_closed(client, monkeypatch, first, slow):
    """On a new connection, and after a first answer."""
    monkeypatch.setattr(server, "HEAD_S", 0.3)
    start, received = time.monotonic(), b""
    with dial(client, first) as connection, suppress(ConnectionError):
        if first:
            received = connection.recv(4096)
        for byte in slow:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
        while more := connection.recv(4096):
            received += more
    assert (b" 200 " in received) == bool(first)
    assert 0.2 < time.monotonic() - start < 2.5


def test_the_limit_of_a_head_does_not_hold_for_a_body(client, picture, monkeypatch):
    monkeypatch.setattr(server, "HEAD_S", 0.2)
    body = picture("red")
    with dial(client, picture_head(len(body)) + body[:10]) as connection:
        time.sleep(0.5)  # a body has the request's deadline
        connection.sendall(body[10:])
        assert b" 200 OK" in connection.recv(65536)


@pytest.mark.parametrize(
    ("target", "more", "status"),
    [("POST /v1/classify?labels=red", "X-Request-Deadline-Ms: 400\r\n", b" 504 "), ("POST /nothing", "", b" 404 "),
     ("POST /v1/classifiers", "", b" 405 "), ("GET /healthz", "", b" 200 ")],
)  # fmt: skip
@pytest.mark.parametrize("drip", [b"x", b""])
def test_a_slow_or_missing_body_is_cut_off(client, monkeypatch, target, more, status, drip):
    """At the request's deadline, or at once if the endpoint reads no body."""
    monkeypatch.setattr(server, "HEAD_S", 0.4)
    start, received = time.monotonic(), b""
    with dial(client, picture_head(1000, target, more)) as connection:
        connection.settimeout(0.05)
        with suppress(ConnectionError):
            while time.monotonic() - start < 8:
                connection.sendall(drip)
                with suppress(TimeoutError):
                    chunk = connection.recv(4096)
                    received += chunk
                    if not chunk:
                        break
    assert status in received
    assert time.monotonic() - start < 4


@pytest.fixture(scope="module")
def page(client):
    """A request with an answer that is larger than the kernel's buffers."""
    client.put("/v1/collections/big", json={})
    for start in range(0, ITEMS, 100):
        items = [{"id": f"{i:03}", "text": "red", "meta": {"x": "y" * META}} for i in range(start, start + 100)]
        assert client.post("/v1/collections/big/items", json={"items": items}).status_code == 200
    return f"GET /v1/collections/big/items?limit={ITEMS} HTTP/1.1\r\nHost: x\r\n".encode()


@pytest.mark.parametrize("ends", [b"Connection: close\r\n\r\n", b"\r\n"])
@pytest.mark.parametrize("times", [1, 8])
def test_a_client_that_does_not_read_the_answer_is_cut_off(client, page, monkeypatch, ends, times):
    """Also if it sends more requests meanwhile: the next answer waits for room in the buffer."""
    monkeypatch.setattr(server, "TAKEN_S", 0.3)
    monkeypatch.setattr(server, "HEAD_S", 0.3)
    before = metric(client, "calmclip_connections ")
    with dial(client, (page + ends) * times, receive=4096):
        until(lambda: metric(client, "calmclip_connections ") == before + 1)
        until(lambda: metric(client, "calmclip_connections ") == before)
        assert metric(client, "calmclip_requests_pending") == 0


def test_a_slow_reader_gets_the_whole_answer(client, page, monkeypatch):
    monkeypatch.setattr(server, "TAKEN_S", 0.2)
    monkeypatch.setattr(server, "HEAD_S", 0.2)
    received, start = 0, time.monotonic()
    with dial(client, page + b"Connection: close\r\n\r\n", receive=4096) as connection:
        while more := connection.recv(1 << 16):
            received += len(more)
            time.sleep(len(more) / 2e6)
    assert received > ITEMS * META
    assert time.monotonic() - start > 1


class Stuck(asyncio.Transport):
    """A connection to a client that reads none of the last 100 bytes."""

    closing = aborted = False

    def get_extra_info(self, name, default=None):
        return socket.socket() if name == "socket" else default

    def get_write_buffer_size(self):
        return 100

    def is_closing(self):
        return self.closing

    def close(self):
        self.closing = True

    def abort(self):
        self.aborted = True


def test_waiting_for_the_last_bytes_has_a_limit(settings, monkeypatch):
    monkeypatch.setattr(server, "TAKEN_S", 0.05)
    monkeypatch.setattr(server, "HEAD_S", 0.05)

    async def scenario():
        config = uvicorn.Config(create_app(settings()), http=server.Protocol)
        protocol = server.Protocol(config, ServerState(), {}, asyncio.get_running_loop())
        transport = Stuck()
        protocol.connection_made(transport)
        await asyncio.sleep(0.5)
        return transport.closing, transport.aborted

    assert asyncio.run(scenario()) == (True, True)


CHUNKED = (
    b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
)


def test_trailers_are_no_headers(client):
    with dial(client, CHUNKED + b"X-Request-Id: from-a-trailer\r\n\r\n") as connection:
        answer = connection.recv(65536)
    assert b" 422 " in answer
    assert b"from-a-trailer" not in answer


def test_trailers_have_a_limit(client, monkeypatch):
    """They are not stored, but a single trailer could be endless."""
    monkeypatch.setattr(server, "HEAD_BYTES", 10_000)
    with dial(client, CHUNKED) as connection, suppress(ConnectionError):
        for _ in range(100):
            connection.sendall(b"a: b\r\n" * 1000)
            time.sleep(0.01)
        pytest.fail("600 kB of trailers were read")


def test_pipelined_requests_have_a_limit(client, monkeypatch):
    monkeypatch.setattr(server, "AHEAD", 5)
    with dial(client, 6 * PROBE) as connection:
        until(lambda: connection.recv(65536, socket.MSG_PEEK).count(b" 200 OK") == 6)
        connection.recv(65536)
        connection.sendall(7 * PROBE)
        assert b" 400 " in connection.recv(65536)


def test_a_disconnect_is_noticed_behind_a_pipelined_request(client, picture, monkeypatch):
    """The first of two pipelined requests is cancelled, and is not counted as an error of the service."""

    def ended() -> list[str]:
        lines = client.get("/metrics").text.splitlines()
        return [line for line in lines if line.startswith("calmclip_requests_total{") and 'task="classify"' in line]

    async def slow(self, loaded, flow, borrowed):
        await asyncio.sleep(5)

    monkeypatch.setattr(Engine, "answer", slow)
    body = picture("red")
    with dial(client, picture_head(len(body)) + body + PROBE):
        until(lambda: metric(client, "calmclip_requests_pending ") == 1)
    until(lambda: any('"cancelled"' in line for line in ended()), 2)
    assert not any('"error"' in line for line in ended())
