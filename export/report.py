"""What was measured of a finished bundle, float and INT8 side by side -> report.json.

Both sides are opened with `models.runner`, the code that serves, so a number here is about what is served.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from export.recipe import Bars
from models.errors import BarMissed
from models.measure import latency, machine
from models.runner import Runner


def measure(
    quantized: Runner, reference: Runner, pictures: Sequence[Path], texts: Sequence[str], *, rounds: int = 20
) -> dict[str, Any]:
    """Cosine of embeddings, size and latency of ``quantized`` beside ``reference`` (float)."""
    both = (quantized, reference)
    embeddings: dict[str, Any] = {}
    if "embed" in quantized.bundle.manifest.tasks:
        embeddings["image"] = _agreement([r.embed(images=pictures) for r in both], len(pictures))
        embeddings["text"] = _agreement([r.embed(texts=texts) for r in both], len(texts))
    timed = latency(both, pictures[0].read_bytes(), rounds)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(quantized.options.threads),
        "embeddings": embeddings,
        "size_bytes": {"int8": _size(quantized), "float32": _size(reference)},
        "latency_ms": {role: {"int8": pair[0], "float32": pair[1]} for role, pair in timed.items()},
        "slower_than_float": [role for role, pair in timed.items() if pair[0]["p50"] > pair[1]["p50"]],
    }


def check(report: Mapping[str, Any], bars: Bars) -> dict[str, dict[str, float | bool]]:
    """Every bar, what was measured against it, and whether it passed."""
    rows: dict[str, tuple[float, float, bool]] = {}
    for role, bar in (("image", bars.min_image_cosine), ("text", bars.min_text_cosine)):
        if role in report["embeddings"]:
            found = report["embeddings"][role]["cosine_mean"]
            rows[f"min_{role}_cosine"] = (bar, found, found >= bar)
    for role, facts in report["graphs"].items():
        for output, numbers in facts["int8_against_float"].items():
            found, bar = numbers["cosine"], bars.min_output_cosine
            rows[f"{role}.{output}"] = (bar, found, found >= bar)
    if bars.max_megabytes is not None:
        found = report["size_bytes"]["int8"] / 1e6
        rows["max_megabytes"] = (bars.max_megabytes, found, found <= bars.max_megabytes)
    return {name: {"bar": bar, "measured": round(found, 5), "passed": ok} for name, (bar, found, ok) in rows.items()}


def require(bars: Mapping[str, Mapping[str, float | bool]], name: str) -> None:
    """Raises `BarMissed` with every bar that was not passed."""
    missed = [f"{key} is {row['measured']}, the bar {row['bar']}" for key, row in bars.items() if not row["passed"]]
    if missed:
        raise BarMissed(
            f"{name} was not sealed: {'; '.join(missed)}. More or better calibration pictures (--images), another "
            f"quantizer in the recipe, or another bar may help."
        )


class Steps:
    """Seconds that each step of an export took: ``with steps("image: trace"): …``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[name] = round(perf_counter() - start, 2)
        trim()


def trim() -> None:
    """Give back what was freed: glibc keeps it, in pieces too small for the next large graph."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


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
