"""Memory of a served bundle: before it is loaded, after it is loaded, and after many requests.

    python -m tests.bench.served_memory BUNDLE ... [--requests 900] [--connections 8] [--threads 2] [--json]

A service loads one bundle. Then clients send JPEGs of changing sizes to be classified and embedded, and texts, several
at a time. "resident" is VmRSS of /proc/PID/status. "anonymous": what the system cannot drop; "files": the rest, that is
code of libraries, and mapped files. "peak" is VmHWM, which loading may set. "no bundle" is a process that has created
the app and loaded nothing. "later" is after the service has returned what the requests left. Beside them are the bytes
of the bundle, and what immich documents for its service with the same model.
"""

import argparse
import asyncio
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image

from calmclip.service.hub import TRIM_S
from tests.bench.http import LABELS, Server, default_picture, header, posted

PARTS = {"resident": "VmRSS", "anonymous": "RssAnon", "files": "RssFile", "peak": "VmHWM"}
SIDES = (240, 320, 480, 640, 800, 1024, 1280)
PEERS = {"b-32": "immich, ViT-B-32: 1004 MiB", "siglip-b-16": "immich, ViT-B-16-SigLIP: 3038 MiB"}
_EMPTY = """
import sys
from calmclip.service.app import create_app
import calmclip.service.server, calmclip.service.probes
create_app()
print(open("/proc/self/status").read())
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    options.add_argument("--requests", type=int, default=900)
    options.add_argument("--connections", type=int, default=8)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--json", action="store_true")
    arguments = options.parse_args()
    results = [measure(bundle, arguments) for bundle in arguments.bundles]
    print(json.dumps(results) if arguments.json else "\n\n".join(map(table, results)))


def measure(bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["CALMCLIP_DEADLINE_MS"] = "600000"  # a busy machine refuses no request
        environment = {**os.environ, "CALMCLIP_DATA_DIR": scratch}
        empty = subprocess.run(
            [sys.executable, "-c", _EMPTY], env=environment, check=True, capture_output=True, text=True
        )
        with Server(bundle, arguments.threads, Path(scratch)) as server:
            loaded = _status(server)
            asyncio.run(ask(server, requests(arguments.requests), arguments.connections))
            served = _status(server)
            time.sleep(TRIM_S + 2)
            later = _status(server)
    return {
        "bundle": bundle.name,
        "bundle_mb": round(sum(file.stat().st_size for file in bundle.iterdir()) / 1e6),
        "requests": arguments.requests,
        "connections": arguments.connections,
        "mb": {"no bundle": parts(empty.stdout), "loaded": loaded, "after requests": served, "later": later},
        "peer": next((text for key, text in PEERS.items() if key in bundle.name.lower()), None),
    }


def parts(status: str) -> dict[str, int]:
    """Megabytes (10^6) of the parts of a process's memory, from the text of its status."""
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {part: round(int(lines[name].split()[0]) * 1024 / 1e6) for part, name in PARTS.items()}


def _status(server: Server) -> dict[str, int]:
    return parts(Path(f"/proc/{server.process.pid}/status").read_text())


def requests(count: int) -> Iterator[bytes]:
    """Of three kinds in turn, the same in each run: classify and embed a picture, embed texts."""
    picture = Image.open(io.BytesIO(default_picture()))
    random = np.random.default_rng(0)
    jpeg = {"Content-Type": "image/jpeg"}
    for number in range(count):
        if number % 3 == 2:
            words = [f"a photo of {LABELS[i]} {number}" for i in random.integers(0, len(LABELS), random.integers(1, 9))]
            body = json.dumps({"inputs": [{"text": text} for text in words]}).encode()
            yield posted("/v1/embed", body, {"Content-Type": "application/json"})
            continue
        file = io.BytesIO()
        picture.resize(tuple(random.choice(SIDES, 2).tolist())).save(file, "JPEG", quality=85)
        labels = [("labels", f"{label} {number // 30}") for label in LABELS]
        path = "/v1/embed" if number % 3 else f"/v1/classify?{urlencode(labels)}"
        yield posted(path, file.getvalue(), jpeg)


async def ask(server: Server, each: Iterator[bytes], connections: int) -> None:
    """Send all requests, and raise for an answer that is not 200."""

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for request in each:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(header(head, b"content-length")))
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"{request[:80]!r} was answered {head[:20]!r} {body[:300]!r}")
        writer.close()

    await asyncio.gather(*[client() for _ in range(connections)])


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['bundle']}, {result['bundle_mb']} MB",
        f"{result['requests']} requests, {result['connections']} at a time",
        "",
        row(["MB", *PARTS]),
        row(["---"] * (len(PARTS) + 1)),
        *(row([moment, *map(str, values.values())]) for moment, values in result["mb"].items()),
    ]
    return "\n".join([*lines, *(["", result["peer"]] if result["peer"] else [])])


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
