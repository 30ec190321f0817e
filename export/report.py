"""Measure a finished bundle, float beside INT8 -> report.json, and what belongs to the run that made it.

A report is sealed, so it holds what two exports of one checkpoint have in common; dates, times and the machine are in
`timings`. Both sides are opened with `models.runner`, the code that serves. Figures of single graphs (coverage, ranges,
outliers, the loss of each product) are of the graphs before the rewrites put our ops in.
"""

import gc
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import onnx

from calmclip.export import layers, outliers
from calmclip.export.calibrate import Text
from calmclip.export.coverage import Coverage, count, coverage
from calmclip.export.quantizers import Settled
from calmclip.export.recipe import Bars, Quantize
from calmclip.models.errors import BarMissed
from calmclip.models.evals import measure as evaluate
from calmclip.models.flow import Array, Arrays
from calmclip.models.measure import latency, machine
from calmclip.models.runner import Runner
from calmclip.models.runtime import heap

COVERAGE, SIZE = 0.9, 0.35  # for the name int8: least INT8 coverage, largest part of the float size
COSINE, WORST = 0.99, 0.95  # and of each output on the certificate's inputs: least mean cosine, least of a row
Precision = Literal["int8", "mixed", "float"]
_GROWTH = 100_000_000  # bytes that a step adds to the process before it is worth looking for free memory


def measure(quantized: Runner, reference: Runner, pictures: Sequence[Path], texts: Sequence[Text]) -> dict[str, Any]:
    """Cosine of embeddings and size of ``quantized`` beside ``reference`` (float)."""
    both, graphs = (quantized, reference), quantized.bundle.manifest.graphs
    embeddings: dict[str, Any] = {}
    if "embed" in quantized.bundle.manifest.tasks:
        words = "vectors" if quantized.bundle.reads_vectors else "texts"
        inputs: tuple[tuple[str, str, Any], ...] = (("image", "images", pictures), ("text", words, texts))
        for role, kind, rows in inputs:
            if role in graphs:
                embeddings[role] = _agreement([runner.embed(**{kind: rows}) for runner in both], len(rows))
    return {"embeddings": embeddings, "size_bytes": {"int8": _size(quantized), "float32": _size(reference)}}


def timings(quantized: Runner, reference: Runner, picture: Path, rounds: int = 20) -> dict[str, Any]:
    """Latency of ``quantized`` beside ``reference`` (float), measured in turn, and this machine."""
    timed = latency((quantized, reference), picture.read_bytes(), rounds)
    return {
        "machine": machine(quantized.options.threads),
        "latency_ms": {role: {"int8": pair[0], "float32": pair[1]} for role, pair in timed.items()},
        "slower_than_float": [role for role, pair in timed.items() if pair[0]["p50"] > pair[1]["p50"]],
    }


def graph(
    model: onnx.ModelProto,
    quantized: onnx.ModelProto,
    feeds: Sequence[Arrays],
    outlier_feeds: Iterable[Arrays],
    dims: Mapping[str, int],
    how: Quantize,
    settled: Settled,
) -> dict[str, Any]:
    """Of one graph: INT8 coverage at ``dims``, settings, the products in float and why, the loss of each product (on
    ``feeds``), outliers (on ``outlier_feeds``, one row each), and the range of each 8-bit tensor."""
    total = coverage(count(quantized, dims))
    params = settled.written()
    fitted = {key: len(params.pop(key)) for key in ("clips", "shifts") if key in params}
    return {
        "coverage": {"macs": total.macs, "int8": total.int8, "part": round(total.part, 5), "counted_at": dict(dims)},
        "settled": {"quantizer": settled.quantizer, "params": params, "fitted": fitted},
        "search": dict(settled.history),
        "in_float": layers.in_float(model, quantized, dims, how.params.get("keep", ())),
        "compared_on": f"{len(feeds)} inputs of the certificate",
        **layers.compare(model, quantized, feeds, dims),
        "outliers": outliers.measure(model, outlier_feeds),
        "ranges": layers.ranges(quantized),
    }


