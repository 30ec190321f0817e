"""How long a balancer's check takes while the service is overloaded, and why: at the main port and at the probes' port.

    python -m tests.bench.probes models/bundles/mini-int8 [--seconds 20] [--clients 200]

`connect` is the kernel's part: the handshake, which waits only if the accept queue is full. `answer` is the rest. At
the main port it holds the event loop's turn; at the probes' port, whose thread and loop are its own, only the GIL and
the scheduler. The difference of the two is the event loop. Client and service share the machine.
"""

import argparse
import json
import os
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench.http import CLASSIFY, Server, default_picture, percentile, posted
from tests.flooding import flood
from tests.process import free_port

PERIOD_S = 0.1
HEAD = b"GET /readyz HTTP/1.0\r\n\r\n"  # as HAProxy sends it: a connection for each check


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("bundle", type=Path)
    options.add_argument("--seconds", type=float, default=20)
    options.add_argument("--clients", type=int, default=200)
    arguments = options.parse_args()
    probes = free_port()
    os.environ["CALMCLIP_PROBES_PORT"] = str(probes)
    with tempfile.TemporaryDirectory() as folder, Server(arguments.bundle, 1, Path(folder)) as server:
        request = posted(CLASSIFY, default_picture(), {"Content-Type": "image/jpeg", "X-Request-Deadline-Ms": "500"})
        with ThreadPoolExecutor(3) as pool:
            flooding = pool.submit(flood, server.port, request, arguments.clients, arguments.seconds)
            checks = {
                "main": pool.submit(sample, server.port, arguments.seconds),
                "probes": pool.submit(sample, probes, arguments.seconds),
            }
            result = {name: check.result() for name, check in checks.items()}
            asked = flooding.result()
    load = {"asked_per_s": asked.asked / asked.seconds, "succeeded_per_s": asked.succeeded / asked.seconds}
    print(json.dumps({"load": {name: round(rate, 1) for name, rate in load.items()}, **result}, indent=1))


def sample(port: int, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of connecting and of the answer: median, p99 and the largest."""
    connect, answer = [], []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connected = time.perf_counter()
            connection.sendall(HEAD)
            connection.recv(1 << 12)
        connect.append(1000 * (connected - begin))
        answer.append(1000 * (time.perf_counter() - connected))
        time.sleep(PERIOD_S)
    return {
        name: {f"p{q:g}": percentile(sorted(times), q / 100) for q in (50, 99, 100)}
        for name, times in (("connect_ms", connect), ("answer_ms", answer))
    }


if __name__ == "__main__":
    main()
