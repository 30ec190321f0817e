"""How long a bundle's graphs take on this machine. A measurement, not a test."""

import os
import platform
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from time import perf_counter

import numpy as np

from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Arrays
from calmclip.models.preprocess.image import decode
from calmclip.models.runner import Runner
from calmclip.models.runtime.session import versions

SENTENCES = ("a photo of two dogs running on the beach.", "a dog")  # the first that fits the context


def feeds(runner: Runner, picture: bytes) -> dict[str, Arrays]:
    """One row for every graph that takes a picture or a text."""
    bundle = runner.bundle
    found: dict[str, Arrays] = {}
    for role, graph in bundle.manifest.graphs.items():
        if isinstance(graph.preprocess, ImagePreprocess):
            found[role] = {graph.preprocess.input: bundle.image(role).prepare(decode(picture))[0]}
        elif isinstance(graph.preprocess, TextPreprocess):
            text = bundle.text(role)
            found[role] = text.prepare([s for s in SENTENCES if text.count(s) <= graph.preprocess.context][:1])
    return found


def latency(runners: Sequence[Runner], picture: bytes, rounds: int = 50) -> dict[str, list[Mapping[str, float]]]:
    """Role -> per runner {"p50", "p95"} in milliseconds at batch 1.

    The runners take turns inside every round, so a noisy moment hits them alike, and the first of one round is the last
    of the next: the first finds the caches colder. 3 rounds warm up. Raises
    `BadRequest` for a single round, which has no quantiles.
    """
    if rounds < 2:
        raise BadRequest(f"rounds is {rounds}; expected at least 2")
    inputs = [feeds(runner, picture) for runner in runners]
    result: dict[str, list[Mapping[str, float]]] = {}
    for role in inputs[0]:
        sides = [i for i in range(len(runners)) if role in inputs[i]]
        times: dict[int, list[float]] = {i: [] for i in sides}
        for turn in range(rounds + 3):
            for i in sides if turn % 2 else sides[::-1]:
                start = perf_counter()
                runners[i].session(role).run(inputs[i][role])
                if turn >= 3:
                    times[i].append(1000 * (perf_counter() - start))
        result[role] = [{"p50": round(median(t), 3), "p95": round(quantiles(t, n=20)[-1], 3)} for t in times.values()]
    return result


def machine(threads: int) -> dict[str, str | int]:
    """What a figure must be read with."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "threads": threads or os.cpu_count() or 0,
        "python": platform.python_version(),
        "numpy": np.__version__,
        **versions(),
    }
