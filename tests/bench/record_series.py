"""Record what Prometheus sees of real trouble, for `tests/service/test_recorded.py`.

    apt-get install prometheus
    python -m tests.bench.record_series models/bundles/mini-int8 [--seconds 120] [--only NAME …] [--out FILE]

Services of the bundle run as separate processes, and a Prometheus scrapes them each 5 s, with targets from a file, as
DNS discovery would give them. `SCENES` lists what happens. A target whose replica is dead leaves the file, as a dead
container leaves the DNS. ``--out`` (default: the tests' fixture) gets the series that the rules read, in promtool's
notation: values, `AxN` for A and N more, `_` for no sample, `stale` where a series ends. `full-disk` mounts a small
file system, so it needs root.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from calmclip.service.monitoring import rules
from tests.bench.http import CLASSIFY, default_picture, posted
from tests.flooding import flood
from tests.process import free_port

STEP_S = 5
FIXTURE = Path(__file__).parents[1] / "service" / "recorded.json"
EDGES = ("0.25", "2.5", "+Inf")  # of declared latencies; the other buckets no rule reads
DETECT = "/v1/detect?labels=a+cat&labels=a+dog"


class Replica:
    """`calmclip serve` with one thread. ``more``: environment variables."""

    def __init__(self, bundle: Path, data: Path, **more: str) -> None:
        self.port = free_port()
        self._command = [sys.executable, "-m", "calmclip.models.cli", "serve", "--bundles", str(bundle.parent)]
        self._command += ["--load", bundle.name, "--port", str(self.port), "--threads", "1"]
        self._environment = {**os.environ, "CALMCLIP_DATA_DIR": str(data), **more}
        self._log = data.with_suffix(".log").open("a")
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, env=self._environment, stderr=self._log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def until_loaded(self) -> None:
        """Until its bundles are loaded, whatever its collections do."""
        for _ in range(600):
            try:
                answer = ask(self.port, "GET", "/v1/models")
                if answer[0] == 200 and json.loads(answer[1])["models"]:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        sys.exit("the service did not load its bundle")


def ask(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class Prometheus:
    """It scrapes the targets of a file, and evaluates no rule."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.target([])
        scrape = {"job_name": "calmclip", "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": "1s"}]}
        text = {"global": {"scrape_interval": f"{STEP_S}s", "scrape_timeout": "4s"}, "scrape_configs": [scrape]}
        (folder / "prometheus.json").write_text(json.dumps(text))

    def target(self, replicas: list[Replica]) -> None:
        beside = self.folder / "targets.tmp"
        beside.write_text(json.dumps([{"targets": [f"127.0.0.1:{replica.port}" for replica in replicas]}]))
        beside.rename(self.folder / "targets.json")

    @contextmanager
    def running(self) -> Iterator["Prometheus"]:
        flags = [f"--config.file={self.folder}/prometheus.json", f"--storage.tsdb.path={self.folder}/tsdb"]
        flags += [f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=error"]
        process = subprocess.Popen(["prometheus", *flags])
        try:
            yield self
        finally:
            process.terminate()
            process.wait()

    def series(self, names: set[str], start: float, end: float) -> list[dict[str, Any]]:
        query = urllib.parse.urlencode(
            {"query": f'{{__name__=~"{"|".join(sorted(names))}"}}', "start": start, "end": end, "step": STEP_S}
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/query_range?{query}") as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result


class Scene:
    """What a scenario has: a bundle, a Prometheus, a folder, and the seconds that it may take."""

    def __init__(self, bundle: Path, prometheus: Prometheus, folder: Path, seconds: float, stack: ExitStack) -> None:
        self.bundle, self.prometheus, self.folder = bundle, prometheus, folder
        self.seconds, self.stack = seconds, stack
        self.replicas: list[Replica] = []
        self.start = 0.0

    def serve(self, count: int = 1, data: Path | None = None, **more: str) -> Replica:
        """Start replicas, wait until they are loaded, and begin to record. -> the first of them."""
        for at in range(count):
            replica = Replica(self.bundle, data or self.folder / f"data{at}", **more)
            self.stack.callback(replica.kill)
            self.replicas.append(replica)
        for replica in self.replicas:
            replica.until_loaded()
        return self.replicas[0]

    def record(self) -> None:
        self.prometheus.target(self.replicas)
        time.sleep(2 * STEP_S)
        self.start = time.time()

    def load(self, clients: int, pause_s: float, sent: bytes) -> None:
        """``clients`` connections; each sends, waits for the answer, and begins at most every ``pause_s``."""
        seconds = self.seconds + 4 * STEP_S
        with ThreadPoolExecutor(1) as pool:
            flooding = pool.submit(flood, self.replicas[0].port, sent, clients, seconds, pause_s)
            time.sleep(2 * STEP_S)  # the throughput is measured, and every series exists
            self.record()
            result = flooding.result()
        statuses = Counter({200: result.succeeded})
        for (status, *_), count in result.answers.items():
            statuses[status] += count
        print(f"  {dict(statuses)}, {result.broken} broken in {result.seconds:.0f} s", file=sys.stderr)

    def capacity(self, sent: bytes, seconds: float = 15) -> float:
        """Requests per second with four clients that do not pause."""
        return flood(self.replicas[0].port, sent, 4, seconds).succeeded / seconds


def request(path: str = DETECT, **headers: str) -> bytes:
    return posted(path, default_picture(), {"Content-Type": "image/jpeg", **headers})


def no_load(scene: Scene) -> None:
    scene.serve()
    scene.record()
    time.sleep(scene.seconds)


def below_capacity(scene: Scene) -> None:
    """Requests arrive at seven tenths of the capacity. The declared latency is one that this machine can keep."""
    scene.serve(CALMCLIP_SLO__LATENCY_MS="2500")
    sent = request(CLASSIFY, **{"X-Request-Deadline-Ms": "2000"})
    scene.load(16, 16 / (0.7 * scene.capacity(sent)), sent)


def overload_by_deadline(scene: Scene) -> None:
    """Forty clients ask for an answer within 300 ms, each four times a second."""
    scene.serve()
    scene.load(40, 0.25, request(**{"X-Request-Deadline-Ms": "300"}))


def overload_by_queue(scene: Scene) -> None:
    """Forty clients in the default time; four requests may be in flight."""
    scene.serve(CALMCLIP_QUEUE__MAX_PENDING="4")
    scene.load(40, 0.25, request())


def dead_replica(scene: Scene) -> None:
    """One of two replicas is killed, and its target goes."""
    scene.serve(2, CALMCLIP_REPLICAS="2", CALMCLIP_STORE="pgvector:postgresql://127.0.0.1:1/none")
    scene.record()
    time.sleep(scene.seconds / 2)
    scene.replicas.pop().kill()
    time.sleep(STEP_S)
    scene.prometheus.target(scene.replicas)
    time.sleep(scene.seconds / 2)


def crash_loop(scene: Scene) -> None:
    """A replica is killed four times, and started again each time."""
    replica = scene.serve()
    scene.record()
    for _ in range(4):
        time.sleep(2 * STEP_S)
        replica.kill()
        replica.start()
        replica.until_loaded()
    time.sleep(2 * STEP_S)


def full_disk(scene: Scene) -> None:
    """The file system of the collections gets full, by another program."""
    data = scene.folder / "small"
    data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", data], check=True)
    scene.stack.callback(lambda: subprocess.run(["umount", "--lazy", data], check=True))
    replica = scene.serve(data=data)
    while ask(replica.port, "PUT", "/v1/collections/c", {})[0] != 201:
        time.sleep(0.1)  # the collections are still being opened
    scene.record()
    for at in range(8):
        try:
            (data / f"filler{at}").write_bytes(bytes(8 << 20))
        except OSError as error:
            print(f"  {error}", file=sys.stderr)
        time.sleep(scene.seconds / 8)
    writing = ask(replica.port, "POST", "/v1/collections/c/items", {"items": [{"id": "a", "text": "cat"}]})
    searching = ask(replica.port, "POST", "/v1/collections/c/search", {"query": {"text": "cat"}})
    print(f"  full: a write {writing[0]} {writing[1][:200]!r}, a search {searching[0]}", file=sys.stderr)


def database_away(scene: Scene) -> None:
    scene.serve(CALMCLIP_STORE="pgvector:postgresql://127.0.0.1:1/none")
    scene.record()
    time.sleep(scene.seconds)


SCENES: dict[str, Callable[[Scene], None]] = {
    "no-load": no_load,
    "below-capacity": below_capacity,
    "overload-by-deadline": overload_by_deadline,
    "overload-by-queue": overload_by_queue,
    "dead-replica": dead_replica,
    "crash-loop": crash_loop,
    "full-disk": full_disk,
    "database-away": database_away,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("bundle", type=Path)
    options.add_argument("--seconds", type=float, default=120, help="of each scene")
    options.add_argument("--only", nargs="+", choices=SCENES, default=[*SCENES])
    options.add_argument("--out", type=Path, default=FIXTURE)
    arguments = options.parse_args()
    result: dict[str, Any] = {"step_s": STEP_S, "scenes": {}}
    if arguments.out.exists():
        result = json.loads(arguments.out.read_text())
    for name in arguments.only:
        print(name, file=sys.stderr)
        result["scenes"][name] = record(SCENES[name], arguments.bundle, arguments.seconds)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def record(play: Callable[[Scene], None], bundle: Path, seconds: float) -> dict[str, str]:
    """-> series -> its values in promtool's notation."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        prometheus = stack.enter_context(Prometheus(folder).running())
        scene = Scene(bundle, prometheus, folder, seconds, stack)
        play(scene)
        recorded = prometheus.series(needed(), scene.start, time.time())
        names = {
            address: f"replica-{at}" for at, address in enumerate(sorted({r["metric"]["instance"] for r in recorded}))
        }
        steps = [scene.start + STEP_S * at for at in range(1 + int((time.time() - scene.start) / STEP_S))]
    result = {}
    for series in recorded:
        labels = {**series["metric"], "instance": names[series["metric"]["instance"]]}
        if labels.get("le", EDGES[0]) in EDGES:
            result[written(labels)] = notation(series["values"], steps)
    return dict(sorted(result.items()))


def needed() -> set[str]:
    """The names of the series that the rules read, without those that rules make."""
    text = " ".join([record.expr for record in rules.RECORDS] + [alert.expr for alert in rules.ALERTS])
    return {"up", *re.findall(r"\b(?:calmclip_|process_)\w+", text)}


def written(labels: dict[str, str]) -> str:
    inside = ", ".join(f'{name}="{value}"' for name, value in sorted(labels.items()) if name != "__name__")
    return f"{labels['__name__']}{{{inside}}}"


def notation(values: list[tuple[float, str]], steps: list[float]) -> str:
    at = {round(when - steps[0]): f"{float(value):.6g}" if "e" in value else value for when, value in values}
    tokens = [at.get(STEP_S * step, "_") for step in range(len(steps))]
    for step in range(1, len(tokens)):
        if tokens[step] == "_" and tokens[step - 1] not in ("_", "stale"):
            tokens[step] = "stale"
    runs = [(token, len([*group])) for token, group in groupby(tokens)]
    return " ".join(token if count == 1 else f"{token}x{count - (token != '_')}" for token, count in runs)


if __name__ == "__main__":
    main()
