"""The compiled op library: found at one place, verified, and what it holds for this processor.

It lies in ``models/ops/lib`` and nowhere else: no bundle, setting or working directory can bring one. Beside it lies
the SHA-256 that `build` wrote; a library that differs, or one of other sources, is not loaded.
"""

import ctypes
import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from calmclip.models.errors import OpsLibraryMissing
from calmclip.models.ops import build
from calmclip.models.ops.spec import VERSION

Mode = Literal["auto", "required", "off"]
MODES: tuple[Mode, ...] = ("auto", "required", "off")


@dataclass(frozen=True)
class Kernel:
    """One function of the library. ``runs``: whether this processor has its instructions."""

    name: str
    isa: str
    address: int
    runs: bool


@dataclass(frozen=True)
class Library:
    path: Path
    sha256: str
    about: dict[str, str]
    kernels: tuple[Kernel, ...]
    handle: ctypes.CDLL = field(compare=False)  # of one file loaded twice they are two

    @property
    def isas(self) -> dict[str, str]:
        """Kernel -> the instruction set that dispatch takes for it here: the last of the list that runs."""
        return {kernel.name: kernel.isa for kernel in self.kernels if kernel.runs}


def find(mode: Mode = "auto") -> Library | None:
    """The library, verified; None where there is none or ``mode`` is off.

    Raises `OpsLibraryMissing` when ``mode`` is required and it is absent, altered or out of date.
    """
    if mode == "off":
        return None
    found = look(build.FOLDER)
    if isinstance(found, Library):
        return found
    if mode == "required":
        raise OpsLibraryMissing(
            f"{found}, and CALMCLIP_OPS=required. Run 'calmclip ops build', or set CALMCLIP_OPS=auto to run the "
            "functions that bundles carry."
        )
    return None


def why_not() -> str:
    """Why `find` gives nothing; "" where it gives a library."""
    found = look(build.FOLDER)
    return "" if isinstance(found, Library) else found


@cache  # a process decides once: what it has loaded cannot be unloaded
def look(folder: Path) -> Library | str:
    """The verified library in ``folder``, or in words why there is none."""
    path, note = folder / build.NAME, folder / f"{build.NAME}.json"
    try:
        about = json.loads(note.read_bytes())
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return "no op library is built"
    except (OSError, ValueError) as error:
        return f"the op library {path} cannot be read: {error}"
    if not isinstance(about, dict) or found != about.get("sha256"):
        return f"the op library {path} has the SHA-256 {found[:12]}…, not the one it was built with"
    if about.get("sources") != build.fingerprint():
        return f"the op library {path} is of other sources than these"
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the op library {path} does not load: {error}"
    version = handle.calmclip_ops_version()
    if version != VERSION:
        return f"the op library {path} is of version {version}, not {VERSION}"
    return Library(path, found, about, _kernels(handle), handle)


class _Line(ctypes.Structure):
    """`calmclip_kernel` of csrc/kernels/dispatch.h."""

    _fields_ = [  # ctypes asks for a list
        ("name", ctypes.c_char_p),
        ("isa", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("runs", ctypes.c_int),
    ]


def _kernels(handle: ctypes.CDLL) -> tuple[Kernel, ...]:
    handle.calmclip_kernels.restype = ctypes.POINTER(_Line)
    count = ctypes.c_size_t()
    lines = handle.calmclip_kernels(ctypes.byref(count))
    return tuple(
        Kernel(line.name.decode(), line.isa.decode(), line.function, bool(line.runs)) for line in lines[: count.value]
    )
