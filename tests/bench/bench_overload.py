"""More requests than the service can answer: what is answered, what is turned away, how soon, and what it costs.

    python tests/bench/bench_overload.py models/bundles/mini-int8 [--seconds 60] [--times 5] [--deadline-ms 1000]

Measures the capacity first, with as many requests at once as there are cores, four times over; then requests arrive at
``times`` that rate, evenly spaced, whether or not earlier ones were answered, each with `X-Request-Deadline-Ms`, on
connections of their own. Client and server share the machine, so the capacity left is less than the one measured. Exit
1 when anything but 200 and 503 was answered, or when the p99 of what was accepted is past the deadline.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench_http import LABELS, Server, default_picture, percentile


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("bundle", type=Path)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--times", type=float, default=5)
    options.add_argument("--deadline-ms", type=float, default=1000)
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as data, Server(given.bundle, given.threads, Path(data)) as server:
        result = asyncio.run(measure(server, given))
    print(json.dumps(result, indent=None if given.json else 2))
    in_time = result["accepted_ms"]["p99"] <= given.deadline_ms
    return 0 if set(result["statuses"]) <= {"200", "503"} and in_time else 1


async def measure(server: Server, given: argparse.Namespace) -> dict:
    client = Client(server.port, default_picture(), given.deadline_ms)
    capacity = await client.closed(4 * given.threads, min(10.0, given.seconds))
    client.done.clear()
    before = server.memory_mb()
    start = time.perf_counter()
    await client.open(capacity * given.times, given.seconds)
    seconds = time.perf_counter() - start
    accepted = sorted(ms for status, ms, _ in client.done if status == "200")
    shed = sorted(server_ms for status, _, server_ms in client.done if status == "503")
    return {
        "bundle": given.bundle.name,
        "threads": given.threads,
        "capacity_per_s": round(capacity, 1),
        "offered_per_s": round(len(client.done) / seconds, 1),
        "statuses": dict(Counter(status for status, *_ in client.done)),
        "goodput": round(len(accepted) / seconds / capacity, 3),
        "accepted_ms": {"p50": percentile(accepted, 0.5), "p99": percentile(accepted, 0.99)},
        "shed_in_server_ms": {"p50": percentile(shed, 0.5), "p99": percentile(shed, 0.99)} if shed else None,
        "rss_mb": [before, server.memory_mb()],
    }


class Client:
    """Raw sockets, for the least of the cores. ``done``: status, milliseconds here, milliseconds in the server."""

    def __init__(self, port: int, picture: bytes, deadline_ms: float) -> None:
        self.port = port
        query = "&".join("labels=" + label.replace(" ", "+") for label in LABELS)
        self.request = (
            f"POST /v1/classify?{query} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: image/jpeg\r\n"
            f"X-Request-Deadline-Ms: {deadline_ms:.0f}\r\nContent-Length: {len(picture)}\r\n\r\n"
        ).encode() + picture
        self.done: list[tuple[str, float, float]] = []

    async def ask(self) -> None:
        start = time.perf_counter()
        status, server_ms = "lost", 0.0
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                writer.write(self.request)
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                await reader.read()
                status = head.split()[1]
                server_ms = float(head.split("total;dur=")[1].split()[0])
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError) as error:
            print(f"lost: {error!r}", file=sys.stderr)
        self.done.append((status, (time.perf_counter() - start) * 1000, server_ms))

    async def closed(self, clients: int, seconds: float) -> float:
        """Each of so many asks again as soon as it is answered; -> answers per second."""
        start = time.perf_counter()

        async def one() -> None:
            while time.perf_counter() - start < seconds:
                await self.ask()

        await asyncio.gather(*(one() for _ in range(clients)))
        return sum(status == "200" for status, *_ in self.done) / (time.perf_counter() - start)

    async def open(self, per_second: float, seconds: float) -> None:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for at in range(int(per_second * seconds)):
                await asyncio.sleep(max(0.0, start + at / per_second - time.perf_counter()))
                group.create_task(self.ask())


if __name__ == "__main__":
    sys.exit(main())
