"""Latency of a bundle's graphs on this machine, and the memory that they take."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import numpy as np

from calmclip.models.bundle.manifest import GUIDE, ImagePreprocess, TextPreprocess, VectorPreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Arrays
from calmclip.models.ops.library import MODES, Mode
from calmclip.models.preprocess.image import Picture, load
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.runtime.heap import trim
from calmclip.models.runtime.session import versions

SENTENCES = ("a photo of two dogs running on the beach.", "a dog")  # the first that fits the context


def feeds(runner: Runner, picture: Picture) -> dict[str, Arrays]:
    """One row for every graph that takes a picture, a text or a vector in place of a text, and for `attribution`, which
    takes the vector of a picture and the tokens of a text."""
    bundle = runner.bundle
    rows: dict[str, Arrays] = {}
    for role, graph in bundle.manifest.graphs.items():
        if isinstance(graph.preprocess, ImagePreprocess):
            rows[role] = {graph.preprocess.input: bundle.image(role).prepare(load(picture))[0]}
        elif isinstance(graph.preprocess, TextPreprocess):
            text = bundle.text(role)
            rows[role] = text.prepare([s for s in SENTENCES if text.count(s) <= graph.preprocess.context][:1])
        elif isinstance(graph.preprocess, VectorPreprocess):
            rows[role] = bundle.vectors(role).prepare([np.ones(graph.preprocess.dim)])
    for role, graph in bundle.manifest.graphs.items():
        if role in rows and GUIDE in graph.inputs:
            rows[role] = {**rows[role], GUIDE: runner.session(GUIDE).run(rows[GUIDE])["patches"]}
    if "attribution" in bundle.manifest.graphs:
        vector = runner.session("image").run(rows["image"])["image_embeds"]
        rows["attribution"] = {**rows["text"], "image_embeds": vector}
    return rows


def latency(runners: Sequence[Runner], picture: Picture, rounds: int = 50) -> dict[str, list[Mapping[str, float]]]:
    """Role -> per runner {"p50", "p95"} in milliseconds at batch 1.

    The runners alternate inside every round, so noise affects all of them, and the order is reversed in the next round,
    because the first runner has colder caches. 3 rounds warm up. Raises `BadRequest` for fewer than 2 rounds.
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


def resident(directory: Path, ops: Mode = "auto", threads: int = 1) -> float | None:
    """Resident megabytes that a new process gains by opening all graphs of a bundle and running each once, where it can
    (see `feeds`). Libraries and the tokenizer are not counted. None if the system does not say, that is without Linux,
    or if the process does not end well, as without memory.
    """
    if sys.platform != "linux":
        return None
    command = [sys.executable, "-m", __name__, str(directory), ops, str(threads)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return None if done.returncode else round(float(done.stdout), 1)


def _gained(directory: Path, ops: Mode, threads: int) -> float:
    runner = open_bundle(directory, threads=threads, verify=False, ops=ops)
    runner.bundle.warm()
    grey = np.full((480, 640, 3), 128, np.uint8)
    if "image" in runner.bundle.manifest.graphs:
        runner.bundle.image().prepare(load(grey))
    trim()
    before = _resident()
    for role in runner.bundle.manifest.graphs:
        runner.session(role)
    for role, rows in feeds(runner, grey).items():
        runner.session(role).run(rows)
    trim()
    return (_resident() - before) / 1e6


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine(threads: int) -> dict[str, str | int]:
    """The machine and the versions that belong to a figure."""
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


if __name__ == "__main__":
    directory, ops, threads = sys.argv[1:]
    print(_gained(Path(directory), next(mode for mode in MODES if mode == ops), int(threads)))
