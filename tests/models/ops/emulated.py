"""Kernels of instruction sets that this processor lacks: their files, compiled in another form.

The plain form (`build.EMULATED`) replaces the instructions by C, and the tests of every kernel run on it. "EVEX" has
the same instructions as AVX-VNNI in the encoding of AVX-512, which processors with AVX-512 VNNI run, so its speed can
be measured there.
"""

import atexit
import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from calmclip.models.ops import build
from calmclip.models.ops.library import listed

EVEX = ("-DCALMCLIP_AVXVNNI_AS_EVEX", "-mavx2", "-mfma")
_BUILT = "EMULATED_KERNELS"  # the folder of this process's libraries, for the processes that it starts
# The kernels of INT8_ISAS whose file names end in NAME, as `calmclip_kernels` of dispatch.cc.
_TABLE = """#include "dispatch.h"
using namespace calmclip;
#define KERNEL(name, type)
#define BYTE_KERNEL(name, type)
#define TABLE_KERNEL(name, type)
#define INT8_KERNEL(name, type) {#name, "NAME", reinterpret_cast<void (*)()>(&name##_NAME), 1},
extern "C" __attribute__((visibility("default"))) const calmclip_kernel* calmclip_kernels(size_t* count) {
  static const calmclip_kernel list[] = {
#include "list.inc"
  };
  *count = sizeof list / sizeof *list;
  return list;
}
"""


@cache
def addresses(isa: str, flags: tuple[str, ...] = ()) -> dict[str, int]:
    """Kernel of byte products -> its address; ``flags`` replace those of the plain form.

    They are compiled once for a process and those that it starts.
    """
    if _BUILT not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="calmclip-emulated-")
        atexit.register(folder.cleanup)
        os.environ[_BUILT] = folder.name
    library = Path(os.environ[_BUILT]) / f"{isa}{''.join(flags)}.so"
    if not library.is_file():
        table = library.with_suffix(".cc")
        table.write_text(_TABLE.replace("NAME", isa), encoding="utf-8")
        kernels = build.SOURCES / "kernels"
        files = [*sorted(kernels.glob(f"*_{isa}.cc")), kernels / "activation_curve.cc", table]
        link(library, files, flags or (*build.EMULATED[isa], "-O1"))  # -O3 takes twice as long to compile
    return {kernel.name: kernel.address for kernel in listed(ctypes.CDLL(str(library)))}


def link(library: Path, files: list[Path], flags: tuple[str, ...]) -> None:
    """Compile ``files`` as the op library's are, and link them to a library."""
    command = [build.toolchain().compiler, *build.FLAGS, *flags, f"-I{build.SOURCES / 'kernels'}"]
    objects = [library.with_name(f"{library.stem}-{file.stem}.o") for file in files]
    for file, target in zip(files, objects, strict=True):
        _run([*command, "-c", file, "-o", target])
    _run([*command, "-shared", "-o", library, *objects])


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
