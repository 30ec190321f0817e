"""HAProxy's configuration agrees with docker-compose.yml and the service, and balances servers, also under overload."""

import csv
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from calmclip import service
from calmclip.service.app import create_app
from calmclip.service.problems import MEDIA_TYPE, PROBLEMS
from calmclip.service.settings import Settings
from tests.bench.http import posted
from tests.flooding import Flood, flood
from tests.process import free_port, installed, serving
from tests.test_compose import COMPOSE, ROOT, SERVICES, STAGES, interpolated, mounts, published, settings_of

SCALE = SERVICES["scale"]
BALANCER, REPLICA = SCALE["balancer"], SCALE["service"]
FILE = Path(service.__file__).parent / "deploy" / "balancer.cfg"
TEXT = FILE.read_text()
UNITS = {"ms": 0.001, "s": 1.0}


def seconds(pattern: str) -> float:
    number, unit = re.search(pattern + r" (\d+)(ms|s)\b", TEXT, re.MULTILINE).groups()
    return int(number) * UNITS[unit]


def count(pattern: str) -> int:
    return int(re.search(pattern + r" (\d+)\b", TEXT, re.MULTILINE)[1])


SLOTS, NAME, PORT, CHECKED = re.search(r"server-template \w+ (\d+) (\w+):(\d+) check port (\d+)", TEXT).groups()


def test_file_port_host_and_probe_agree_with_compose() -> None:
    (mounted,) = mounts(BALANCER).values()
    assert (ROOT / mounted).samefile(FILE)
    ((_, _, port),) = published(BALANCER)
    assert re.findall(r"^ +bind :(\d+)$", TEXT, re.MULTILINE) == [port]
    assert NAME in REPLICA["networks"]["default"]["aliases"]
    assert STAGES["service"].all("EXPOSE") == [PORT]
    assert CHECKED == REPLICA["environment"]["CALMCLIP_PROBES_PORT"] != PORT
    uri = re.search(r"http-check send meth GET uri (\S+)", TEXT)[1]
    assert uri in create_app(Settings()).openapi()["paths"]
    assert uri in BALANCER["healthcheck"]["test"][-1]


def test_slots_and_database_connections_suffice_for_all_replicas() -> None:
    replicas = REPLICA["deploy"]["replicas"]
    assert replicas == REPLICA["environment"]["CALMCLIP_REPLICAS"]  # one variable sets both
    assert int(interpolated(replicas)) <= int(SLOTS)
    pool = re.search(r"max_size=(\d+)", (FILE.parents[1] / "stores" / "pgvector.py").read_text())[1]
    (most,) = (re.search(r"max_connections=(\d+)", word) for word in SCALE["postgres"]["command"] if "=" in word)
    assert int(most[1]) > int(SLOTS) * int(pool)
    assert f"{SLOTS} at most" in (ROOT / "docker-compose.scale.yml").read_text()


def test_its_timeouts_exceed_the_deadline_and_it_notices_a_leaving_replica_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of(REPLICA, monkeypatch)
    assert seconds("timeout server") > settings.deadline_ms / 1000
    assert seconds("timeout client") > settings.deadline_ms / 1000
    noticed = seconds("inter") + (count("fall") - 1) * seconds("fastinter") + count("fall") * seconds("timeout check")
    assert settings.grace_s > noticed
    assert count("rise 1 maxconn") < settings.connections


def test_its_resolver_is_that_of_the_default_network() -> None:
    assert "networks" not in COMPOSE["scale"], (
        "Docker's DNS server 127.0.0.11 resolves the containers of the default network"
    )
    assert re.findall(r"nameserver \w+ (\S+)", TEXT) == ["127.0.0.11:53"]


class Replica(ThreadingHTTPServer):
    """Counts its requests in `asked`. `dies`: it closes the connection instead of an answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.ready, self.dies, self.asked = True, False, 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def ports(self) -> tuple[int, int]:
        return self.server_port, self.server_port

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    server: Replica

    def do_GET(self) -> None:
        if self.path == "/readyz":
            self._answer(200 if self.server.ready else 503)
        elif self.path == "/slow":
            time.sleep(2)
            self._answer(200)
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
def balanced(folder: Path, *replicas: tuple[int, int], **timeouts: int) -> Iterator[httpx.Client]:
    """A client of HAProxy with the repository's file, except for the addresses and ``timeouts`` in seconds.

    ``replicas``: port, and port of the probes.
    """
    address = f"127.0.0.1:{free_port()}"
    line, options = re.search(r"(?m)^ +server-template \S+ \S+ \S+ (.+?) resolvers .+$", TEXT).group(0, 1)
    options = options.replace(f"port {CHECKED} ", "")
    servers = [
        f"    server r{i} 127.0.0.1:{port} port {checked} {options}" for i, (port, checked) in enumerate(replicas)
    ]
    text = TEXT.replace(line, "\n".join(servers)).replace("bind :8080", f"bind {address}")
    text = text.replace("global\n", f"global\n    stats socket {folder}/stats\n", 1)
    for name, seconds_ in timeouts.items():
        text, done = re.subn(rf"(?m)^( +timeout {name}) \S+", rf"\1 {seconds_}s", text)
        assert done == 1
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
    with balanced(tmp_path, first.ports, second.ports) as client:
        for _ in range(20):
            assert client.post("/", content=b"x").status_code == 200
        assert min(first.asked, second.asked) > 5
        first.ready = False
        time.sleep(2)  # noticed after 1.5 s; until then it answers its requests
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
    with balanced(tmp_path, first.ports, second.ports) as client:
        first.close()  # without notice to the balancer
        answers = []
        for _ in range(20):
            answers.append(httpx.post(f"{client.base_url}/", content=b"x", trust_env=False).status_code)
        assert set(answers) == {200}
        assert second.asked == 20


def test_a_request_is_never_sent_twice(two: tuple[Replica, Replica], tmp_path: Path) -> None:
    first, second = two
    with balanced(tmp_path, first.ports, second.ports) as client:
        first.dies = second.dies = True
        for times, method in enumerate(("GET", "POST"), start=1):
            assert client.request(method, "/").status_code == 502
            assert first.asked + second.asked == times


def stand(folder: Path) -> dict[str, dict[str, str]]:
    """HAProxy's own figures for each server: name -> column -> value."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"{folder}/stats")
        connection.sendall(b"show stat\n")
        text = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
    rows = csv.DictReader(text.removeprefix("# ").splitlines())
    return {row["svname"]: row for row in rows if row["pxname"] == "replicas" and row["svname"] != "BACKEND"}


