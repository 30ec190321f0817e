"""Every bench of an operator, in the order of the table; what the benches share.

    python -m tests.bench.ops [--threads 1] [--quick]

A bench is a file `ops_*.py` here. Its `OPS` names the operators that it measures; the options above go to each.
"""

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from calmclip.models.ops import table
from calmclip.models.ops.library import Library, find, mask, why_not


def benches() -> list[str]:
    """The modules, each once. Raises LookupError if no bench measures an operator of the table."""
    names = [f"tests.bench.{file.stem}" for file in sorted(Path(__file__).parent.glob("ops_*.py"))]
    by_op = {op.name: name for name in names for op in import_module(name).OPS}
    if missing := [op.name for op in table.OPS if op.name not in by_op]:
        raise LookupError(f"no bench measures {', '.join(missing)}; expected it in the OPS of a file ops_*.py")
    return list(dict.fromkeys(by_op[op.name] for op in table.OPS))


def options(doc: str | None, seconds: float, quick: str) -> argparse.ArgumentParser:
    """The options of a bench: threads, seconds for each line, and ``quick`` (its help text)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=seconds, help="for each line")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--without", type=lambda text: mask(text.split(",")), help="instruction sets that do not run: avx512,vnni,vbmi"
    )
    return parser


def library() -> Library:
    """The op library; ends the program if there is none."""
    if (built := find()) is None:
        raise SystemExit(f"{why_not()}; 'calmclip ops build' makes one")
    return built


if __name__ == "__main__":
    for module in benches():
        print(f"\n== {module}", flush=True)
        subprocess.run([sys.executable, "-m", module, *sys.argv[1:]], check=True)
