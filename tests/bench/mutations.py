"""Do the fast tests notice a fault? Puts faults into a copy of the code, one at a time: `make mutations`.

    python -m tests.bench.mutations [--seed 20] [--count 60] [--only ID …] [--minutes 60] [--out build/mutations]

First each test file runs once under coverage: what it executes, and how long it takes. Then a fault is tried against
the test files that execute its statement: those named after its module, those that import it, then the others; quick
files first, up to the first failure or EACH seconds. A test that does not end counts as a failure. The parts stand in
`mutation_places` (what is drawn) and `mutation_trials` (how a file runs).

A run that was stopped goes on where it was: results lie in OUT/results.jsonl, by a fault's text. `--only` tries faults
again. A fault in equivalent_mutations.toml changes nothing that a caller can notice; it is neither tried nor counted.
The exit status is 1 if fewer than 90 % of the faults were noticed, or if the time was too short for all.
"""

import argparse
import ast
import json
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

from tests.bench.mutation_places import Place, draw, reaching_lines
from tests.bench.mutation_trials import ROOT, Trace, Tree, digest, traces

BAR = 0.9
EACH = 300  # seconds after which a fault has survived
BATCH = 20  # seconds of quick test files that share a process
EQUIVALENTS = Path(__file__).with_name("equivalent_mutations.toml")


@dataclass(frozen=True)
class Result:
    """How one fault ended: killed, timed out, or survived."""

    id: str
    outcome: str
    by: str  # the test that failed, and its error; of a survivor the number of test files that ran
    seconds: float


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seed", type=int, default=20)
    arguments.add_argument("--count", type=int, default=60)
    arguments.add_argument("--only", nargs="+", default=[], metavar="ID")
    arguments.add_argument("--minutes", type=float, default=60)
    arguments.add_argument("--out", type=Path, default=ROOT / "build" / "mutations")
    options = arguments.parse_args()
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    tree = Tree(options.out.resolve())
    places = draw(tree.root, options.seed, options.count)
    if unknown := {*options.only} - {place.id for place in places}:
        arguments.error(f"seed {options.seed} with {options.count} faults has no fault {', '.join(sorted(unknown))}")
    places = [place for place in places if place.id in options.only or not options.only]
    equivalents = tomllib.loads(EQUIVALENTS.read_text())
    store = options.out / "results.jsonl"
    results = {result.id: result for result in _results(store) if result.id not in options.only}
    left = [place for place in places if place.id not in results and place.id not in equivalents]
    if left:
        traced = traces(tree, options.out / "traces.jsonl", tree.test_files())
    for place in left:
        if time.monotonic() > end:
            break
        results[place.id] = attempt(tree, place, order(tree.root, place, traced.values()))
        with store.open("a") as lines:
            lines.write(json.dumps(asdict(results[place.id])) + "\n")
        print(line(place, results[place.id]), flush=True)
    return report(places, results, equivalents)


def _results(store: Path) -> Iterator[Result]:
    if store.exists():
        yield from (Result(**json.loads(text)) for text in store.open())


def order(root: Path, place: Place, traced: Iterable[Trace]) -> list[Trace]:
    """The test files that can notice the fault, the likeliest first.

    If none is seen to execute the statement, those near the module: a server that a test kills leaves no trace.
    """
    text = (root / place.file).read_text()
    passed = [trace for trace in traced if trace.passed and place.file in trace.lines and (root / trace.file).exists()]
    distances = {trace.file: _distance(root, trace.file, place.file) for trace in passed}
    chosen = [trace for trace in passed if distances[trace.file] < 2]
    for lines in reversed(reaching_lines(text, place.line)):
        chosen = [trace for trace in passed if _reaches(root, trace, place.file, {*lines})] or chosen
    return sorted(chosen, key=lambda trace: (distances[trace.file], trace.seconds))


def _reaches(root: Path, trace: Trace, file: str, lines: set[int]) -> bool:
    if trace.sources.get(file) == digest(root / file):
        return not lines.isdisjoint(trace.lines[file])
    return True  # the source changed since, so its lines have moved


def _distance(root: Path, test: str, file: str) -> int:
    """0 if the test file is named after the module or its package, 1 if it imports it, otherwise 2."""
    module = PurePath(file).with_suffix("")
    names = [part.strip("_") for part in module.parts[1:] if part != "__init__"]
    if any(PurePath(test).stem.startswith(f"test_{name}") for name in names[-1:]):
        return 0
    dotted = ".".join(("calmclip", *(part for part in module.parts if part != "__init__")))
    return 1 if dotted in _imports((root / test).read_text()) else 2


def _imports(text: str) -> set[str]:
    """Every module and name that a file imports, dotted."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def attempt(tree: Tree, place: Place, files: list[Trace]) -> Result:
    start, ran = time.monotonic(), 0
    path = tree.root / place.file
    clean = path.read_text()
    path.write_text(place.source(tree.root))
    try:
        for batch in _batches(files):
            status = tree.run([trace.file for trace in batch], limit=60 + 10 * sum(trace.seconds for trace in batch))
            ran += len(batch)
            seconds = round(time.monotonic() - start, 1)
            if status is None:
                return Result(place.id, "timed out", " ".join(trace.file for trace in batch), seconds)
            if status:
                return Result(place.id, "killed", tree.failure(), seconds)
            if seconds > EACH:
                break
    finally:
        path.write_text(clean)
    return Result(place.id, "survived", f"{ran} of {len(files)} test files", round(time.monotonic() - start, 1))


def _batches(files: list[Trace]) -> Iterator[list[Trace]]:
    """The first file alone; then as many as take BATCH seconds together."""
    batch: list[Trace] = []
    for trace in files:
        if batch and (batch == files[:1] or sum(other.seconds for other in [*batch, trace]) > BATCH):
            yield batch
            batch = []
        batch.append(trace)
    if batch:
        yield batch


def line(place: Place, result: Result | None, reason: str = "") -> str:
    outcome = f"{result.outcome}, {result.by} ({result.seconds} s)" if result else reason or "not tried"
    return f"{place.id}  {place.file}:{place.line}  {place.where}\n  - {place.before}\n  + {place.after}\n  {outcome}"


def report(places: list[Place], results: dict[str, Result], equivalents: dict[str, dict[str, str]]) -> int:
    counted = [place for place in places if place.id not in equivalents]
    tried = [results[place.id] for place in counted if place.id in results]
    noticed = sum(result.outcome != "survived" for result in tried)
    print()
    for place in places:
        reason = f"equivalent: {equivalents[place.id]['reason']}" if place.id in equivalents else ""
        print(line(place, None if reason else results.get(place.id), reason))
    score = noticed / len(tried) if tried else 1.0
    rest = f"bar {BAR:.0%}; {len(places) - len(counted)} equivalent; {len(counted) - len(tried)} not tried"
    print(f"\n{noticed} of {len(tried)} faults noticed, {score:.1%}; {rest}")
    return int(score < BAR or len(tried) < len(counted))


if __name__ == "__main__":
    sys.exit(main())
