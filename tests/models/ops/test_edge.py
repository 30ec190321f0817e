"""Kernels touch no byte past their tensors. Here each tensor ends where its memory ends, in a separate process.

The sanitizers do not see the accesses of masked loads and stores. The cases are the lists `EDGES` of the other files.
"""

import os
import sys
from pathlib import Path

from calmclip.models.ops.library import Library, look
from tests.models.ops.harness import Edge, gather, kernels, run_separately, runnable


def test_kernels_touch_no_byte_past_their_tensors(library: Library):
    """Every kernel of the lists in every instruction set that runs here."""
    names = {name for name, *_ in gather("EDGES")}
    assert len(names) >= 10
    count = sum(len(runnable(library, name)) for name in names)
    assert count >= sum(k.runs and k.name in names for k in library.kernels)
    assert int(run_separately(__file__, library)[0]) == count


def to_the_edge(library: Library) -> None:
    count = 0
    for name, prototype, call, cases in gather("EDGES"):
        for function in kernels(library, name, prototype).values():
            count += 1
            for case in cases:
                call(function, Edge(), *case)
    print(count, "kernels")
    sys.stdout.flush()
    os._exit(0)  # Python's own clean-up would write past the protected ends


if __name__ == "__main__":
    opened = look(Path(sys.argv[1]))
    assert isinstance(opened, Library), opened
    to_the_edge(opened)
