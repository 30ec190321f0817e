"""The tests of the operators, with a library that AddressSanitizer and UBSan check."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from calmclip.models.ops import build
from calmclip.models.ops.library import Library

ROOT = Path(__file__).parents[3]
WHERE = ("tests/models/ops", "tests/export/functions")


@pytest.fixture(scope="module")
def sanitized(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    build.build(folder, sanitize=True, emulate=tuple(isa for isa in build.EMULATED if isa in build.isas("INT8_")))
    return folder


def environment() -> dict[str, str]:
    """Python itself is not instrumented, so the run-time library comes first; leaks of Python do not count.

    libstdc++ comes with it: AddressSanitizer looks for `__cxa_throw` when it starts, and aborts at a throw without it.
    """
    compiler = build.toolchain().compiler
    paths = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(path.strip() for path in paths),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, cwd=ROOT, env=environment(), capture_output=True, text=True)


@pytest.mark.slow
def test_the_sanitizers_are_on(sanitized: Path):
    """A kernel that reads one float past its row is caught, so the next test can fail."""
    reads_behind = (
        "import ctypes, sys; from pathlib import Path; from calmclip.models.ops.library import look\n"
        "library = look(Path(sys.argv[1]))\n"
        "kernel = next(k for k in library.kernels if k.name == 'softmax_reload' and k.isa == 'scalar')\n"
        "malloc = ctypes.CDLL(None).malloc; malloc.restype = ctypes.c_void_p\n"
        "row = malloc(ctypes.c_size_t(16))\n"
        "ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2, *[ctypes.c_float] * 2)"
        "(kernel.address)(row, row, 1, 5, 0.0, 1.0)\n"
    )
    done = run([sys.executable, "-c", reads_behind, sanitized])
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.slow
def test_the_sanitizers_report_no_error(sanitized: Path):
    command = [sys.executable, "-m", "pytest", f"--ops-folder={sanitized}", "-x", *WHERE]
    done = run(command)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
