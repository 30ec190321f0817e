"""How long does a whole `segment` take, from a file to masks, beside `detect` on the same picture?

    python -m tests.bench.segment_latency BUNDLE PICTURE...

Milliseconds of wall time on all cores, vectors of labels cached, the cases in turns on one picture after another; the
median and the 95th percentile of each case over the pictures' rounds. Set OPENBLAS_NUM_THREADS=1 for numpy as a small
service runs it.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import numpy as np

from calmclip import open_bundle
from tests.bench.alternate import Timing, alternate, machine

CASES = {
    "detect, three labels": ("detect", ["person", "car", "dog"]),
    "segment, three labels that the detector knows": ("segment", ["person", "car", "dog"]),
    "segment, a label that may be one": ("segment", ["pony"]),
    "segment, a label that it does not know": ("segment", ["castle"]),
    "segment, labels of both kinds": ("segment", ["person", "car", "dog", "castle"]),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle")
    options.add_argument("pictures", nargs="+", type=Path)
    given = options.parse_args()
    runner = open_bundle(given.bundle)
    timings: dict[str, list[Timing]] = {case: [] for case in CASES}
    for picture in given.pictures:
        sides = {case: partial(getattr(runner, task), picture, labels) for case, (task, labels) in CASES.items()}
        for case, timing in alternate(sides, seconds=1.0).items():
            timings[case].append(timing)
    print(machine(len(os.sched_getaffinity(0))))
    print("| case | median, ms | 95 %, ms |\n| --- | --- | --- |")
    for case, rows in timings.items():
        middle, high = (1e3 * np.median([getattr(row, part) for row in rows]) for part in ("p50", "p95"))
        print(f"| {case} | {middle:.1f} | {high:.1f} |")


if __name__ == "__main__":
    main()
