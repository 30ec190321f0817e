"""HAProxy's configuration agrees with docker-compose.yml and the service, and balances two servers."""

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from calmclip import service
from calmclip.service.app import create_app
from calmclip.service.settings import Settings
from tests.process import free_port, installed
from tests.test_compose import COMPOSE, SERVICES, STAGES, aliases, mounts, published, settings_of

FILE = Path(service.__file__).parent / "deploy" / "balancer.cfg"
TEXT = FILE.read_text()
UNITS = {"ms": 0.001, "s": 1.0}


def seconds(pattern: str) -> float:
    number, unit = re.search(pattern + r" (\d+)(ms|s)\b", TEXT, re.MULTILINE).groups()
    return int(number) * UNITS[unit]


def count(pattern: str) -> int:
    return int(re.search(pattern + r" (\d+)\b", TEXT, re.MULTILINE)[1])


SLOTS, NAME, PORT = re.search(r"server-template \w+ (\d+) (\w+):(\d+)", TEXT).groups()


def test_file_port_host_and_probe_agree_with_compose() -> None:
    (mounted,) = mounts("balancer").values()
    assert (Path(__file__).parents[2] / mounted).samefile(FILE)
    ((_, _, port),) = published("balancer")
    assert re.findall(r"^ +bind :(\d+)$", TEXT, re.MULTILINE) == [port]
    assert NAME in aliases("replica")
    assert STAGES["service"].all("EXPOSE") == [PORT]
    uri = re.search(r"http-check send meth GET uri (\S+)", TEXT)[1]
    assert uri in create_app(Settings()).openapi()["paths"]
    assert uri in SERVICES["balancer"]["healthcheck"]["test"][-1]


def test_slots_and_database_connections_suffice_for_all_replicas() -> None:
    assert SERVICES["replica"]["deploy"]["replicas"] <= int(SLOTS)
    pool = re.search(r"max_size=(\d+)", (FILE.parents[1] / "stores" / "pgvector.py").read_text())[1]
    (most,) = (re.search(r"max_connections=(\d+)", word) for word in SERVICES["postgres"]["command"] if "=" in word)
    assert int(most[1]) > int(SLOTS) * int(pool)
    assert f"{SLOTS} at most" in (Path(__file__).parents[2] / "docker-compose.yml").read_text()


def test_its_timeouts_exceed_the_deadline_and_it_notices_a_leaving_replica_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of("replica", monkeypatch)
    assert seconds("timeout server") > settings.deadline_ms / 1000
    assert seconds("timeout client") > settings.deadline_ms / 1000
    noticed = (
        seconds(r"check inter") + (count("fall") - 1) * seconds("fastinter") + count("fall") * seconds("timeout check")
    )
    assert settings.grace_s > noticed


def test_its_resolver_is_that_of_the_default_network() -> None:
    assert "networks" not in COMPOSE, "Docker's DNS server 127.0.0.11 resolves the containers of the default network"
    assert re.findall(r"nameserver \w+ (\S+)", TEXT) == ["127.0.0.11:53"]


class Replica(ThreadingHTTPServer):
    """Counts its requests in `asked`. `dies`: it closes the connection instead of an answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.ready, self.dies, self.asked = True, False, 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    server: Replica

    def do_GET(self) -> None:
        if self.path == "/readyz":
            self._answer(200 if self.server.ready else 503)
        else:
            self.do_POST()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", "0")))
        self.server.asked += 1
        if not self.server.dies:
            self._answer(200)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def haproxy() -> str:
    return installed("haproxy", "the file was only read")


def test_haproxy_accepts_the_file() -> None:
    done = subprocess.run([haproxy(), "-c", "-f", FILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@contextmanager
def balanced(folder: Path, *replicas: Replica) -> Iterator[httpx.Client]:
    """A client of HAProxy with the repository's file, except for the addresses."""
    address = f"127.0.0.1:{free_port()}"
    line, options = re.search(r"(?m)^ +server-template \S+ \S+ \S+ (.+?) resolvers .+$", TEXT).group(0, 1)
    servers = [f"    server r{i} 127.0.0.1:{replica.server_port} {options}" for i, replica in enumerate(replicas)]
    text = TEXT.replace(line, "\n".join(servers)).replace("bind :8080", f"bind {address}")
    (folder / "balancer.cfg").write_text(text)
    command = [haproxy(), "-db", "-f", str(folder / "balancer.cfg")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=20) as client:
            for _ in range(100):
                assert process.poll() is None
                with suppress(httpx.TransportError):
                    if client.get("/readyz").status_code == 200:
                        break
                time.sleep(0.05)
            yield client
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def two() -> Iterator[tuple[Replica, Replica]]:
    with closing(Replica()) as first, closing(Replica()) as second:
        yield first, second


def test_requests_go_to_all_ready_replicas_and_to_no_other(two: tuple[Replica, Replica], tmp_path: Path) -> None:
    first, second = two
    with balanced(tmp_path, first, second) as client:
        for _ in range(20):
            assert client.post("/", content=b"x").status_code == 200
        assert min(first.asked, second.asked) > 5
        first.ready = False
        time.sleep(2)  # noticed after 1.25 s at most; until then it answers its requests
        before = first.asked
        assert {client.post("/", content=b"x").status_code for _ in range(20)} == {200}
        assert first.asked == before
        first.ready = True
        time.sleep(2)
        for _ in range(20):
            client.post("/", content=b"x")
        assert first.asked > before


def test_a_replica_that_is_gone_fails_no_request(two: tuple[Replica, Replica], tmp_path: Path) -> None:
    first, second = two
    with balanced(tmp_path, first, second) as client:
        first.close()  # without notice to the balancer
        answers = []
        for _ in range(20):
            answers.append(httpx.post(f"{client.base_url}/", content=b"x", trust_env=False).status_code)
        assert set(answers) == {200}
        assert second.asked == 20


def test_a_request_is_never_sent_twice(two: tuple[Replica, Replica], tmp_path: Path) -> None:
    first, second = two
    with balanced(tmp_path, first, second) as client:
        first.dies = second.dies = True
        for times, method in enumerate(("GET", "POST"), start=1):
            assert client.request(method, "/").status_code == 502
            assert first.asked + second.asked == times
