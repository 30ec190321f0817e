"""A JPEG in, labels out, over HTTP: what a request costs, and where.

    python tests/bench/bench_http.py models/bundles/mini-int8 [--requests 200] [--threads 2] [--json]

Starts its own server (one process, nothing else in flight), sends one picture after the other over one
connection, and prints p50 and p95 as the client saw them beside the server's stages from `Server-Timing`.
Exit 1 when the stages of the median request add up to less than 95 % of its total: time nobody accounts for.
"""

import argparse
import http.client
import io
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = ["a cat", "a dog", "a bicycle", "a red car", "people at a table", "a mountain", "a beach", "a bird"]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("bundle", type=Path)
    options.add_argument("--requests", type=int, default=200)
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--picture", type=Path, help="default: the photograph of a cat in export/samples, 640 x 480")
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    picture = given.picture.read_bytes() if given.picture else default_picture()
    with tempfile.TemporaryDirectory() as data, Server(given.bundle, given.threads, Path(data)) as server:
        for _ in range(20):
            server.classify(picture)
        rounds = [server.classify(picture) for _ in range(given.requests)]
        memory_mb = server.memory_mb()
    clients = sorted(seconds for seconds, _ in rounds)
    stages = sorted((timing for _, timing in rounds), key=lambda timing: timing["total"])[len(rounds) // 2]
    shares = [sum(v for k, v in t.items() if k != "total") / t["total"] for _, t in rounds]
    result = {
        "bundle": given.bundle.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {given.threads} threads per graph",
        "picture": f"{Image.open(io.BytesIO(picture)).size}, {len(picture)} bytes, {len(LABELS)} labels (cached)",
        "requests": given.requests,
        "client_ms": {"p50": percentile(clients, 0.5), "p95": percentile(clients, 0.95)},
        "server_ms": {name: round(ms, 2) for name, ms in stages.items()},
        "accounted": {"median": round(statistics.median(shares), 4), "least": round(min(shares), 4)},
        "server_rss_mb": memory_mb,
    }
    print(json.dumps(result) if given.json else table(result))
    return 0 if 0.95 <= result["accounted"]["median"] <= 1.001 else 1


class Server:
    """`calmclip serve` in a process of its own."""

    def __init__(self, bundle: Path, threads: int, data: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "models.cli", "serve", "--bundles", str(bundle.parent), "--load", bundle.name]
        command += ["--port", str(self.port), "--threads", str(threads)]
        self.log = (data / "log").open("w")
        environment = {**os.environ, "CALMCLIP_DATA_DIR": str(data)}
        self.process = subprocess.Popen(command, env=environment, stderr=self.log)
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def __enter__(self) -> "Server":
        for _ in range(600):
            try:
                self.connection.request("GET", "/readyz")
                answer = self.connection.getresponse()
                answer.read()
                if answer.status == 200:
                    return self
            except OSError:
                self.connection.close()
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        sys.exit(f"the server did not become ready; its log:\n{Path(self.log.name).read_text()}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.log.close()

    def classify(self, picture: bytes) -> tuple[float, dict[str, float]]:
        """Client's milliseconds, and the server's by stage."""
        query = "&".join("labels=" + label.replace(" ", "+") for label in LABELS)
        start = time.perf_counter()
        self.connection.request("POST", f"/v1/classify?{query}", picture, {"Content-Type": "image/jpeg"})
        answer = self.connection.getresponse()
        body = answer.read()
        seconds = time.perf_counter() - start
        assert answer.status == 200, body
        timing = (entry.split(";dur=") for entry in answer.headers["Server-Timing"].split(", "))
        return seconds * 1000, {name: float(ms) for name, ms in timing}

    def memory_mb(self) -> int | None:
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return None
        return next(int(line.split()[1]) // 1024 for line in status.read_text().splitlines() if "VmRSS" in line)


def default_picture() -> bytes:
    asset = Path(__file__).parents[2] / "export" / "samples" / "cat.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    image = Image.open(asset) if asset.exists() else Image.fromarray(noise)
    file = io.BytesIO()
    image.convert("RGB").resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def percentile(ordered: list[float], share: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)


def table(result: dict) -> str:
    client, server, accounted = result["client_ms"], dict(result["server_ms"]), result["accounted"]
    total = server.pop("total")
    lines = [
        f"{result['bundle']}   POST /v1/classify, {result['requests']} requests one after another",
        f"{result['machine']}; picture {result['picture']}",
        f"client   p50 {client['p50']:.1f} ms   p95 {client['p95']:.1f} ms",
        f"server   p50 {total:.1f} ms, of it   " + "   ".join(f"{name} {ms:.2f}" for name, ms in server.items()),
        f"stages add up to {accounted['median']:.1%} of the total (median; least {accounted['least']:.1%})",
        f"memory   {result['server_rss_mb']} MB resident",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
