"""The compiled op library: its place, its verification, and its kernels for this processor.

Its only place is ``models/ops/lib``: no bundle, setting or working directory can provide one. `build` writes its
SHA-256 beside it. A library with another SHA-256, or of other sources, is not loaded.
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
    handle: ctypes.CDLL = field(compare=False)  # loading one file twice gives two handles

    @property
    def isas(self) -> dict[str, str]:
        """Kernel -> the instruction set that dispatch uses here: the last of the list that this processor has."""
        return {kernel.name: kernel.isa for kernel in self.kernels if kernel.runs}


def find(mode: Mode = "auto") -> Library | None:
    """The verified library; None if there is none or ``mode`` is off.

    Raises `OpsLibraryMissing` if ``mode`` is required and the library is missing, altered or out of date.
    """
    if mode == "off":
        return None
    library = look(build.FOLDER)
    if isinstance(library, Library):
        return library
    if mode == "required":
        raise OpsLibraryMissing(
            f"{library}, and CALMCLIP_OPS=required. Run 'calmclip ops build', or set CALMCLIP_OPS=auto to run the "
            "functions that bundles carry."
        )
    return None


def why_not() -> str:
    """The reason why `find` returns None; "" if it returns a library."""
    library = look(build.FOLDER)
    return "" if isinstance(library, Library) else library


@cache  # a process decides once, because a loaded library cannot be unloaded
def look(folder: Path) -> Library | str:
    """The verified library in ``folder``, or the reason why there is none."""
    path = folder / build.NAME
    try:
        about = json.loads((folder / f"{build.NAME}.json").read_bytes())
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return "no op library is built"
    except (OSError, ValueError) as error:
        return f"the op library {path} cannot be read: {error}"
    if not isinstance(about, dict) or sha256 != about.get("sha256"):
        return f"the op library {path} has the SHA-256 {sha256[:12]}…, not the one it was built with"
    if about.get("sources") != build.fingerprint():
        return f"the op library {path} was built from other sources than these"
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the op library {path} does not load: {error}"
    version = handle.calmclip_ops_version()
    if version != VERSION:
        return f"the op library {path} has version {version}, not {VERSION}"
    return Library(path, sha256, about, _kernels(handle), handle)


class _Line(ctypes.Structure):
    """`calmclip_kernel` of csrc/kernels/dispatch.h."""

    _fields_ = [  # ctypes requires a list
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