def int8(graphs: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Of a whole bundle: the INT8 coverage of its towers, one input each, and its size as a part of the float size. A
    graph that borrows its weights does not count: it computes in float, and answers no task but explain."""
    counted = [facts["coverage"] for facts in graphs.values() if "coverage" in facts]
    total = Coverage(*(sum(facts[key] for facts in counted) for key in ("macs", "int8")))
    ratio = sizes["int8"] / sizes["float32"]
    return {"coverage": round(total.part, 5), "macs": total.macs, "size_ratio": round(ratio, 5)}


def precision(report: Mapping[str, Any]) -> Precision:
    """The precision that a bundle's name and manifest state: ``float`` if no product is in INT8, ``int8`` if the bundle
    has no `shortfalls`, else ``mixed``."""
    if not report["int8"]["coverage"]:
        return "float"
    return "mixed" if shortfalls(report) else "int8"


def shortfalls(report: Mapping[str, Any]) -> list[str]:
    """What keeps a bundle from the name int8, in words: the value, and what was expected."""
    int8, cosines = report["int8"], []
    for role, facts in report["graphs"].items():
        for output, numbers in facts["int8_against_float"].items():
            cosines.append((f"{role}.{output}", numbers["cosine"], numbers["cosine_min"]))
    for role, numbers in report["embeddings"].items():
        cosines.append((f"{role} vectors", numbers["cosine_mean"], numbers["cosine_min"]))
    limits = [
        (
            int8["coverage"] >= COVERAGE,
            f"{int8['coverage']:.1%} of the multiply-accumulates are in INT8, not {COVERAGE:.0%}",
        ),
        (int8["size_ratio"] <= SIZE, f"its size is {int8['size_ratio']:.3f} of float, not at most {SIZE}"),
        *((mean >= COSINE, f"the mean cosine of {name} is {mean:.4f}, not {COSINE}") for name, mean, _ in cosines),
        *((worst >= WORST, f"the worst cosine of {name} is {worst:.4f}, not {WORST}") for name, _, worst in cosines),
    ]
    return [words for holds, words in limits if not holds]


def accuracy(quantized: Runner, reference: Runner, evals: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Every eval that the recipe names, on its data: eval -> {"int8": figures, "float32": figures}."""
    sides = {"int8": quantized, "float32": reference}
    figures = {}
    for name, directory in evals.items():
        data = evaluate.read(name, directory)
        figures[name] = {side: evaluate.named(evaluate.predict(name, runner, data)) for side, runner in sides.items()}
    return figures


def text(figures: Mapping[str, Any]) -> str:
    """The text of report.json, with a list of numbers on one line."""
    indented = json.dumps(figures, indent=2) + "\n"
    return re.sub(r"\[\s+[-\d.e+]+(?:,\s+[-\d.e+]+)*\s+\]", lambda numbers: " ".join(numbers[0].split()), indented)


def check(report: Mapping[str, Any], bars: Bars) -> dict[str, dict[str, float | bool]]:
    """Bar -> its limit, the measured number, and whether it passed."""
    rows: dict[str, tuple[float, float, bool]] = {}
    for role, bar in (("image", bars.min_image_cosine), ("text", bars.min_text_cosine)):
        if role in report["embeddings"]:
            value = report["embeddings"][role]["cosine_mean"]
            rows[f"min_{role}_cosine"] = (bar, value, value >= bar)
    for role, facts in report["graphs"].items():
        for output, numbers in facts["int8_against_float"].items():
            value, bar = numbers["cosine"], bars.cosine(role)
            rows[f"{role}.{output}"] = (bar, value, value >= bar)
    int8 = {"min_int8_coverage": ("int8", "coverage", 1), "max_size_ratio": ("int8", "size_ratio", 1)}
    for name, (table, key, unit) in (int8 | {"max_megabytes": ("size_bytes", "int8", 1e6)}).items():
        if (limit := getattr(bars, name)) is not None:
            value = report[table][key] / unit
            rows[name] = (limit, value, value >= limit if name.startswith("min") else value <= limit)
    return {name: {"bar": bar, "measured": round(value, 5), "passed": ok} for name, (bar, value, ok) in rows.items()}


def require(
    bars: Mapping[str, Mapping[str, float | bool]], name: str, graphs: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Raises `BarMissed` with every bar that did not pass, and the best result of each search for settings."""
    missed = [f"{key} is {row['measured']}, the bar {row['bar']}" for key, row in bars.items() if not row["passed"]]
    if missed:
        searches = {role: facts["search"] for role, facts in (graphs or {}).items() if facts.get("search")}
        best = [
            f"{role}: the best of {len(search['candidates'])} settings tried reached the cosine {search['cosine']}"
            for role, search in searches.items()
            if not search["reached"]
        ]
        raise BarMissed(
            f"{name} was not sealed: {'; '.join([*missed, *best])}. More or better calibration pictures (--images), "
            f"another quantizer in the recipe, or another bar may help."
        )


class Steps:
    """Seconds of each step of an export: ``with steps("image: trace"): …``. `trim` follows a step that adds much memory
    to the process; it takes longer than a step of a small net."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, before = perf_counter(), _resident()
        yield
        self.seconds[name] = round(perf_counter() - start, 2)
        if _resident() - before >= _GROWTH:
            trim()


def trim() -> None:
    """Return freed memory to the system: glibc keeps it in pieces that are too small for the next large graph."""
    gc.collect()
    heap.trim()


def _resident() -> int:
    """Resident bytes of this process; 0 if the system does not say, and then nothing is trimmed."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def peak_rss_mb() -> float | None:
    """Peak resident memory of this process, in 10^6 bytes; None if the system does not say (Windows).

    Linux counts the memory of the parent as ``ru_maxrss`` of a process that it started, so ``VmHWM`` comes first.
    """
    with suppress(OSError, IndexError):
        return round(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6, 1)
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def _agreement(vectors: Sequence[Array], count: int) -> dict[str, float]:
    cosines = np.sum(vectors[0].astype(np.float64) * vectors[1], axis=1)
    return {
        "cosine_mean": round(float(cosines.mean()), 5),
        "cosine_min": round(float(cosines.min()), 5),
        "inputs": count,
    }


def _size(runner: Runner) -> int:
    return sum(file.bytes for file in runner.bundle.manifest.files.values())
