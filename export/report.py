"""What was measured of a finished bundle, float and INT8 side by side -> report.json.

Both sides are opened with `models.runner`, the code that serves, so a number here is about what is served. What is said
of single graphs (shares, ranges, outliers, what each product loses) is of the graphs before our ops go in.
"""

import ctypes
import gc
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import onnx

from calmclip.export import layers, outliers
from calmclip.export.quantizers import Settled
from calmclip.export.recipe import Bars, Quantize
from calmclip.export.share import count, share
from calmclip.models.errors import BarMissed
from calmclip.models.evals import measure as evaluate
from calmclip.models.flow import Arrays
from calmclip.models.measure import latency, machine
from calmclip.models.runner import Runner

_MUCH = 100_000_000  # bytes that a step made the process grow by, for which it pays to look for what is free again


def measure(
    quantized: Runner, reference: Runner, pictures: Sequence[Path], texts: Sequence[str], *, rounds: int = 20
) -> dict[str, Any]:
    """Cosine of embeddings, size and latency of ``quantized`` beside ``reference`` (float)."""
    both = (quantized, reference)
    embeddings: dict[str, Any] = {}
    if "embed" in quantized.bundle.manifest.tasks:
        for role, kind, shown in (("image", "images", pictures), ("text", "texts", texts)):
            if role in quantized.bundle.manifest.graphs:
                embeddings[role] = _agreement([r.embed(**{kind: shown}) for r in both], len(shown))
    timed = latency(both, pictures[0].read_bytes(), rounds)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(quantized.options.threads),
        "embeddings": embeddings,
        "size_bytes": {"int8": _size(quantized), "float32": _size(reference)},
        "latency_ms": {role: {"int8": pair[0], "float32": pair[1]} for role, pair in timed.items()},
        "slower_than_float": [role for role, pair in timed.items() if pair[0]["p50"] > pair[1]["p50"]],
    }


SHARE, SIZE = 0.9, 0.35  # of the multiply-accumulates, at least, and of the float size, at most: what is called int8


def graph(
    model: onnx.ModelProto,
    quantized: onnx.ModelProto,
    feeds: Sequence[Arrays],
    drawn: Iterable[Arrays],
    dims: Mapping[str, int],
    how: Quantize,
    settled: Settled,
) -> dict[str, Any]:
    """Of one graph: its INT8 share at ``dims``, how it was settled, what stayed in float and why, what each product
    loses (on ``feeds``), where outliers are (on ``drawn``, one row each), and the range of each tensor in 8 bits."""
    found = share(count(quantized, dims))
    params = settled.written()
    fitted = {key: len(params.pop(key)) for key in ("clips", "shifts") if key in params}
    return {
        "share": {"macs": found.macs, "int8": found.int8, "part": round(found.part, 5), "counted_at": dict(dims)},
        "settled": {"quantizer": settled.quantizer, "params": params, "fitted": fitted},
        "search": dict(settled.history),
        "in_float": layers.in_float(model, quantized, dims, how.params.get("keep", ())),
        "compared_on": f"{len(feeds)} inputs that ship with calmclip",
        **layers.compare(model, quantized, feeds, dims),
        "outliers": outliers.measure(model, drawn),
        "ranges": layers.ranges(quantized),
    }


