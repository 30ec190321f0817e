"""More requests than the service can answer: what is answered, what is turned away, how soon, and what it costs.

    apt-get install hey
    python -m tests.bench.bench_overload models/bundles/mini-int8 [--seconds 60] [--times 5] [--deadline-ms 1000]

The load is hey's. It measures the capacity first and last, with four requests at once for each core; between, requests
come at ``times`` that rate, each with `X-Request-Deadline-Ms`. Client and server share the machine, and hey's part is
no less than it would be elsewhere. Exit 1 when anything but 200 and 503 was answered, when less than ``--goodput`` of
the capacity was, or when the p99 of what was accepted is past the deadline.
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

from tests.bench.http import CLASSIFY, Server, default_picture, percentile

WORKERS = 250  # of hey, each with a connection of its own


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("bundle", type=Path)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--times", type=float, default=5)
    options.add_argument("--deadline-ms", type=float, default=1000)
    options.add_argument("--goodput", type=float, default=0.9)
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    if not shutil.which("hey"):
        sys.exit("hey is missing; 'apt-get install hey' brings it")
    with tempfile.TemporaryDirectory() as folder, Server(given.bundle, given.threads, Path(folder)) as server:
        result = measure(server, given, Path(folder))
    print(json.dumps(result, indent=None if given.json else 2))
    in_time = result["accepted_ms"]["p99"] <= given.deadline_ms
    return 0 if set(result["statuses"]) <= {"200", "503"} and in_time and result["goodput"] >= given.goodput else 1


def measure(server: Server, given: argparse.Namespace, folder: Path) -> dict:
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
        return sum(status == "200" for status, _ in load(seconds, 4 * given.threads)) / seconds

    load(3, given.threads)  # warm
    first = capacity(15)
    rate = f"{first * given.times / WORKERS:.4f}"
    memory: list[int | None] = []
    quarter = threading.Timer(given.seconds / 4, lambda: memory.append(server.memory_mb()))
    quarter.start()
    done = load(given.seconds, WORKERS, "-q", rate, "-H", f"X-Request-Deadline-Ms: {given.deadline_ms:.0f}")
    memory.append(server.memory_mb())
    last = capacity(15)
    accepted = sorted(ms for status, ms in done if status == "200")
    return {
        "bundle": given.bundle.name,
        "threads": given.threads,
        "capacity_per_s": [round(first, 1), round(last, 1)],
        "offered_per_s": round(len(done) / given.seconds, 1),
        "statuses": dict(Counter(status for status, _ in done)),
        "goodput": round(len(accepted) / given.seconds / ((first + last) / 2), 3),
        "accepted_ms": {"p50": percentile(accepted, 0.5), "p99": percentile(accepted, 0.99)},
        "shed_within_2_ms": shed_within(server.port, 0.002),
        "rss_mb_at_a_quarter_and_the_end": memory,
    }


def shed_within(port: int, seconds: float) -> float | None:
    """The share of 503s whose answer began so soon after the headers, as the server's own metrics have it."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    found = re.findall(r'calmclip_shed_duration_seconds_bucket\{le="([^"]+)",reason="[^"]+"\} (\S+)', text)
    soon, every = (sum(float(count) for edge, count in found if float(edge) == le) for le in (seconds, float("inf")))
    return round(soon / every, 4) if every else None


if __name__ == "__main__":
    sys.exit(main())
