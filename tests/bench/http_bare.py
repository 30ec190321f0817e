"""What `tests.bench.http` takes away: a bundle's image graph, decoding and preparing, each timed on its own.

    python -m tests.bench.http_bare BUNDLE

For each line of seconds on standard input it answers with a line of JSON: part -> [clock, processor] milliseconds of
every time it was done, of an item.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import numpy as np

from models.preprocess.image import decode
from models.runner import open_bundle
from tests.bench.http import BATCHES, default_picture


def main() -> None:
    runner = open_bundle(Path(sys.argv[1]), threads=1)
    session, preparer = runner.session("image"), runner.bundle.image("image")
    name, picture = preparer.spec.input, default_picture()
    pixels = preparer.prepare(decode(picture))[0]

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
    found: dict[str, list[tuple[float, float]]] = {part: [] for part in parts}
    end = perf_counter() + seconds
    while perf_counter() < end:
        for part, (items, do) in parts.items():
            start, busy = perf_counter(), process_time()
            do()
            clock, used = perf_counter() - start, process_time() - busy
            found[part].append((1000 * clock / items, 1000 * used / items))
    return found


if __name__ == "__main__":
    main()
