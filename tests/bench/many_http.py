"""Pictures a second over HTTP: one request with many pictures, as many concurrent requests, and one after the other.

    python -m tests.bench.many_http BUNDLE PICTURES [--count 16] [--rounds 7] [--threads 1]

The server has one core and the given threads; the client has the other core. The ways take turns, with the same
pictures (those of the folder) and labels. Printed are medians of the rounds: pictures a second by the clock, the
server's processor time for a picture, which excludes other load, and the mean number of rows in a run of the image
graph; then each way as a part of the concurrent requests.
"""

import argparse
import base64
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from tests.bench.http import LABELS, Server

LINES = {"Accept": "application/x-ndjson"}


class Ways:
    """The same pictures, sent in each way. Each raises for an answer that is not good."""

    def __init__(self, client: httpx.Client, pictures: list[bytes], pool: ThreadPoolExecutor) -> None:
        self.client = client
        self.pictures = [{"b64": base64.b64encode(picture).decode()} for picture in pictures]
        self.pool = pool

    def post(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        answer = self.client.post("/v1/classify", json={**body, "labels": LABELS}, headers=headers)
        answer.raise_for_status()
        return answer

    def many(self) -> None:
        results = self.post({"images": self.pictures}).json()["results"]
        assert len([result["answer"] for result in results]) == len(self.pictures)

    def lines(self) -> None:
        lines = self.post({"images": self.pictures}, **LINES).text.splitlines()
        assert len([json.loads(line)["answer"] for line in lines]) == len(self.pictures)

    def concurrent(self) -> None:
        list(self.pool.map(lambda picture: self.post({"image": picture}), self.pictures))

    def sequential(self) -> None:
        for picture in self.pictures:
            self.post({"image": picture})


def batches(client: httpx.Client) -> tuple[float, float]:
    """Rows and runs of the image graph."""
    text = client.get("/metrics").text
    rows, runs = (
        sum(map(float, re.findall(rf'^calmclip_batch_size_{end}{{graph="image".*}} (\S+)$', text, re.MULTILINE)))
        for end in ("sum", "count")
    )
    return rows, runs


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("pictures", type=Path)
    options.add_argument("--count", type=int, default=16)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=1)
    arguments = options.parse_args()
    files = sorted(file for file in arguments.pictures.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pictures = list(islice(cycle([file.read_bytes() for file in files]), arguments.count))
    core, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {others[-1] if others else core})
    with (
        tempfile.TemporaryDirectory() as scratch,
        Server(arguments.bundle, arguments.threads, Path(scratch), core) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=120, trust_env=False) as client,
        ThreadPoolExecutor(arguments.count) as pool,
    ):
        ways = Ways(client, pictures, pool)
        sends: list[Callable[[], None]] = [ways.many, ways.lines, ways.concurrent, ways.sequential]
        for send in sends:  # connections and the labels
            send()
        measured: dict[str, list[tuple[float, float, float]]] = {send.__name__: [] for send in sends}
        for _ in range(arguments.rounds):
            for send in sends:
                rows, runs = batches(client)
                busy, start = server.busy(), time.perf_counter()
                send()
                seconds, busy = time.perf_counter() - start, server.busy() - busy
                more_rows, more_runs = batches(client)
                measured[send.__name__].append((seconds, busy, (more_rows - rows) / (more_runs - runs)))
    count = len(pictures)
    print(f"{count} pictures, {arguments.threads} thread(s) of the server on one core, {arguments.rounds} rounds")
    print(f"{'way':12}{'pictures/s':>12}{'CPU ms each':>13}{'rows a run':>12}{'rate, of concurrent':>21}")
    by_clock = {name: median(seconds for seconds, *_ in turns) for name, turns in measured.items()}
    for name, turns in measured.items():
        cpu, rows = 1000 * median(turn[1] for turn in turns) / count, median(turn[2] for turn in turns)
        ratio = median(base[0] / turn[0] for turn, base in zip(turns, measured["concurrent"], strict=True))
        print(f"{name:12}{count / by_clock[name]:12.1f}{cpu:13.2f}{rows:12.2f}{ratio:21.2f}")


if __name__ == "__main__":
    main()