def int8(graphs: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Of the whole bundle: the part of its towers' multiply-accumulates in INT8, one input of each, and of the float
    bundle's bytes."""
    macs, whole = (sum(facts["share"][key] for facts in graphs.values()) for key in ("macs", "int8"))
    return {
        "share": round(whole / macs, 5) if macs else 0.0,
        "macs": macs,
        "size_ratio": round(sizes["int8"] / sizes["float32"], 5),
    }


def precision(found: Mapping[str, Any]) -> Literal["int8", "mixed"]:
    """What a bundle may be called, by what `int8` found."""
    return "int8" if found["share"] >= SHARE and found["size_ratio"] <= SIZE else "mixed"


def why_mixed(found: Mapping[str, Any], name: str) -> str:
    return (
        f"called {name}, not int8: {found['share']:.1%} of the multiply-accumulates are in INT8 and its size is "
        f"{found['size_ratio']:.3f} of float; int8 is at least {SHARE:.0%} and at most {SIZE}"
    )


def accuracy(quantized: Runner, reference: Runner, evals: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Every eval that the recipe names, on its data: eval -> {"int8": figures, "float32": figures}."""
    sides = {"int8": quantized, "float32": reference}
    found = {}
    for name, directory in evals.items():
        data = evaluate.read(name, directory)
        found[name] = {side: evaluate.named(evaluate.predict(name, runner, data)) for side, runner in sides.items()}
    return found


def text(figures: Mapping[str, Any]) -> str:
    """report.json, a line for each short list of numbers."""
    whole = json.dumps(figures, indent=2) + "\n"
    return re.sub(r"\[\s+[-\d.e+]+(?:,\s+[-\d.e+]+)*\s+\]", lambda found: " ".join(found[0].split()), whole)


def check(report: Mapping[str, Any], bars: Bars) -> dict[str, dict[str, float | bool]]:
    """Every bar, what was measured against it, and whether it passed."""
    rows: dict[str, tuple[float, float, bool]] = {}
    for role, bar in (("image", bars.min_image_cosine), ("text", bars.min_text_cosine)):
        if role in report["embeddings"]:
            found = report["embeddings"][role]["cosine_mean"]
            rows[f"min_{role}_cosine"] = (bar, found, found >= bar)
    for role, facts in report["graphs"].items():
        for output, numbers in facts["int8_against_float"].items():
            found, bar = numbers["cosine"], bars.cosine(role)
            rows[f"{role}.{output}"] = (bar, found, found >= bar)
    for name, key in (("min_int8_share", "share"), ("max_size_ratio", "size_ratio")):
        bar = getattr(bars, name)
        if bar is not None:
            found = report["int8"][key]
            rows[name] = (bar, found, found >= bar if name.startswith("min") else found <= bar)
    if bars.max_megabytes is not None:
        found = report["size_bytes"]["int8"] / 1e6
        rows["max_megabytes"] = (bars.max_megabytes, found, found <= bars.max_megabytes)
    return {name: {"bar": bar, "measured": round(found, 5), "passed": ok} for name, (bar, found, ok) in rows.items()}


def require(
    bars: Mapping[str, Mapping[str, float | bool]], name: str, graphs: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Raises `BarMissed` with every bar that was not passed, and what the searches for settings came to."""
    missed = [f"{key} is {row['measured']}, the bar {row['bar']}" for key, row in bars.items() if not row["passed"]]
    if missed:
        searched = {role: facts["search"] for role, facts in (graphs or {}).items() if facts.get("search")}
        best = [
            f"{role}: the best of {len(one['candidates'])} settings tried reached the cosine {one['cosine']}"
            for role, one in searched.items()
            if not one["reached"]
        ]
        raise BarMissed(
            f"{name} was not sealed: {'; '.join([*missed, *best])}. More or better calibration pictures (--images), "
            f"another quantizer in the recipe, or another bar may help."
        )


class Steps:
    """Seconds that each step of an export took: ``with steps("image: trace"): …``. What one made the process grow by is
    given back, where it is much: to look for it takes longer than a step of a small net."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, before = perf_counter(), _resident()
        yield
        self.seconds[name] = round(perf_counter() - start, 2)
        if _resident() - before >= _MUCH:
            trim()


def trim() -> None:
    """Give back what was freed: glibc keeps it, in pieces too small for the next large graph."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _resident() -> int:
    """Bytes that this process holds now; 0 where the system does not say, and nothing is trimmed."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def peak_rss_mb() -> float | None:
    """The most memory this process ever held, in 10^6 bytes; None where the system does not say (Windows)."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def _agreement(vectors: Sequence[np.ndarray], count: int) -> dict[str, float]:
    cosines = np.sum(vectors[0].astype(np.float64) * vectors[1], axis=1)
    return {
        "cosine_mean": round(float(cosines.mean()), 5),
        "cosine_min": round(float(cosines.min()), 5),
        "inputs": count,
    }


def _size(runner: Runner) -> int:
    return sum(file.bytes for file in runner.bundle.manifest.files.values())
