"""`calmclip index` into an empty store, beside the graph alone and beside the graph with what a picture needs.

    python -m tests.bench.index [BUNDLE] [--pictures DIR] [--count 256] [--rounds 5] [--cores 1 2] [--json]

Four sides take turns in one process, with one thread per graph, first on one core and then on two:

| side | includes |
| --- | --- |
| graph | runs of the graph `image` on pixels that lie in memory, with as many rows as the service merges |
| bare | the graph, and for each picture: its file is read, decoded and resized; in as many threads as cores |
| index | `calmclip index DIR` in this process: read, hash, decode, thumbnail, resize, graph, routes, commits |
| start | `calmclip index` of an empty folder: bundles and store are opened and closed |

`index` is given without `start`, which does not grow with the pictures. Rates are pictures a second of processor time,
which other load on the machine changes little, and by the clock, which it does. Without DIR, photographs of 640 x 480
are drawn. The last run's items are compared with the files: all are there.
"""

import argparse
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from statistics import median
from time import perf_counter, process_time
from typing import Any

BUNDLE = Path("models/bundles/mini-int8")
SIDES = ("graph", "bare", "index", "start")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path, nargs="?", default=BUNDLE)
    options.add_argument("--pictures", type=Path, metavar="DIR", help="JPEG files of a folder; default: drawn ones")
    options.add_argument("--count", type=int, default=256)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    options.add_argument("--only", choices=SIDES, help="for a profile of one side")
    options.add_argument("--json", action="store_true")
    options.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # a process of its own for each number
    arguments = options.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments)))
        return 0
    results = {}
    for cores in arguments.cores:
        command = [sys.executable, "-m", "tests.bench.index", *sys.argv[1:], "--here", "--cores", str(cores)]
        results[cores] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps(results) if arguments.json else "\n\n".join(map(table, results.values())))
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One number of cores: seconds of each side by the clock and of the processor, medians over the rounds."""
    (cores,) = arguments.cores
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    logging.disable(logging.INFO)  # the access log, which `calmclip index` does not set up either
    with tempfile.TemporaryDirectory() as scratch:
        sides = Sides(arguments.bundle, Path(scratch), folder_of(arguments, Path(scratch) / "pictures"), cores)
        spent: dict[str, list[tuple[float, float]]] = {}
        names = [arguments.only] if arguments.only else SIDES
        for round_ in range(-1, arguments.rounds):
            for place in range(len(names)):
                name = names[(place + round_) % len(names)]
                sides.clear()
                start = perf_counter(), process_time()
                getattr(sides, name)()
                if round_ >= 0:
                    spent.setdefault(name, []).append((perf_counter() - start[0], process_time() - start[1]))
        wall, busy = ({name: median(turn[i] for turn in turns) for name, turns in spent.items()} for i in (0, 1))
        for times in (wall, busy):
            if "start" in times and "index" in times:
                times["index"] -= times["start"]
        return {
            "machine": sides.machine, "cores": cores, "pictures": len(sides.files), "size": sides.size,
            "rows": sides.rows, "rounds": arguments.rounds, "wall_s": wall, "processor_s": busy,
        }  # fmt: skip


def folder_of(arguments: argparse.Namespace, folder: Path) -> Path:
    """A folder with ``count`` different files."""
    folder.mkdir()
    files = sorted(arguments.pictures.rglob("*.jp*g")) if arguments.pictures else []
    if arguments.pictures and not files:
        raise SystemExit(f"{arguments.pictures} has no JPEG file")
    for number in range(arguments.count):
        target = folder / f"{number:05}.jpg"
        target.write_bytes(files[number % len(files)].read_bytes() if files else _drawn(number))
    return folder


def _drawn(number: int) -> bytes:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.int16) + random.integers(-12, 13, (480, 640, 3), np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


class Sides:
    def __init__(self, bundle: Path, scratch: Path, folder: Path, cores: int) -> None:
        from PIL import Image

        from calmclip.models.runner import open_bundle
        from calmclip.service.settings import Settings
        from tests.bench.alternate import machine

        self.files = sorted(folder.iterdir())
        self.folder, self.cores, self.scratch = folder, cores, scratch
        self.empty = scratch / "empty"
        self.empty.mkdir()
        self.settings = Settings(
            bundles_dir=bundle.resolve().parent, load=(bundle.name,), threads=1, data_dir=scratch / "data",
            deadline_ms=600_000,
        )  # fmt: skip
        self.runner = open_bundle(bundle, threads=1)
        self.preparer = self.runner.bundle.image()
        self.session = self.runner.session("image")
        self.machine = machine(1)
        first = self.pixels(self.files[0])
        batch = self.settings.batch
        self.rows = max(1, min(batch.max_size, batch.max_bytes // first.nbytes))
        self.size = Image.open(self.files[0]).size
        self.memory = [self.pixels(path) for path in self.files[: 4 * self.rows]]

    def clear(self) -> None:
        rmtree(self.scratch / "data", ignore_errors=True)

    def pixels(self, path: Path) -> Any:
        from calmclip.models.preprocess.image import decode

        return self.preparer.prepare(decode(path.read_bytes()))[0]

    def run(self, rows: list[Any]) -> None:
        import numpy as np

        self.session.run({self.preparer.spec.input: np.concatenate(rows)})

    def _starts(self) -> range:
        return range(0, len(self.files), self.rows)

    def graph(self) -> None:
        for start in self._starts():
            at = start % len(self.memory)
            self.run(self.memory[at : at + min(self.rows, len(self.files) - start)])

    def bare(self) -> None:
        def work(start: int) -> None:
            self.run([self.pixels(path) for path in self.files[start : start + self.rows]])

        if self.cores == 1:
            for start in self._starts():
                work(start)
            return
        with ThreadPoolExecutor(self.cores) as pool:
            list(pool.map(work, self._starts()))

    def index(self) -> None:
        result = self._index(self.folder)
        assert (result["added"], result["items"], result["broken"]) == (len(self.files), len(self.files), []), result

    def start(self) -> None:
        self._index(self.empty)

    def _index(self, folder: Path) -> dict[str, Any]:
        from calmclip.service.indexing import index

        return index(folder, "bench", settings=self.settings)


def table(result: dict[str, Any]) -> str:
    count = result["pictures"]
    lines = [
        f"{result['machine']}; {result['cores']} core(s), {count} pictures of {result['size']}, {result['rows']} rows "
        f"a run, median of {result['rounds']} rounds",
        f"{'side':8s} {'processor':>10s} {'pictures/s':>11s} {'of graph':>9s} {'of bare':>8s} {'clock':>8s} "
        f"{'pictures/s':>11s} {'of graph':>9s} {'of bare':>8s}",
    ]
    for name in result["wall_s"]:
        cells = f"{name:8s}"
        for times in (result["processor_s"], result["wall_s"]):
            cells += f" {times[name]:9.2f}s {count / times[name]:11.1f}"
            cells += "".join(f" {times[o] / times[name]:9.3f}" if o in times and name != "start" else "         -"
                             for o in ("graph", "bare"))  # fmt: skip
        lines.append(cells)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
