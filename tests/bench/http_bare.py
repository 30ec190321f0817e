"""The baselines of `tests.bench.http`: a bundle's image graph without the service.

    python -m tests.bench.http_bare BUNDLE         graph, decoding and preprocessing, each timed alone
    python -m tests.bench.http_bare BUNDLE PORT    the graph behind bare uvicorn

The first reads seconds from standard input, a number per line, and answers each with a line of JSON: part -> [clock,
processor] milliseconds per item of every repetition. The second reads each request's body, runs the graph on prepared
pixels in a thread, and answers with as many bytes as the service: the least overhead of any service on uvicorn.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import uvicorn
from starlette.types import Receive, Scope, Send

from calmclip.models.preprocess.image import decode
from calmclip.models.runner import open_bundle
from tests.bench.http import BATCHES, default_picture

ANSWER = b"{" + b" " * 700 + b"}"  # about as long as the service's answer with eight labels


def main() -> None:
    runner = open_bundle(Path(sys.argv[1]), threads=1)
    session, preparer = runner.session("image"), runner.bundle.image("image")
    name, picture = preparer.spec.input, default_picture()
    pixels = preparer.prepare(decode(picture))[0]

    if sys.argv[2:]:
        serve(int(sys.argv[2]), lambda: session.run({name: pixels}))
        return

    def graph(batch: int) -> Callable[[], object]:
        feeds = {name: np.repeat(pixels, batch, axis=0)}
        return lambda: session.run(feeds)

    parts: dict[str, tuple[int, Callable[[], object]]] = {f"graph, batch {n}": (n, graph(n)) for n in BATCHES}
    decoded = decode(picture)
    parts |= {"decode": (1, lambda: decode(picture)), "preprocess": (1, lambda: preparer.prepare(decoded))}
    for _, do in parts.values():
        do()
    print(json.dumps({"bundle": runner.bundle.name, "input": name, "shape": pixels.shape}), flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(parts, float(line))), flush=True)


def turn(parts: dict[str, tuple[int, Callable[[], object]]], seconds: float) -> dict[str, list[tuple[float, float]]]:
    times: dict[str, list[tuple[float, float]]] = {part: [] for part in parts}
    end = perf_counter() + seconds
    while perf_counter() < end:
        for part, (items, do) in parts.items():
            start, busy = perf_counter(), process_time()
            do()
            clock, used = perf_counter() - start, process_time() - busy
            times[part].append((1000 * clock / items, 1000 * used / items))
    return times


def serve(port: int, graph: Callable[[], object]) -> None:
    pool = ThreadPoolExecutor(1)

    def timed() -> float:
        start = perf_counter()
        graph()
        return perf_counter() - start

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while scope["method"] == "POST" and (await receive()).get("more_body"):
            pass
        start = perf_counter()
        seconds = await asyncio.get_running_loop().run_in_executor(pool, timed)
        thread = perf_counter() - start - seconds
        timing = f"queue;dur={thread * 1000:.3f}, infer;dur={seconds * 1000:.3f}".encode()
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
        await send({"type": "http.response.start", "status": 200, "headers": [*head, (b"server-timing", timing)]})
        await send({"type": "http.response.body", "body": ANSWER})

    uvicorn.run(app, port=port, http="httptools", lifespan="off", log_level="error", access_log=False)


if __name__ == "__main__":
    main()
