"""Export at full size: how long, how much memory, how large, how fast, how near to float.

    python -m tests.bench.full_size [NAME ...] [--out DIR]

Each checkpoint is written with random weights by the library that defines it (`tests.bench.checkpoints`), then
exported by `calmclip export` and looked at by `calmclip check`, each in a process of its own, with the pictures and
texts that ship. Peak is the most memory the export held (its largest resident set). Random towers are kinder to INT8
than trained ones, so cosines say little about those, and a search may take longer on those. Latencies are of one
picture, and of one text, INT8 and float in turn.
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

LIMIT = 8 * 2**30  # bytes an export may hold


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKPOINTS)}; default: all")
    options.add_argument("--out", type=Path, help="keep the bundles there")
    given = options.parse_args()
    if unknown := [name for name in given.names if name not in CHECKPOINTS]:
        raise SystemExit(f"{', '.join(unknown)}: no such checkpoint; there are {', '.join(CHECKPOINTS)}")
    print(machine(os.cpu_count() or 1), end="\n\n")
    print("| checkpoint | export | processor time | peak | float → INT8 | INT8 share | image, INT8 / float | "
          "text | cosine, image / text | settings tried |")  # fmt: skip
    print("| --- " * 10 + "|")
    for name in given.names or CHECKPOINTS:
        with tempfile.TemporaryDirectory() as scratch:
            print(row(name, Path(scratch), given.out or Path(scratch) / "bundles"), flush=True)


def row(name: str, scratch: Path, out: Path) -> str:
    """Raises `SystemExit` where the export or the check fails, or the export held more than `LIMIT`."""
    checkpoint = scratch / name
    _run(sys.executable, "-m", "tests.bench.checkpoints", name, str(checkpoint))
    exported = _calmclip("export", str(checkpoint), "--out", str(out), "--keep-float", "--replace")
    if exported.peak > LIMIT:
        raise SystemExit(f"{name}: the export held {exported.peak / 2**30:.2f} GiB; at most {LIMIT / 2**30:.0f}")
    (bundle,) = [path for path in out.glob(f"{name.lower()}-*") if path.suffix != ".json" and "-float" not in path.name
                 and path.name.removeprefix(f"{name.lower()}-") in ("int8", "mixed")]  # fmt: skip
    _calmclip("check", bundle.name, "--bundles", str(out))
    report = json.loads((bundle / "report.json").read_text())
    sizes, graphs = report["size_bytes"], report["graphs"]
    main_role = next(role for role in graphs if role != "text")
    cosines = " / ".join(
        f"{min(one['cosine'] for one in graphs[role]['int8_against_float'].values()):.4f}"
        for role in (main_role, "text")
    )
    times = [
        " / ".join(f"{report['latency_ms'][role][side]['p50']:.1f}" for side in ("int8", "float32")) + " ms"
        for role in (main_role, "text")
    ]
    tried = " / ".join(str(len(graphs[role]["search"]["candidates"])) for role in (main_role, "text"))
    cells = (
        bundle.name,
        f"{exported.wall:.0f} s",
        f"{exported.busy:.0f} s",
        f"{exported.peak / 2**30:.1f} GiB",
        f"{sizes['float32'] / 1e6:.0f} → {sizes['int8'] / 1e6:.0f} MB",
        f"{report['int8']['share']:.1%}",
        *times,
        cosines,
        tried,
    )
    return f"| {' | '.join(cells)} |"


class Ran:
    """Seconds from start to end, seconds of processor time, bytes of the largest resident set."""

    def __init__(self, wall: float, busy: float, peak: int) -> None:
        self.wall, self.busy, self.peak = wall, busy, peak


def _calmclip(*arguments: str) -> Ran:
    return _run(sys.executable, "-m", "calmclip.models.cli", *arguments)


def _run(*command: str) -> Ran:
    start = perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read().decode()[-2000:]}")
    return Ran(perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


if __name__ == "__main__":
    main()
