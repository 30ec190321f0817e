"""calmclip beside other engines that run these models on a CPU: same weights, same inputs, same machine, one run.

    python -m tests.bench.rivals [--towers b32 text16 …] [--threads 1 2] [--batches 1 8] [--seconds 3] [--quick]
                                 [--out build/rivals] [--write-readme] [--report]

Each tower is prepared once (`tests.bench.rival_towers`), which takes minutes and stays in ``--out``. Then every engine
(`tests.bench.rival_engines`) gets a process of its own, and they take turns, each round in another order; figures are
medians. With one thread all stay on one core and what counts is the processor time of the process, which does not see
who else is on the machine; with more it is time by the clock, which does: read those on a quiet machine.

Figures are kept in ``--out`` by tower, so towers may be measured one at a time; tables and chart are of all that are
there, ``--report`` makes them without measuring. ``--quick`` leaves engines in float out of towers over 10 GMAC.
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
from tests.bench.alternate import machine
from tests.bench.rival_engines import PEAK, engines
from tests.bench.rival_towers import TOWERS

TURN = 0.3  # seconds for which one engine works before the next has its turn
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
    options.add_argument("--write-readme", action="store_true", help="into README.md and docs/")
    given = options.parse_args()
    for key in () if given.report else given.towers:
        _run("tests.bench.rival_towers", key, str(given.out))
        found = measure(key, given)
        (given.out / key / "figures.json").write_text(json.dumps(found))
        print(rival_report.table(found), flush=True)
    kept = [given.out / key / "figures.json" for key in TOWERS]
    figures = [json.loads(file.read_text()) for file in kept if file.exists()]
    rival_report.write(figures, given.out, Path(__file__).parents[2] if given.write_readme else None)


def measure(key: str, given: argparse.Namespace) -> dict[str, Any]:
    """Everything that is said of a tower; see `rival_report`."""
    tower, folder = TOWERS[key], given.out / key
    about, whole = json.loads((folder / "about.json").read_text()), np.load(folder / "float.npy")
    there = engines(tower)
    late = [name for name, engine in there.items() if given.quick and engine.slow and about["macs"] > LARGE]
    found: dict[str, Any] = {
        "key": key,
        "title": tower.title,
        "note": tower.note,
        "library": about["library"],
        "macs": about["macs"],
        "machine": machine(max(given.threads)),
        "versions": _versions(),
        "refused": dict.fromkeys(late, "left out by --quick"),
        "engines": {},
        "peak": None,
    }
    for threads in given.threads:
        names = [name for name in (*there, PEAK) if name not in found["refused"] and (threads == 1 or name != PEAK)]
        sides = {name: Side(name, key, given.out, threads) for name in names}
        try:
            for name, side in [*sides.items()]:
                if why := side.ready.get("refused"):
                    del sides[name]
                    found["refused"][name] = why
                elif name != PEAK and name not in found["engines"]:
                    vectors = np.array(side.ask(outputs=True)["outputs"])
                    row = {"ms": {}, "cosine": cosine(vectors, whole), "memory_mb": side.ready["memory_mb"]}
                    found["engines"][name] = row
            for batch in given.batches:
                for name, seconds in alternate(sides, batch, given.seconds, "busy" if threads == 1 else "wall").items():
                    if name == PEAK:
                        found["peak"] = found["peak"] or sides[PEAK].ask(outputs=True)["outputs"][0][0] / seconds
                    else:
                        found["engines"][name]["ms"][f"{threads}x{batch}"] = 1000 * seconds / batch
        finally:
            for side in sides.values():
                side.close()
    return found


class Side:
    """An engine at work in a process of its own. ``ready``: what it said when it had run once."""

    def __init__(self, engine: str, key: str, out: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.rival_engines", engine, key, str(out), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.ready = self._answer() or {"refused": "its process ended before it had answered"}

    def ask(self, **what: Any) -> dict[str, Any]:
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def alternate(sides: Mapping[str, Side], batch: int, seconds: float, clock: str) -> dict[str, float]:
    """-> median seconds of a call. Each engine warms up with a call of every turn, where that is short."""
    names = list(sides)
    spent: dict[str, list[float]] = {name: [] for name in names}
    calls = {name: _turn(side.ask(batch=batch, calls=2)["wall"][-1]) for name, side in sides.items()}
    start, rounds = time.perf_counter(), 0
    while rounds < LEAST or time.perf_counter() - start < seconds * len(names):
        for place in range(len(names)):
            name = names[(place + rounds) % len(names)]
            time.sleep(0.01)  # the threads of the one before may still be spinning
            warm = calls[name] > 1
            spent[name] += sides[name].ask(batch=batch, calls=calls[name] + warm)[clock][warm:]
        rounds += 1
    return {name: float(np.median(times)) for name, times in spent.items()}


def _turn(took: float) -> int:
    return max(1, min(100, round(TURN / took)))


def cosine(found: Array, whole: Array) -> float:
    """Of the rows of two matrices, the mean."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(whole, axis=1)
    return float(((found * whole).sum(axis=1) / lengths).mean())


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
