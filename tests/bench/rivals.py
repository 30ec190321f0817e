"""calmclip beside other engines that run these models on a CPU: same weights, inputs and machine, in one run.

    python -m tests.bench.rivals [--towers b32 text16 …] [--threads 1 2] [--batches 1 8] [--seconds 3] [--quick]
                                 [--out build/rivals] [--write-docs] [--report]

`tests.bench.rival_towers` prepares each tower once, which takes minutes; ``--out`` keeps the result. Then every engine
(`tests.bench.rival_engines`) gets its own process. The engines take turns, each round in another order, and figures
are medians. With one thread all engines stay on one core, and a figure is the processor time of the process, which
excludes other work on the machine. With more threads a figure is wall-clock time: measure those on a quiet machine.

``--out`` keeps the figures of each tower, so towers may be measured one at a time. Tables and chart show all kept
towers; ``--report`` writes them without measuring. ``--write-docs`` writes them into docs/performance.md, between its
two marks. ``--quick`` skips engines in float for towers over 10 GMAC.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calmclip.models.flow import Array
from tests.bench import rival_report
from tests.bench.alternate import machine, pipes
from tests.bench.rival_engines import PEAK, engines
from tests.bench.rival_towers import TOWERS

TURN = 0.3  # seconds of an engine's turn
LEAST = 3  # rounds
LARGE = 10e9  # multiply-accumulates
PACKAGES = ("openvino", "nncf", "torch", "transformers", "open_clip_torch", "faster-clip")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS), metavar="TOWER")
    options.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    options.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    options.add_argument("--seconds", type=float, default=3.0, help="for each engine at each batch")
    options.add_argument("--quick", action="store_true")
    options.add_argument("--out", type=Path, default=Path("build/rivals"))
    options.add_argument("--report", action="store_true", help="measure nothing")
    options.add_argument("--write-docs", action="store_true", help="into docs/performance.md and its chart")
    arguments = options.parse_args()
    for key in () if arguments.report else arguments.towers:
        _run("tests.bench.rival_towers", key, str(arguments.out))
        figures = measure(key, arguments)
        (arguments.out / key / "figures.json").write_text(json.dumps(figures))
        print(rival_report.table(figures), flush=True)
    files = [arguments.out / key / "figures.json" for key in TOWERS]
    towers = [json.loads(file.read_text()) for file in files if file.exists()]
    rival_report.write(towers, arguments.out, Path(__file__).parents[2] / "docs" if arguments.write_docs else None)


def measure(key: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a tower; `rival_report` says what they hold."""
    tower, folder = TOWERS[key], arguments.out / key
    about, reference = json.loads((folder / "about.json").read_text()), np.load(folder / "float.npy")
    available = engines(tower)
    slow = [n for n, engine in available.items() if arguments.quick and engine.slow and about["macs"] > LARGE]
    refused: dict[str, str] = dict.fromkeys(slow, "left out by --quick")
    rows: dict[str, dict[str, Any]] = {}
    peak = None
    for threads in arguments.threads:
        names = [name for name in (*available, PEAK) if name not in refused and (threads == 1 or name != PEAK)]
        sides = {name: Side(name, key, arguments.out, threads) for name in names}
        try:
            for name, side in [*sides.items()]:
                if reason := side.ready.get("refused"):
                    del sides[name]
                    refused[name] = reason
                elif name != PEAK and name not in rows:
                    vectors = np.array(side.ask(outputs=True)["outputs"])
                    rows[name] = {"ms": {}, "cosine": cosine(vectors, reference), "memory_mb": side.ready["memory_mb"]}
            for batch in arguments.batches:
                clock = "busy" if threads == 1 else "wall"
                for name, seconds in alternate(sides, batch, arguments.seconds, clock).items():
                    if name == PEAK:
                        peak = peak or sides[PEAK].ask(outputs=True)["outputs"][0][0] / seconds
                    else:
                        rows[name]["ms"][f"{threads}x{batch}"] = 1000 * seconds / batch
        finally:
            for side in sides.values():
                side.close()
    return {
        "key": key,
        "title": tower.title,
        "note": tower.note,
        "library": about["library"],
        "macs": about["macs"],
        "machine": machine(max(arguments.threads)),
        "versions": _versions(),
        "refused": refused,
        "engines": rows,
        "peak": peak,
    }


class Side:
    """An engine in its own process. ``ready`` is its first answer, after it has run once."""

    def __init__(self, engine: str, key: str, out: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        if engine != PEAK:
            environment |= engines(TOWERS[key])[engine].environment
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.rival_engines", engine, key, str(out), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.requests, self.answers = pipes(self.process)
        self.ready = self._answer() or {"refused": "its process ended before its first answer"}

    def ask(self, **request: Any) -> dict[str, Any]:
        print(json.dumps(request), file=self.requests, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        return json.loads(line) if line else {}

    def close(self) -> None:
        self.requests.close()
        self.process.wait(30)


def alternate(sides: Mapping[str, Side], batch: int, seconds: float, clock: str) -> dict[str, float]:
    """Median seconds of a call by engine. An engine with short calls spends the first call of each turn on warm-up."""
    names = list(sides)
    spent: dict[str, list[float]] = {name: [] for name in names}
    calls = {name: _turn(side.ask(batch=batch, calls=2)["wall"][-1]) for name, side in sides.items()}
    start, rounds = time.perf_counter(), 0
    while rounds < LEAST or time.perf_counter() - start < seconds * len(names):
        for place in range(len(names)):
            name = names[(place + rounds) % len(names)]
            time.sleep(0.01)  # threads of the engine before may still spin
            warm = calls[name] > 1
            spent[name] += sides[name].ask(batch=batch, calls=calls[name] + warm)[clock][warm:]
        rounds += 1
    return {name: float(np.median(times)) for name, times in spent.items()}


def _turn(took: float) -> int:
    return max(1, min(100, round(TURN / took)))


def cosine(vectors: Array, reference: Array) -> float:
    """The mean cosine of the rows of two matrices."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    return float(((vectors * reference).sum(axis=1) / lengths).mean())


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
