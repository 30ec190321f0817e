"""Classification of a JPEG over HTTP: the overhead over the bare tower, by stage, and the throughput when saturated.

    python -m tests.bench.http [BUNDLE] [--rounds 5] [--seconds 2] [--connections 8 16] [--json]

Without BUNDLE, CLIP ViT-B/32 with random weights is exported with the quantizer `fast`, which takes minutes (``--out``
keeps it). The server has one core and one thread; the client has the other core. A third process on the server's core
times the bare graph, decoding and preprocessing while the server is idle. All take turns.

Single requests: the round trip, the server's stages from `Server-Timing`, and the difference to the bare graph. "HTTP"
is the round trip without decode, preprocess, queue, infer and postprocess. For comparison, uvicorn that only runs the
graph in a thread gets the same bytes: the least overhead of any service on this server. Saturated: requests per second
at each number of connections, with a JPEG or with prepared pixels by the binary /v2, as a part of the rate of the bare
parts in sequence, with the graph at batch 1 and 8. Figures are by the clock and by processor time, which excludes other
load; the quickest tenth of the requests is little affected by it. Exit 1 if the stages of the median request are less
than 95 % of its total.
"""

import argparse
import asyncio
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image

from tests.bench.alternate import pipes

LABELS = ["a cat", "a dog", "a bicycle", "a red car", "people at a table", "a mountain", "a beach", "a bird"]
CLASSIFY = f"/v1/classify?{urlencode([('labels', label) for label in LABELS])}"
WORK = ("decode", "preprocess", "queue", "infer", "postprocess")  # stages that are not HTTP
BATCHES = (1, 8)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path, nargs="?")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    options.add_argument("--connections", type=int, nargs="+", default=[8, 16])
    options.add_argument("--out", type=Path, help="folder that keeps the bundle of ViT-B/32")
    options.add_argument("--json", action="store_true")
    arguments = options.parse_args()
    server, client = (cores := sorted(os.sched_getaffinity(0)))[0], cores[-1]
    with tempfile.TemporaryDirectory() as scratch:
        bundle = arguments.bundle or vit_b_32(arguments.out or Path(scratch))
        os.sched_setaffinity(0, {client})
        with (
            Server(bundle, 1, Path(scratch), server) as running,
            Uvicorn(bundle, 1, Path(scratch), server) as least,
            Bare(bundle, server) as bare,
        ):
            result = measure(running, least, bare, arguments)
    result |= {"bundle": bundle.name, "cores": {"server": server, "client": client}}
    print(json.dumps(result) if arguments.json else table(result))
    return 0 if 0.95 <= result["accounted"] <= 1.001 else 1


