"""`serve` and `index` from the command line: processes, sockets, signals, exit codes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.service.cli import _listen
from calmclip.service.indexing import _Service
from tests.asking import dial, metric, picture_head, raw, until
from tests.process import free_port, serving


@pytest.fixture
def pictures(tmp_path, picture):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name in ("red", "green", "blue"):
        (folder / f"{name}.png").write_bytes(picture(name))
    (folder / "more" / "gelb.JPG").write_bytes(picture("yellow", kind="JPEG"))
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder


@pytest.mark.parametrize(("number", "flags"), [(signal.SIGTERM, ["--json"]), (signal.SIGINT, ["--threads", "1"])])
def test_serve_until_a_signal(bundles, tmp_path, picture, number, flags):
    with serving(bundles, tmp_path / "data", *flags) as (process, client, file):
        send = raw(picture("red"), **{"x-request-id": "one"})
        assert client.post("/v1/classify?labels=red", **send).status_code == 200
        client.get("/no%0Apath")
        process.send_signal(number)
        status, log = process.wait(20), file.read_text()
    assert status == 0
    assert "Traceback" not in log
    if "--json" not in flags:  # test_logs.py has the other form
        lines = [line.split(" ", 3) for line in log.splitlines()]
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time) for time, *_ in lines)
        assert {(level, logger) for _, level, logger, _ in lines} >= {("INFO", "calmclip"), ("INFO", "calmclip.access")}
        (message,) = [message for *_, message in lines if "path" in message]
        assert re.fullmatch(r"GET '/no\\npath' 404 id=\w{16} ms=[\d.]+ task=other problem=not-found", message), message


def test_sigterm_finishes_pending_requests(bundles, tmp_path, picture, monkeypatch):
    """A pending request is answered even if its body arrives after new requests are refused; so are all probes."""
    monkeypatch.setenv("CALMCLIP_GRACE_S", "0.5")
    body = picture("red")
    with serving(bundles, tmp_path / "data") as (process, client, file):
        with dial(client, picture_head(len(body)) + body[:10]) as connection:
            until(lambda: metric(client, "calmclip_requests_pending") == 1)
            process.send_signal(signal.SIGTERM)
            until(lambda: client.get("/readyz").status_code == 503)
            assert client.get("/readyz").json()["failed"] == {"service": "it is shutting down"}
            answer = client.post("/v1/classify?labels=red", **raw(body))  # a new request in the grace period
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            until(lambda: client.post("/v1/classify?labels=red", **raw(body)).status_code == 503)
            shed = client.post("/v1/classify?labels=red", **raw(body))
            assert shed.headers["retry-after"] == "1"
            assert "shutting down" in shed.json()["detail"]
            assert client.get("/healthz").status_code == 200
            assert process.poll() is None
            connection.sendall(body[10:])
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        assert process.wait(10) == 0
    assert "Traceback" not in file.read_text()


def test_sigterm_under_load_drops_no_request(bundles, tmp_path, picture, monkeypatch):
    """Eight clients stop when an answer closes the connection, like a load balancer; no request fails."""
    monkeypatch.setenv("CALMCLIP_GRACE_S", "0.5")
    statuses: list[int] = []
    with serving(bundles, tmp_path / "data") as (process, client, _log):

        def ask() -> None:
            with httpx.Client(base_url=client.base_url, trust_env=False, timeout=20) as connection:
                closing = False
                while not closing:
                    answer = connection.post("/v1/classify?labels=red", **raw(picture("red")))
                    statuses.append(answer.status_code)
                    closing = answer.headers.get("connection") == "close"

        with ThreadPoolExecutor(8) as pool:
            asking = [pool.submit(ask) for _ in range(8)]
            until(lambda: len(statuses) > 100)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            for future in asking:
                future.result()
    assert set(statuses) == {200}


def test_headers_are_bounded_but_many_labels_fit(bundles, tmp_path, picture):
    with serving(bundles, tmp_path / "data") as (_, client, _log):
        labels = [f"{i:03} " + "x" * 190 for i in range(256)]
        assert client.post("/v1/classify", params={"labels": labels}, **raw(picture("red"))).status_code == 200
        with dial(client) as connection:
            with suppress(ConnectionError):  # the service may close while this client writes
                for chunk in (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ", *[b"x" * 65536] * 32):
                    connection.sendall(chunk)
            with suppress(ConnectionResetError):
                assert connection.recv(65536).startswith(b"HTTP/1.1 400")
                while connection.recv(65536):  # until the service closes; the endless header is at 2 MiB
                    pass


def test_index_through_a_service_and_again(bundles, tmp_path, pictures, picture, capsys):
    with serving(bundles, tmp_path / "data") as (_, client, _log):

        def index() -> dict:
            arguments = ["index", str(pictures), "--collection", "c", "--url", str(client.base_url), "--json"]
            assert main(arguments) == 0
            return json.loads(capsys.readouterr().out)

        first = index()
        assert (first["added"], first["skipped"], first["items"]) == (4, 0, 4)
        assert [entry["id"] for entry in first["broken"]] == ["broken.jpg"]
        assert "JPEG, PNG, WebP, GIF" in first["broken"][0]["why"]
        body = {"query": {"text": "yellow"}, "top_k": 1}
        (hit,) = client.post("/v1/collections/c/search", json=body).json()["hits"]
        assert hit["id"] == "more/gelb.JPG"
        assert hit["meta"]["file"] == "gelb.JPG"

        (pictures / "red.png").write_bytes(picture("white"))  # changed: sent again under the same id
        again = index()
        assert (again["added"], again["skipped"], again["items"]) == (1, 3, 4)


def test_a_service_that_dies_during_indexing_is_reported_and_written_items_stay(
    bundles, tmp_path, pictures, picture, capsys, monkeypatch
):
    for i in range(80):
        (pictures / f"{i:03}.png").write_bytes(picture("red"))
    plain, sent = _Service.add, []
    with serving(bundles, tmp_path / "data") as (process, client, _log):

        async def add(self, batch):
            await plain(self, batch)
            sent.append(len(batch))
            if len(sent) == 2:
                process.kill()
                process.wait()

        monkeypatch.setattr(_Service, "add", add)
        assert main(["index", str(pictures), "--collection", "c", "--url", str(client.base_url)]) == 2
        assert "does not answer" in capsys.readouterr().err
    with serving(bundles, tmp_path / "data") as (_, client, _log):
        assert client.get("/v1/collections/c").json()["items"] >= sum(sent[:2])


def test_index_without_a_service(bundles, tmp_path, pictures, capsys, monkeypatch):
    monkeypatch.setenv("CALMCLIP_DATA_DIR", str(tmp_path / "data"))
    arguments = ["index", str(pictures), "--collection", "c", "--bundles", str(bundles), "--threads", "1"]
    assert main(arguments) == 0
    assert "4 added, 0 already present, 1 broken; 4 items" in capsys.readouterr().out
    with serving(bundles, tmp_path / "data") as (_, client, _log):
        assert client.get("/v1/collections/c").json()["items"] == 4


def test_exit_codes(bundles, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CALMCLIP_DATA_DIR", str(tmp_path / "data"))

    def error(status: int, *arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == status
        return capsys.readouterr().err

    assert "export mini" in error(2, "serve", "--bundles", tmp_path / "none")
    assert "colours-int8" in error(2, "serve", "--bundles", bundles, "--load", "colors-int8")
    assert "not a folder" in error(2, "index", tmp_path / "none", "--collection", "c", "--bundles", bundles)
    for name in ("../x", "x?y", "x/../pwned", "x/..", ""):
        for target in (("--bundles", bundles), ("--url", "http://127.0.0.1:9")):
            assert f"{name!r} is not a name" in error(2, "index", tmp_path, "--collection", name, *target)
        assert f"{name!r} is not a name" in error(2, "collection", "create", name, "--bundles", bundles)
    assert not (tmp_path / "data").exists()
    assert "does not answer" in error(2, "index", tmp_path, "--collection", "c", "--url", "http://127.0.0.1:9")
    (tmp_path / "broken.png").write_bytes(b"x")
    error(1, "index", tmp_path, "--collection", "c", "--bundles", bundles)
    with pytest.raises(SystemExit) as usage:
        main(["index", str(tmp_path)])
    assert usage.value.code == 2


def test_a_taken_port_is_bad_usage(bundles, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "calmclip.models.cli", "serve", "--bundles", str(bundles)]
        command += ["--port", str(taken.getsockname()[1])]
        environment = {**os.environ, "CALMCLIP_DATA_DIR": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "choose another --port" in done.stderr


@pytest.mark.parametrize("verb", [["serve"], ["index", ".", "--collection", "c"]])
@pytest.mark.parametrize(
    ("name", "value"),
    [("OPS", "nonsense"), ("BATCH__MAX_SIZE", "x"), ("BATCH", "x"), ("LOG", "xml"),
     ("QUEUE__MAX_PENDING", "-1"), ("SLO__TARGET", "1.5"), ("LIMITS__TEXTS", "10001")],
)  # fmt: skip
def test_an_invalid_setting_is_bad_usage_and_named(tmp_path, monkeypatch, capsys, verb, name, value):
    monkeypatch.chdir(tmp_path)  # an empty folder: nothing to index, and no files are left in the repository
    monkeypatch.setattr("calmclip.service.cli._listen", lambda *_: pytest.fail("it listens"))
    monkeypatch.setenv(f"CALMCLIP_{name}", value)
    assert main(verb) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (f"CALMCLIP_{name} is '{value}'" if name != "BATCH" else '"batch"') in error


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_head(host):
    try:
        listener = _listen(host, 0)
    except BadRequest:
        pytest.skip(f"this machine has no {host}")
    with listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_metrics_at_their_own_port_and_both_on_the_loopback_address(bundles, tmp_path):
    port = free_port()
    with serving(bundles, tmp_path / "data", CALMCLIP_METRICS_PORT=str(port)) as (process, client, _):
        metrics_url = f"http://127.0.0.1:{port}"
        assert client.get("/metrics").status_code == 404
        assert "calmclip_requests_total" in client.get(f"{metrics_url}/metrics").text
        for each in (port, client.base_url.port):  # a socket on all addresses would accept at 127.0.0.2 too
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", each), timeout=5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_metrics_at_the_port_of_the_service_are_bad_usage(bundles, monkeypatch, capsys):
    monkeypatch.setenv("CALMCLIP_METRICS_PORT", "8123")
    assert main(["serve", "--bundles", str(bundles), "--port", "8123"]) == 2
    assert "CALMCLIP_METRICS_PORT" in capsys.readouterr().err
