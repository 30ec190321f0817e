"""The port of probes: it answers while the service's event loop does not, and says so if that lasts."""

import signal
import socket
import time
from types import SimpleNamespace

import httpx
import pytest

from calmclip.models.cli import main
from calmclip.service.probes import STALLED_S, Probes
from tests.process import free_port, serving


def test_a_service_that_is_ready_leaving_or_stalled():
    now = [100.0]
    parts = SimpleNamespace(ready=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        probes = Probes(parts, listener, lambda: now[0])
    assert probes.answer("/healthz")[0] == 200  # the bundles are being loaded
    assert probes.answer("/readyz") == (503, '{"ready":false}')
    parts.ready = True
    assert probes.answer("/readyz") == (200, '{"ready":true}')
    probes._beat = now[0]  # the loop turns
    now[0] += STALLED_S - 0.1  # it is late
    assert [probes.answer(path)[0] for path in ("/healthz", "/readyz")] == [200, 200]
    now[0] += 0.2  # it stands still
    assert [probes.answer(path)[0] for path in ("/healthz", "/readyz")] == [503, 503]
    assert probes.answer("/metrics")[0] == 404


def test_probes_are_answered_while_the_loop_is_stopped_and_through_the_shutdown(bundles, tmp_path):
    port = free_port()
    more = {"CALMCLIP_PROBES_PORT": str(port), "CALMCLIP_GRACE_S": "2"}
    with serving(bundles, tmp_path / "data", **more) as (process, client, _):

        def status(path: str) -> int:
            return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=2, trust_env=False).status_code

        with socket.create_connection(("127.0.0.1", port)) as silent:  # holds up no other probe
            assert [status(path) for path in ("/healthz", "/readyz", "/v1/models")] == [200, 200, 404]
            answer = httpx.head(f"http://127.0.0.1:{port}/readyz", trust_env=False)
            assert (answer.status_code, answer.content) == (200, b"")
            assert httpx.post(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 405
            assert silent.recv(1) == b""  # closed after two seconds
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        while status("/readyz") == 200:
            assert time.monotonic() - begin < 1
        assert status("/healthz") == 200
        assert client.get("/v1/models").status_code == 200  # still served
        assert process.wait(20) == 0


def test_the_port_of_probes_is_another_one(monkeypatch: pytest.MonkeyPatch, bundles, capsys):
    monkeypatch.setenv("CALMCLIP_PROBES_PORT", "8123")
    for port, metrics in (("8123", ""), ("8124", "8123")):
        monkeypatch.setenv("CALMCLIP_METRICS_PORT", metrics)
        assert main(["serve", "--bundles", str(bundles), "--port", port]) == 2
        assert "CALMCLIP_PROBES_PORT is 8123, which is also the port of" in capsys.readouterr().err
