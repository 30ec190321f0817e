"""Measures several sides in one run, in turns."""

import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import IO

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    p50: float
    p95: float
    calls: int


def alternate(
    sides: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    least: int = 7,
    turn: float = 0.001,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Timing]:
    """Time the sides in turns for about ``seconds`` and at least ``least`` rounds; the order rotates every round.

    A side that takes less than ``turn`` seconds is called repeatedly for that time, so that it does not start each call
    with the caches of a slower side. Two rounds of warm-up are not counted. ``clock``: use `time.process_time` for
    sides of one thread on a machine with other load.
    """
    names = list(sides)
    spent: dict[str, list[float]] = {name: [] for name in names}
    calls = dict.fromkeys(names, 1)
    start, rounds = perf_counter(), -2
    while rounds < least or perf_counter() - start < seconds:
        for place in range(len(names)):
            name = names[(place + rounds) % len(names)]
            begin = clock()
            for _ in range(calls[name]):
                sides[name]()
            took = (clock() - begin) / calls[name]
            if rounds >= 0:
                spent[name].append(took)
            else:
                calls[name] = max(1, round(turn / took))
        rounds += 1
        if rounds == 0:
            start = perf_counter()
    return {
        name: Timing(float(np.median(times)), float(np.percentile(times, 95)), len(times))
        for name, times in spent.items()
    }


def machine(threads: int) -> str:
    """The machine and versions in one line, which belongs to every figure."""
    import onnxruntime

    from calmclip.models.ops.library import find

    models = re.findall(r"^model name\s*: *(.*\S)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    model = models[0] if models else platform.machine()
    library = find()
    isas = sorted(set(library.isas.values())) if library else ["no op library"]
    return (
        f"{model}, {os.cpu_count()} cores, {threads} thread{'s'[: threads != 1]}; kernels {', '.join(isas)}; "
        f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}"
    )


def pipes(process: "subprocess.Popen[str]") -> tuple[IO[str], IO[str]]:
    """Standard input and output of a process that was started with both."""
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def line(case: str, timings: Mapping[str, Timing], ours: str) -> str:
    """`case   ours 0.26 ms (p95 0.30)   other 0.33 ms (p95 0.35) 1.27x …`: how many times faster ours is."""
    cells = []
    for name, timing in timings.items():
        ratio = "" if name == ours else f" {timing.p50 / timings[ours].p50:.2f}x"
        cells.append(f"{name} {timing.p50 * 1e3:.4g} ms (p95 {timing.p95 * 1e3:.4g}){ratio}")
    return f"{case:24s} " + "   ".join(cells)
