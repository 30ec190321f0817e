"""More requests than the service can answer: statuses, goodput, latency of accepted requests, and memory.

    apt-get install hey
    python -m tests.bench.bench_overload models/bundles/mini-int8 [--seconds 60] [--times 5] [--deadline-ms 1000]

The program hey makes the load. It measures the capacity first and last, with four concurrent requests per core. In
between, requests arrive at ``--times`` that rate, each with `X-Request-Deadline-Ms`. Client and server share the
machine. Exit 1 if a status is neither 200 nor 503, if the goodput is less than ``--goodput`` of the capacity, or if the
p99 of accepted requests exceeds the deadline.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from tests.bench.http import CLASSIFY, Server, default_picture, percentile

WORKERS = 250  # of hey, each with its own connection


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("bundle", type=Path)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--times", type=float, default=5)
    options.add_argument("--deadline-ms", type=float, default=1000)
    options.add_argument("--goodput", type=float, default=0.9)
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--json", action="store_true")
    arguments = options.parse_args()
    if not shutil.which("hey"):
        sys.exit("the program hey is not installed; run 'apt-get install hey'")
    with tempfile.TemporaryDirectory() as folder, Server(arguments.bundle, arguments.threads, Path(folder)) as server:
        result = measure(server, arguments, Path(folder))
    print(json.dumps(result, indent=None if arguments.json else 2))
    in_time = result["accepted_ms"]["p99"] <= arguments.deadline_ms
    return 0 if set(result["statuses"]) <= {"200", "503"} and in_time and result["goodput"] >= arguments.goodput else 1


def measure(server: Server, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    picture = folder / "picture.jpg"
    picture.write_bytes(default_picture())
    url = f"http://127.0.0.1:{server.port}{CLASSIFY}"

    def load(seconds: float, workers: int, *more: str) -> list[tuple[str, float]]:
        """-> status and milliseconds of each request."""
        command = ["hey", "-z", f"{seconds:g}s", "-c", str(workers), "-o", "csv", "-m", "POST", "-T", "image/jpeg"]
        done = subprocess.run([*command, "-D", picture, *more, url], check=True, capture_output=True, text=True)
        rows = csv.DictReader(done.stdout.splitlines())
        return [(row["status-code"], float(row["response-time"]) * 1000) for row in rows]

    def capacity(seconds: float) -> float:
        return sum(status == "200" for status, _ in load(seconds, 4 * arguments.threads)) / seconds

    load(3, arguments.threads)  # warm-up
    first = capacity(15)
    rate = f"{first * arguments.times / WORKERS:.4f}"
    memory: list[int | None] = []
    quarter = threading.Timer(arguments.seconds / 4, lambda: memory.append(server.memory_mb()))
    quarter.start()
    done = load(arguments.seconds, WORKERS, "-q", rate, "-H", f"X-Request-Deadline-Ms: {arguments.deadline_ms:.0f}")
    memory.append(server.memory_mb())
    last = capacity(15)
    accepted = sorted(ms for status, ms in done if status == "200")
    return {
        "bundle": arguments.bundle.name,
        "threads": arguments.threads,
        "capacity_per_s": [round(first, 1), round(last, 1)],
        "offered_per_s": round(len(done) / arguments.seconds, 1),
        "statuses": dict(Counter(status for status, _ in done)),
        "goodput": round(len(accepted) / arguments.seconds / ((first + last) / 2), 3),
        "accepted_ms": {"p50": percentile(accepted, 0.5), "p99": percentile(accepted, 0.99)},
        "shed_within_2_ms": shed_within(server.port, 0.002),
        "rss_mb_at_a_quarter_and_the_end": memory,
    }


def shed_within(port: int, seconds: float) -> float | None:
    """The part of 503 answers that began within ``seconds`` of the headers, from the server's metrics."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    buckets = re.findall(r'calmclip_shed_duration_seconds_bucket\{le="([^"]+)",reason="[^"]+"\} (\S+)', text)
    soon, every = (sum(float(count) for edge, count in buckets if float(edge) == le) for le in (seconds, float("inf")))
    return round(soon / every, 4) if every else None


if __name__ == "__main__":
    sys.exit(main())
