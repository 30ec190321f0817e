"""Export at full size: time, memory, size, latency and accuracy.

    python -m tests.bench.full_size [NAME ...] [--out DIR]

The library that defines a checkpoint writes it with random weights (`tests.bench.checkpoints`). Then `calmclip export`
and `calmclip check` run on it, each in its own process, with the shipped pictures and texts. "peak" is the largest
resident set of the export. Random towers lose less in INT8 than trained ones, so cosines and the duration of the search
do not carry over. Latencies are of one picture and of one text, INT8 and float in turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from tests.bench.alternate import machine
from tests.bench.checkpoints import CHECKPOINTS

LIMIT = 8 * 2**30  # bytes; the largest resident set that an export may have


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKPOINTS)}; default: all")
    options.add_argument("--out", type=Path, help="folder for the bundles; default: they are deleted")
    arguments = options.parse_args()
    if unknown := [name for name in arguments.names if name not in CHECKPOINTS]:
        raise SystemExit(f"unknown checkpoint {', '.join(unknown)}; expected some of {', '.join(CHECKPOINTS)}")
    print(machine(os.cpu_count() or 1), end="\n\n")
    print("| checkpoint | export | processor time | peak | float → INT8 | INT8 coverage | image, INT8 / float | "
          "text | cosine, image / text | settings tried |")  # fmt: skip
    print("| --- " * 10 + "|")
    for name in arguments.names or CHECKPOINTS:
        with tempfile.TemporaryDirectory() as scratch:
            print(row(name, Path(scratch), arguments.out or Path(scratch) / "bundles"), flush=True)


def row(name: str, scratch: Path, out: Path) -> str:
    """A row of the table. Raises `SystemExit` if export or check fails or the export held more than `LIMIT` bytes."""
    checkpoint = scratch / name
    run(sys.executable, "-m", "tests.bench.checkpoints", name, str(checkpoint))
    exported = _calmclip("export", str(checkpoint), "--out", str(out), "--keep-float", "--replace", "--json")
    if exported.peak > LIMIT:
        raise SystemExit(
            f"{name}: the export held {exported.peak / 2**30:.2f} GiB; expected at most {LIMIT / 2**30:.0f}"
        )
    (bundle,) = [path for path in out.glob(f"{name.lower()}-*") if path.suffix != ".json" and "-float" not in path.name
                 and path.name.removeprefix(f"{name.lower()}-") in ("int8", "mixed")]  # fmt: skip
    _calmclip("check", bundle.name, "--bundles", str(out))
    report = json.loads((bundle / "report.json").read_text())
    sizes, graphs, latency = report["size_bytes"], report["graphs"], json.loads(exported.output)["latency_ms"]
    main_role = next(role for role in graphs if role != "text")
    cosines = " / ".join(
        f"{min(facts['cosine'] for facts in graphs[role]['int8_against_float'].values()):.4f}"
        for role in (main_role, "text")
    )
    times = [
        " / ".join(f"{latency[role][side]['p50']:.1f}" for side in ("int8", "float32")) + " ms"
        for role in (main_role, "text")
    ]
    tried = " / ".join(str(len(graphs[role]["search"]["candidates"])) for role in (main_role, "text"))
    cells = (
        bundle.name,
        f"{exported.wall:.0f} s",
        f"{exported.busy:.0f} s",
        f"{exported.peak / 2**30:.1f} GiB",
        f"{sizes['float32'] / 1e6:.0f} → {sizes['int8'] / 1e6:.0f} MB",
        f"{report['int8']['coverage']:.1%}",
        *times,
        cosines,
        tried,
    )
    return f"| {' | '.join(cells)} |"


class Ran:
    """Seconds from start to end, seconds of processor time, bytes of the largest resident set, standard output."""

    def __init__(self, wall: float, busy: float, peak: int, output: str) -> None:
        self.wall, self.busy, self.peak, self.output = wall, busy, peak, output


def _calmclip(*arguments: str) -> Ran:
    return run(sys.executable, "-m", "calmclip.models.cli", *arguments)


def run(*command: str) -> Ran:
    start = perf_counter()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdout=output, stderr=errors)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = perf_counter() - start
        for file in (output, errors):
            file.seek(0)
        printed = output.read().decode()
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{(printed + errors.read().decode())[-2000:]}")
    return Ran(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, printed)


if __name__ == "__main__":
    main()