def measure(server: "Server", least: "Server", bare: "Bare", arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds and requests per second: medians of the turns, or of all single requests."""
    picture = default_picture()
    loads = {"JPEG": (CLASSIFY, picture, {"Content-Type": "image/jpeg"}), "tensors": tensors(bare)}
    single: list[tuple[float, dict[str, float]]] = []
    without: list[tuple[float, dict[str, float]]] = []
    used: list[tuple[float, float]] = []
    parts: dict[str, list[tuple[float, float]]] = {}
    saturated: dict[str, list[tuple[float, float]]] = {}
    request = posted(*loads["JPEG"])
    for warmed in (server, least):
        warmed.repeat(request, 0.5)
    for _ in range(arguments.rounds):
        for name, times in bare.turn(arguments.seconds).items():
            parts.setdefault(name, []).extend(times)
        busy = server.busy(), server.busy(loop=True)
        single += (turn := server.repeat(request, arguments.seconds))
        used.append(((server.busy() - busy[0]) / len(turn), (server.busy(loop=True) - busy[1]) / len(turn)))
        without += least.repeat(request, arguments.seconds)
        for kind, load in loads.items():
            for connections in arguments.connections:
                rate = asyncio.run(saturate(server, connections, arguments.seconds, posted(*load)))
                saturated.setdefault(f"{kind}, {connections} connections", []).append(rate)
    clock, processor = ({name: median(t[i] for t in times) for name, times in parts.items()} for i in (0, 1))
    graphs = sorted(ms for ms, _ in parts["graph, batch 1"])
    single.sort(key=itemgetter(0))
    return {
        "requests": len(single),
        "picture": f"{Image.open(io.BytesIO(picture)).size}, {len(picture)} bytes, {len(LABELS)} labels seen before",
        "bare_ms": clock,
        "bare_processor_ms": processor,
        "median": _overhead(single, median(graphs)),
        "uvicorn_alone": {
            "all": median(ms - t["infer"] for ms, t in without),
            "HTTP": median(ms - t["infer"] - t["queue"] for ms, t in without),
            "queue": median(t["queue"] for _, t in without),
        },
        "quickest_tenth": _overhead(single[: -(-len(single) // 10)], median(graphs[: -(-len(graphs) // 10)])),
        "processor_overhead_ms": {
            "all": 1000 * median(every for every, _ in used) - processor["graph, batch 1"],
            "event loop": 1000 * median(loop for _, loop in used),
            "decode": processor["decode"],
            "preprocess": processor["preprocess"],
        },
        "accounted": median(sum(v for k, v in t.items() if k != "total") / t["total"] for _, t in single),
        "saturated": {
            name: {
                "per_s": median(rate for rate, _ in turns),
                "share": _shares(name, clock, 1000 / median(rate for rate, _ in turns)),
                "share_by_processor_time": _shares(name, processor, 1000 * median(busy for _, busy in turns)),
            }
            for name, turns in saturated.items()
        },
        "server_rss_mb": server.memory_mb(),
    }


def _overhead(single: Sequence[tuple[float, Mapping[str, float]]], graph: float) -> dict[str, dict[str, float]]:
    """Medians in milliseconds: the requests ``single``, and their overhead over the bare ``graph``."""
    stages = {name: median(t.get(name, 0.0) for _, t in single) for name in single[0][1]}
    trip = median(ms for ms, _ in single)
    overhead = {
        "all": trip - graph,
        "HTTP": median(ms - sum(t.get(name, 0.0) for name in WORK) for ms, t in single),
        **{name: stages.get(name, 0.0) for name in WORK if name != "infer"},
        "infer beyond the bare graph": stages["infer"] - graph,
    }
    return {"round trip": {"all": trip, "bare graph": graph}, "server": stages, "overhead": overhead}


def _shares(name: str, parts: Mapping[str, float], took: float) -> dict[str, float]:
    """The time of the bare parts in sequence, as a part of the ``took`` milliseconds of a request, by batch size."""
    more = parts["decode"] + parts["preprocess"] if name.startswith("JPEG") else 0.0
    return {f"batch {batch}": (parts[f"graph, batch {batch}"] + more) / took for batch in BATCHES}


def posted(path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """The bytes of a request. HTTP clients of libraries take as long as the service, so this benchmark uses none."""
    lines = {"Host": "127.0.0.1", "Content-Length": len(body), **headers}
    head = [f"POST {path} HTTP/1.1", *[f"{name}: {value}" for name, value in lines.items()], "", ""]
    return "\r\n".join(head).encode() + body


def header(head: bytes, name: bytes) -> str:
    """The value of a header that an answer's ``head`` must have."""
    lines = (line.partition(b":") for line in head.split(b"\r\n"))
    return next(value.strip().decode() for key, _, value in lines if key.lower() == name)


async def saturate(server: "Server", connections: int, seconds: float, request: bytes) -> tuple[float, float]:
    """-> requests per second, and the server's processor seconds per request, with all connections busy."""
    end = done = 0.0

    async def ask() -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        while time.perf_counter() < end:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readexactly(int(header(head, b"content-length")))
            done += 1
        writer.close()

    start, busy = time.perf_counter(), server.busy()
    end = start + seconds
    await asyncio.gather(*[ask() for _ in range(connections)])
    return done / (time.perf_counter() - start), (server.busy() - busy) / done


def tensors(bare: "Bare") -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of a request with prepared pixels to the binary /v2."""
    name, shape = bare.ready["input"], bare.ready["shape"]
    pixels = np.random.default_rng(0).standard_normal(shape, np.float32).tobytes()
    tensor = {"name": name, "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": len(pixels)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return f"/v2/models/{bare.ready['bundle']}.image/infer", head + pixels, headers


class Server:
    """`calmclip serve` in a separate process, on ``core`` unless it is None."""

    def __init__(self, bundle: Path, threads: int, data: Path, core: int | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = (data / type(self).__name__).open("w")
        environment = {**os.environ, "CALMCLIP_DATA_DIR": str(data)}
        command = [sys.executable, "-m", *self.command(bundle, threads)]
        with on(core):
            self.process = subprocess.Popen(command, env=environment, stderr=self.log)

    def command(self, bundle: Path, threads: int) -> list[str]:
        command = ["calmclip.models.cli", "serve", "--bundles", str(bundle.parent), "--load", bundle.name]
        return [*command, "--port", str(self.port), "--threads", str(threads)]

    def __enter__(self) -> "Server":
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=30):
                    return self
            except OSError:  # it does not listen yet, or it answers 503
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        sys.exit(f"the server did not become ready; its log:\n{Path(self.log.name).read_text()}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.log.close()

    @contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield connection

    def repeat(self, request: bytes, seconds: float) -> list[tuple[float, dict[str, float]]]:
        """Send the request on one connection for ``seconds`` -> `timed` of each."""
        end, timings = time.perf_counter() + seconds, []
        with self.connected() as connection:
            while time.perf_counter() < end:
                timings.append(self.timed(connection, request))
        return timings

    def timed(self, connection: socket.socket, request: bytes) -> tuple[float, dict[str, float]]:
        """The client's milliseconds, and the server's milliseconds by stage."""
        start = time.perf_counter()
        connection.sendall(request)
        answer = body = b""
        length = 0
        while not answer or len(body) < length:
            answer += (more := connection.recv(1 << 16))
            assert more, "the service closed the connection"
            head, end, body = answer.partition(b"\r\n\r\n")
            length = int(header(head, b"content-length")) if end else sys.maxsize
        seconds = time.perf_counter() - start
        assert head.startswith(b"HTTP/1.1 200"), answer
        timing = (entry.split(";dur=") for entry in header(head, b"server-timing").split(", "))
        return seconds * 1000, {name: float(ms) for name, ms in timing}

    def busy(self, loop: bool = False) -> float:
        """Processor seconds so far, of all threads or, if ``loop``, of the event loop's thread, which handles HTTP."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob(f"{self.process.pid if loop else '*'}/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def memory_mb(self) -> int | None:
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return None
        return next(int(line.split()[1]) // 1024 for line in status.read_text().splitlines() if "VmRSS" in line)


class Uvicorn(Server):
    """uvicorn that only runs the graph in a thread."""

    def command(self, bundle: Path, threads: int) -> list[str]:
        return ["tests.bench.http_bare", str(bundle), str(self.port)]


class Bare:
    """A bundle's image graph, decoding and preprocessing in a separate process, without a service."""

    def __init__(self, bundle: Path, core: int) -> None:
        with on(core):
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.http_bare", str(bundle)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        self.requests, self.answers = pipes(self.process)
        self.ready: dict[str, Any] = json.loads(self.answers.readline())

    def __enter__(self) -> "Bare":
        return self

    def __exit__(self, *_: object) -> None:
        self.requests.close()
        self.process.wait(20)

    def turn(self, seconds: float) -> Any:
        """Part -> (clock, processor) milliseconds per item of each repetition."""
        print(seconds, file=self.requests, flush=True)
        return json.loads(self.answers.readline())


@contextmanager
def on(core: int | None) -> Iterator[None]:
    """Processes that start within this context run on ``core``, or on all cores of this process if it is None."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, mine if core is None else {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def vit_b_32(out: Path) -> Path:
    """A bundle of it, in ``out``; its random weights have no accuracy to keep."""
    bundle = out / "vit-b-32-int8"
    if not bundle.exists():
        recipe = out / "recipe.toml"
        out.mkdir(parents=True, exist_ok=True)
        recipe.write_text("[bars]\nmin_image_cosine = 0.0\nmin_text_cosine = 0.0\nmin_output_cosine = 0.0\n")
        checkpoint = out / "checkpoint"
        if not checkpoint.exists():
            _quietly("tests.bench.checkpoints", "ViT-B-32", str(checkpoint))
        more = ["--preset", "fast", "--recipe", str(recipe), "--name", "vit-b-32", "--out", str(out)]
        _quietly("calmclip.models.cli", "export", str(checkpoint), *more)
    return bundle


def _quietly(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.DEVNULL)


def default_picture() -> bytes:
    asset = Path(__file__).parents[2] / "export" / "samples" / "cat.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    image = Image.open(asset) if asset.exists() else Image.fromarray(noise)
    file = io.BytesIO()
    image.convert("RGB").resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def percentile(ordered: list[float], share: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)


def table(result: Mapping[str, Any]) -> str:
    def row(values: Mapping[str, float]) -> str:
        return "   ".join(f"{name} {ms:.2f}" for name, ms in values.items())

    def shares(values: Mapping[str, float]) -> str:
        return ", ".join(f"{share:.1%} of {name}" for name, share in values.items())

    lines = [
        f"{result['bundle']}   POST /v1/classify, {result['requests']} requests one after another, milliseconds",
        f"server on core {result['cores']['server']} with one thread, client on core {result['cores']['client']}; "
        f"picture {result['picture']}",
        f"bare        {row(result['bare_ms'])}",
        f"  by processor time  {row(result['bare_processor_ms'])}",
    ]
    for group in ("median", "quickest_tenth"):
        lines.append(f"{group.replace('_', ' ')}, by the clock")
        lines += [f"  {part:10s} {row(values)}" for part, values in result[group].items()]
    lines += [
        f"uvicorn with the graph in a thread and nothing else, overhead  {row(result['uvicorn_alone'])}",
        f"overhead by processor time  {row(result['processor_overhead_ms'])}",
        f"stages are {result['accounted']:.1%} of the total (median)",
    ]
    for name, rate in result["saturated"].items():
        lines.append(
            f"saturated   {name}: {rate['per_s']:.1f} a second, {shares(rate['share'])}; "
            f"by processor time {shares(rate['share_by_processor_time'])}"
        )
    return "\n".join([*lines, f"memory      {result['server_rss_mb']} MB resident"])


if __name__ == "__main__":
    sys.exit(main())
