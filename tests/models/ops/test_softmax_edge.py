"""Softmax reads no further than its rows: they end where readable memory does, in a process of its own.

The sanitizers do not see what a masked load reads.
"""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

from calmclip.models.ops.library import Library, look

ROOT = Path(__file__).parents[3]
FORMS = ("softmax_two_pass", "softmax_reload", "softmax_recompute")
KERNEL = ctypes.CFUNCTYPE(
    None, *[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2, *[ctypes.c_float] * 2, ctypes.c_bool
)  # SoftmaxRows of softmax_rows.h


def test_kernels_read_no_further_than_their_rows(library: Library):
    command = [sys.executable, __file__, library.path.parent]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert int(done.stdout.split()[0]) == sum(k.runs and k.name in FORMS for k in library.kernels)


def to_the_edge(library: Library) -> None:
    memory = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    edge = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + 3 * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    kernels = [kernel for kernel in library.kernels if kernel.runs and kernel.name in FORMS]
    for kernel in kernels:
        function = KERNEL(kernel.address)
        for cols in (*range(1, 70), 127, 128, 129, 319, 320, 321, 577):
            for rows in (1, 2, 3):
                row = edge - 4 * rows * cols
                function(row, row, rows, cols, 0.0, 1.0, False)
    print(len(kernels), "kernels")
    sys.stdout.flush()
    os._exit(0)  # the mapping is of another size than Python believes


if __name__ == "__main__":
    at_hand = look(Path(sys.argv[1]))
    assert isinstance(at_hand, Library), at_hand
    to_the_edge(at_hand)
