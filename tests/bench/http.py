"""A JPEG in, labels out, over HTTP: what the service adds to the bare tower, where, and what it answers when saturated.

    python -m tests.bench.http [BUNDLE] [--rounds 5] [--seconds 2] [--connections 8 16] [--json]

Without BUNDLE: CLIP ViT-B/32 with random weights, exported with the quantizer `fast`, which takes minutes (``--out``
keeps it). The server has a core and a thread of its own, the client the other core; the bare graph, decoding and
preprocessing are timed by a third process on the server's core while the server has nothing to do. All take turns.

One request after another: the round trip, the server's stages out of `Server-Timing`, and what is left when the bare
graph is taken away. HTTP is all of that but decode, preprocess, queue, infer and postprocess. Beside it uvicorn with
the graph in a thread and nothing else, which is asked the same bytes: the least there is over this server. Saturated:
requests a second with so many connections, a JPEG each or prepared pixels by the binary /v2, as a share of what the
bare parts would do one after the other, of the graph at batch 1 and at batch 8. By the clock, and by processor time,
which does not see who else is on the machine; nor does the quickest tenth of the requests, much. Exit 1 when the stages
of the median request are less than 95 % of its total.
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
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image

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
    options.add_argument("--out", type=Path, help="where the bundle of ViT-B/32 is made, or lies since the last time")
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    server, client = (cores := sorted(os.sched_getaffinity(0)))[0], cores[-1]
    with tempfile.TemporaryDirectory() as scratch:
        bundle = given.bundle or vit_b_32(given.out or Path(scratch))
        os.sched_setaffinity(0, {client})
        with (
            Server(bundle, 1, Path(scratch), server) as running,
            Uvicorn(bundle, 1, Path(scratch), server) as least,
            Bare(bundle, server) as bare,
        ):
            result = measure(running, least, bare, given)
    result |= {"bundle": bundle.name, "cores": {"server": server, "client": client}}
    print(json.dumps(result) if given.json else table(result))
    return 0 if 0.95 <= result["accounted"] <= 1.001 else 1


def measure(server: "Server", least: "Server", bare: "Bare", given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds; requests a second. The turns' medians, of single requests the median of all."""
    picture = default_picture()
    loads = {"JPEG": (CLASSIFY, picture, {"Content-Type": "image/jpeg"}), "tensors": tensors(bare)}
    single: list[tuple[float, dict[str, float]]] = []
    without: list[tuple[float, dict[str, float]]] = []
    used: list[tuple[float, float]] = []
    parts: dict[str, list[tuple[float, float]]] = {}
    saturated: dict[str, list[tuple[float, float]]] = {}
    request = posted(*loads["JPEG"])
    for one in (server, least):
        one.asked(request, 0.5)
    for _ in range(given.rounds):
        for name, times in bare.turn(given.seconds).items():
            parts.setdefault(name, []).extend(times)
        busy = server.busy(), server.busy(loop=True)
        single += (turn := server.asked(request, given.seconds))
        used.append(((server.busy() - busy[0]) / len(turn), (server.busy(loop=True) - busy[1]) / len(turn)))
        without += least.asked(request, given.seconds)
        for kind, load in loads.items():
            for connections in given.connections:
                rate = asyncio.run(saturate(server, connections, given.seconds, posted(*load)))
                saturated.setdefault(f"{kind}, {connections} connections", []).append(rate)
    clock, processor = ({name: median(t[i] for t in times) for name, times in parts.items()} for i in (0, 1))
    graphs = sorted(ms for ms, _ in parts["graph, batch 1"])
    single.sort(key=lambda one: one[0])
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
            "all": 1000 * median(whole for whole, _ in used) - processor["graph, batch 1"],
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
    """Medians, in milliseconds, of some requests and of what each of them is more than the bare ``graph``."""
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
    """Of the bare parts' time, one after the other, in the milliseconds that a request took."""
    more = parts["decode"] + parts["preprocess"] if name.startswith("JPEG") else 0.0
    return {f"batch {batch}": (parts[f"graph, batch {batch}"] + more) / took for batch in BATCHES}