def problem(answer: httpx.Response) -> dict[str, object]:
    """The fields of a problem document, which the answer must be."""
    assert answer.headers["content-type"] == MEDIA_TYPE
    fields = answer.json()
    assert fields.keys() == {"type", "title", "status", "detail"}
    assert fields["status"] == answer.status_code
    return fields


def test_the_balancers_own_answers_are_those_of_the_services_table() -> None:
    pattern = r"http-error status (\d+) content-type (\S+) string '(.*)'( hdr Retry-After \d+)?$"
    answers = {int(status): rest for status, *rest in re.findall(pattern, TEXT, re.MULTILINE)}
    silent = {int(status) for status in re.findall(r"errorfile (\d+) /dev/null", TEXT)}
    assert {400, 403, 408, 413, 500, 502, 503, 504} <= answers.keys() | silent
    for status, (kind, body, retry_after) in answers.items():
        fields = json.loads(body)
        assert fields.keys() == {"type", "title", "status", "detail"}
        assert (kind, fields["status"], bool(retry_after)) == (MEDIA_TYPE, status, status == 503)
        known = PROBLEMS.get(fields["type"].removeprefix("/problems/"))
        if known:
            assert (fields["title"], status) == (known.title, known.status)
        else:  # RFC 9457, section 4.2.1
            assert (fields["type"], fields["title"]) == ("about:blank", HTTPStatus(status).phrase)


def test_the_balancer_answers_in_problem_documents(two: tuple[Replica, Replica], tmp_path: Path) -> None:
    first, second = two
    with balanced(tmp_path, first.ports, second.ports, **{"http-request": 1, "server": 1}) as client:
        assert client.get("/", params={"labels": "x" * 60_000}).status_code == 200
        slow = client.get("/slow")
        assert (slow.status_code, problem(slow)["type"]) == (504, "/problems/deadline-exceeded")
        first.dies = second.dies = True
        lost = client.post("/", content=b"x")
        assert (lost.status_code, problem(lost)["title"]) == (502, "Bad Gateway")
        for sent in (b"GET / HTTP/1.1\r\nHost: a b\x00\r\n\r\n", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01"):
            with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
                connection.sendall(sent)
                assert connection.recv(100) == b""  # not HTTP, or too slow
        first.ready = second.ready = False
        time.sleep(2.5)
        none = client.get("/")
        assert (none.status_code, problem(none)["type"]) == (503, "/problems/overloaded")
        assert none.headers["retry-after"] == "1"


@pytest.mark.slow
def test_overload_ejects_no_replica_and_every_refusal_is_a_problem(bundles, picture, tmp_path: Path) -> None:
    """Ten times what three replicas can do, and so many connections that their event loops are late by a second."""
    request = posted("/v1/classify?labels=red", picture("red", size=(2000, 1500)), {"Content-Type": "image/png"})
    with ExitStack() as stack:
        replicas = []
        for at in range(3):
            probes = free_port()
            more = {"CALMCLIP_PROBES_PORT": str(probes), "CALMCLIP_DEADLINE_MS": "2000"}
            context = serving(bundles, tmp_path / f"data{at}", "--threads", "1", **more)
            _, service_, _ = stack.enter_context(context)
            replicas.append((service_.base_url.port, probes))
        client = stack.enter_context(balanced(tmp_path, *replicas))
        capacity = flood(client.base_url.port, request, 6, 2)
        rate = capacity.succeeded / capacity.seconds
        over = flood(client.base_url.port, request, 600, 4)
        servers = stand(tmp_path)
    assert over.asked / over.seconds > 10 * rate
    check_refusals(over)
    assert {name: (row["status"], row["chkdown"]) for name, row in servers.items()} == {
        f"r{at}": ("UP", "0") for at in range(3)
    }


def check_refusals(over: Flood) -> None:
    assert not over.broken
    for status, kind, retry_after, body in over.answers:
        assert (kind, status in (503, 504)) == (MEDIA_TYPE, True), body
        assert json.loads(body).keys() >= {"type", "title", "status", "detail"}
        assert (status == 503) == bool(retry_after), body
