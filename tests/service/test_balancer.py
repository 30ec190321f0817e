"""HAProxy's configuration agrees with docker-compose.yml and the service, and keeps its word between two servers."""

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


def test_it_stands_where_compose_puts_it_and_asks_for_whom_compose_names() -> None:
    (mounted,) = mounts("balancer").values()
    assert (Path(__file__).parents[2] / mounted).samefile(FILE)
    ((_, _, port),) = published("balancer")
    assert re.findall(r"^ +bind :(\d+)$", TEXT, re.MULTILINE) == [port]
    assert NAME in aliases("replica")
    assert STAGES["service"].all("EXPOSE") == [PORT]
    uri = re.search(r"http-check send meth GET uri (\S+)", TEXT)[1]
    assert uri in create_app(Settings()).openapi()["paths"]
    assert uri in SERVICES["balancer"]["healthcheck"]["test"][-1]


def test_there_is_room_for_as_many_replicas_as_it_takes() -> None:
    assert SERVICES["replica"]["deploy"]["replicas"] <= int(SLOTS)
    pool = re.search(r"max_size=(\d+)", (FILE.parents[1] / "stores" / "pgvector.py").read_text())[1]
    (most,) = (re.search(r"max_connections=(\d+)", one) for one in SERVICES["postgres"]["command"] if "=" in one)
    assert int(most[1]) > int(SLOTS) * int(pool)
    assert f"{SLOTS} at most" in (Path(__file__).parents[2] / "docker-compose.yml").read_text()


def test_it_waits_longer_than_a_request_may_take_and_notices_who_leaves_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of("replica", monkeypatch)
    assert seconds("timeout server") > settings.deadline_ms / 1000
    assert seconds("timeout client") > settings.deadline_ms / 1000
    noticed = (
        seconds(r"check inter") + (count("fall") - 1) * seconds("fastinter") + count("fall") * seconds("timeout check")
    )
    assert settings.grace_s > noticed


def test_one_balancer_for_the_networks_of_this_file() -> None:
    assert "networks" not in COMPOSE, "the engine's own DNS, 127.0.0.11, knows the containers of the default network"
    assert re.findall(r"nameserver \w+ (\S+)", TEXT) == ["127.0.0.11:53"]


class Replica(ThreadingHTTPServer):
    """Counts what it was asked. `dies`: it hangs up instead of an answer."""

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
    """The repository's file, but for the addresses."""
    address = f"127.0.0.1:{free_port()}"
    line, options = re.search(r"(?m)^ +server-template \S+ \S+ \S+ (.+?) resolvers .+$", TEXT).group(0, 1)
    servers = [f"    server r{i} 127.0.0.1:{one.server_port} {options}" for i, one in enumerate(replicas)]
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
    with closing(Replica()) as one, closing(Replica()) as other:
        yield one, other


def test_requests_go_to_all_who_are_ready_and_to_no_other(two: tuple[Replica, Replica], tmp_path: Path) -> None:
    one, other = two
    with balanced(tmp_path, one, other) as client:
        for _ in range(20):
            assert client.post("/", content=b"x").status_code == 200
        assert min(one.asked, other.asked) > 5
        one.ready = False
        time.sleep(2)  # noticed after 1.25 s at most, and what it is asked by then it answers
        before = one.asked
        assert {client.post("/", content=b"x").status_code for _ in range(20)} == {200}
        assert one.asked == before
        one.ready = True
        time.sleep(2)
        for _ in range(20):
            client.post("/", content=b"x")
        assert one.asked > before


def test_one_that_is_gone_costs_nobody_an_answer(two: tuple[Replica, Replica], tmp_path: Path) -> None:
    one, other = two
    with balanced(tmp_path, one, other) as client:
        one.close()  # nobody has told the balancer
        answers = []
        for _ in range(20):
            answers.append(httpx.post(f"{client.base_url}/", content=b"x", trust_env=False).status_code)
        assert set(answers) == {200}
        assert other.asked == 20


def test_what_was_sent_is_not_sent_again(two: tuple[Replica, Replica], tmp_path: Path) -> None:
    one, other = two
    with balanced(tmp_path, one, other) as client:
        one.dies = other.dies = True
        for times, method in enumerate(("GET", "POST"), start=1):
            assert client.request(method, "/").status_code == 502
            assert one.asked + other.asked == times
