"""Many short texts and a long one in one call, against the sum of both alone: `Runner`, and the service over HTTP.

    python -m tests.bench.texts [BUNDLE] [--threads 1] [--rounds 5]

BUNDLE is `models/bundles/mini-int8` by default. A case is `embed` with 127 texts of 1 to 4 words and one of 200, or
`classify` with 255 labels of 1 to 4 words and one of 100, with the bundle's templates; the classify sides also embed
one picture each. The three sides take turns. Every session is warm, and no text is cached: a `Runner` gets a new cache
for each call, the server has none. Times are by the clock and by processor time of all threads of the process that
computes, which excludes other load; the ratio of medians is printed for both. The service checks its deadline, so a
request that takes longer than 10 s fails here.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from calmclip.models.cache import RowCache
from calmclip.models.runner import CACHED_ROWS, Runner, open_bundle
from tests.bench.alternate import machine
from tests.bench.http import Server, default_picture, posted

WORDS = [
    "red",
    "blue",
    "green",
    "table",
    "chair",
    "dog",
    "cat",
    "house",
    "tree",
    "river",
    "mountain",
    "cloud",
    "garden",
    "window",
    "street",
    "bottle",
]
SIDES = ("short", "long", "together")
Ask = Callable[[Sequence[str]], object]


def texts(short: int, words: int) -> dict[str, list[str]]:
    """``short`` different texts of 1 to 4 words, and one of ``words``."""
    draw = np.random.default_rng(0)
    few = [" ".join([*draw.choice(WORDS, draw.integers(0, 4)), f"thing{i}"]) for i in range(short)]
    many = [" ".join(draw.choice(WORDS, words))]
    return {"short": few, "long": many, "together": [*few[: short // 2], *many, *few[short // 2 :]]}


def measured(ask: Ask, sides: dict[str, list[str]], rounds: int, busy: Callable[[], float]) -> dict[str, list[float]]:
    """Side -> medians of seconds by the clock and of processor seconds."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for turn in range(-1, rounds):
        for place in range(len(SIDES)):
            name = SIDES[(turn + place) % len(SIDES)]
            start, before = time.perf_counter(), busy()
            ask(sides[name])
            if turn >= 0:
                spent[name].append((time.perf_counter() - start, busy() - before))
    return {name: [median(column) for column in zip(*times, strict=True)] for name, times in spent.items()}


def show(where: str, medians: dict[str, list[float]]) -> None:
    for clock, title in enumerate(("clock", "processor")):
        short, long, together = (medians[name][clock] for name in SIDES)
        print(
            f"{where:36s} {title:9s}  short {short:.3f} s   long {long:.3f} s   together {together:.3f} s   "
            f"together / (short + long) = {together / (short + long):.2f}",
            flush=True,
        )


def of_runner(runner: Runner, picture: bytes) -> dict[str, Ask]:
    def cold() -> Runner:
        runner.cache = RowCache(CACHED_ROWS)
        return runner

    return {
        "embed": lambda sentences: cold().embed(texts=sentences),
        "classify": lambda labels: cold().classify(picture, labels),
    }


def of_server(server: Server, picture: bytes) -> dict[str, Ask]:
    def send(path: str, headers: dict[str, str], body: bytes) -> None:
        with server.connected() as connection:
            server.timed(connection, posted(path, body, headers))

    def form(labels: Sequence[str]) -> tuple[dict[str, str], bytes]:
        parts = [f'--x\r\nContent-Disposition: form-data; name="labels"\r\n\r\n{label}\r\n' for label in labels]
        file = '--x\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        return {"Content-Type": "multipart/form-data; boundary=x"}, (
            "".join(parts).encode() + file.encode() + picture + b"\r\n--x--\r\n"
        )

    def embed(sentences: Sequence[str]) -> None:
        body = json.dumps({"inputs": [{"text": text} for text in sentences]}).encode()
        send("/v1/embed", {"Content-Type": "application/json"}, body)

    return {"embed": embed, "classify": lambda labels: send("/v1/classify", *form(labels))}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path, nargs="?", default=Path("models/bundles/mini-int8"))
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    picture, threads = default_picture(), arguments.threads
    cases = {"embed": (127, 200), "classify": (255, 100)}
    print(f"{arguments.bundle.name}: {machine(threads)}")
    os.environ["CALMCLIP_TEXT_CACHE"] = "0"
    with tempfile.TemporaryDirectory() as scratch, Server(arguments.bundle, threads, Path(scratch)) as server:
        runner = open_bundle(arguments.bundle, threads=threads)
        ways = {
            "Runner": (of_runner(runner, picture), time.process_time),
            "HTTP": (of_server(server, picture), server.busy),
        }
        for way, (asks, busy) in ways.items():
            for task, (short, words) in cases.items():
                medians = measured(asks[task], texts(short, words), arguments.rounds, busy)
                show(f"{way}, {task}, {short} short + {words} words", medians)


if __name__ == "__main__":
    main()