def posted(path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """The bytes of a request: clients of libraries take as long as the service for their part."""
    lines = {"Host": "127.0.0.1", "Content-Length": len(body), **headers}
    head = [f"POST {path} HTTP/1.1", *[f"{name}: {value}" for name, value in lines.items()], "", ""]
    return "\r\n".join(head).encode() + body


def header(head: bytes, name: bytes) -> str:
    """The value of a header that an answer's ``head`` has to have."""
    found = (line.partition(b":") for line in head.split(b"\r\n"))
    return next(value.strip().decode() for key, _, value in found if key.lower() == name)


async def saturate(server: "Server", connections: int, seconds: float, request: bytes) -> tuple[float, float]:
    """-> requests a second, and seconds of the server's processor time for each; every connection asks on and on."""
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
    """Path, body and headers of the binary /v2 for the picture as the graph takes it."""
    name, shape = bare.ready["input"], bare.ready["shape"]
    pixels = np.random.default_rng(0).standard_normal(shape, np.float32).tobytes()
    one = {"name": name, "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": len(pixels)}}
    asked = json.dumps({"inputs": [one], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(asked))}
    return f"/v2/models/{bare.ready['bundle']}.image/infer", asked + pixels, headers


class Server:
    """`calmclip serve` in a process of its own, on ``core`` where that is said."""

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
            except OSError:  # not there yet, or 503
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

    def asked(self, request: bytes, seconds: float) -> list[tuple[float, dict[str, float]]]:
        """Again and again on one connection -> `timed` of each."""
        end, found = time.perf_counter() + seconds, []
        with self.connected() as connection:
            while time.perf_counter() < end:
                found.append(self.timed(connection, request))
        return found

    def timed(self, connection: socket.socket, request: bytes) -> tuple[float, dict[str, float]]:
        """Client's milliseconds, and the server's by stage."""
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
        """Seconds of processor time so far, of all its threads or of the event loop's alone, which does all of HTTP."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob(f"{self.process.pid if loop else '*'}/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def memory_mb(self) -> int | None:
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return None
        return next(int(line.split()[1]) // 1024 for line in status.read_text().splitlines() if "VmRSS" in line)


class Uvicorn(Server):
    """uvicorn with the graph in a thread, and nothing else."""

    def command(self, bundle: Path, threads: int) -> list[str]:
        return ["tests.bench.http_bare", str(bundle), str(self.port)]


class Bare:
    """The image graph of a bundle without a service, decoding and preparing too, in a process of its own."""

    def __init__(self, bundle: Path, core: int) -> None:
        with on(core):
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.http_bare", str(bundle)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        self.ready = json.loads(self.process.stdout.readline())

    def __enter__(self) -> "Bare":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(20)

    def turn(self, seconds: float) -> dict[str, list[tuple[float, float]]]:
        """Part -> (clock, processor) milliseconds of each time it was done, an item."""
        print(seconds, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@contextmanager
def on(core: int | None) -> Iterator[None]:
    """A process that is started within has ``core`` to itself, or as many as this one."""
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
    for which in ("median", "quickest_tenth"):
        lines.append(f"{which.replace('_', ' ')}, by the clock")
        lines += [f"  {part:10s} {row(values)}" for part, values in result[which].items()]
    lines += [
        f"uvicorn with the graph in a thread and nothing else, overhead  {row(result['uvicorn_alone'])}",
        f"overhead by processor time  {row(result['processor_overhead_ms'])}",
        f"stages are {result['accounted']:.1%} of the total (median)",
    ]
    for name, one in result["saturated"].items():
        lines.append(
            f"saturated   {name}: {one['per_s']:.1f} a second, {shares(one['share'])}; "
            f"by processor time {shares(one['share_by_processor_time'])}"
        )
    return "\n".join([*lines, f"memory      {result['server_rss_mb']} MB resident"])


if __name__ == "__main__":
    sys.exit(main())
