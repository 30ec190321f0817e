"""Affinity pooling in strips beside the whole matrix at once: time, and the memory that numpy takes.

    OPENBLAS_NUM_THREADS=1 python -m tests.bench.affinity [--side 28 56 77] [--seconds 5]

Random patches of 512 and keys of 768 numbers, as a ViT-B/16 has; the rule is CLIP-DINOiser's. Both sides run in turns,
and processor time is measured.
"""

import argparse
import tracemalloc
from collections.abc import Callable
from functools import partial
from time import process_time

import numpy as np

from calmclip.models.flow import Array
from calmclip.models.segmenters.affinity import EPS, over, pooled
from tests.bench.alternate import alternate, machine

DIM, KEYS, GAMMA = 512, 768, 0.2


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--side", type=int, nargs="+", default=[28, 56, 77], help="cells of a square map")
    options.add_argument("--seconds", type=float, default=5.0, help="for each size")
    arguments = options.parse_args()
    print(machine(1))
    for side in arguments.side:
        random = np.random.default_rng(0)
        patches = random.standard_normal((side, side, DIM), np.float32)
        keys = random.standard_normal((side, side, KEYS), np.float32)
        keys /= np.linalg.norm(keys, axis=2, keepdims=True)
        sides: dict[str, Callable[[], Array]] = {
            "strips": partial(pooled, patches, keys, over(GAMMA)),
            "whole": partial(whole, patches, keys),
        }
        spent = alternate(sides, seconds=arguments.seconds, least=3, clock=process_time)
        for name, run in sides.items():
            ratio = spent[name].p50 / spent["whole"].p50
            print(f"{side} x {side} cells  {name:7} {1000 * spent[name].p50:8.1f} ms  {ratio:5.2f} x whole  "
                  f"{peak(run) / 1e6:7.1f} MB", flush=True)  # fmt: skip


def whole(patches: Array, keys: Array) -> Array:
    rows, units = patches.reshape(-1, DIM), keys.reshape(-1, KEYS)
    weights = units @ units.T
    weights[weights < GAMMA] = 0
    mixed: Array = (weights @ rows) / (weights.sum(axis=1, keepdims=True) + np.float32(EPS))
    return mixed


def peak(run: Callable[[], Array]) -> int:
    """Bytes that one run allocates at most."""
    tracemalloc.start()
    run()
    bytes_ = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return bytes_


if __name__ == "__main__":
    main()
