"""The compiled op library: its place, its verification, and its kernels for this processor.

Its only place is ``models/ops/lib``: no bundle, setting or working directory can provide one. `build` writes its
SHA-256 beside it. A library with another SHA-256, or of other sources, is not loaded.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from calmclip.models.errors import BadRequest, OpsLibraryMissing
from calmclip.models.ops import build
from calmclip.models.ops.spec import VERSION

Mode = Literal["auto", "required", "all", "off"]
MODES: tuple[Mode, ...] = ("auto", "required", "all", "off")
WITHOUT = "CALMCLIP_OPS_WITHOUT"  # the environment's variable for `mask`: names with commas between them

_registering = Lock()  # the library keeps one list of operators to leave
_told: list[tuple[str, ...]] = []  # the names of the last `mask`; before the first one those of the environment hold


@dataclass(frozen=True)
class Kernel:
    """One function of the library. ``runs``: whether this processor has its instructions, and `mask` left them."""

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

    With ``all`` sessions leave no operator to its function, see `calmclip.models.ops.breakeven`. Raises
    `OpsLibraryMissing` if ``mode`` is required or all and the library is missing, altered or out of date.
    """
    if mode == "off":
        return None
    library = look(build.FOLDER)
    if isinstance(library, Library):
        return library
    if mode in ("required", "all"):
        raise OpsLibraryMissing(
            f"{library}, and CALMCLIP_OPS={mode}. Run 'calmclip ops build', or set CALMCLIP_OPS=auto to run the "
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
    handle.calmclip_mask(",".join(masked()).encode())
    return Library(path, sha256, about, listed(handle), handle)


def mask(isas: Iterable[str]) -> None:
    """From now on this process runs no kernel of these instruction sets; () takes all that the processor has again.

    For tests and benchmarks. Not while a graph runs. Raises `BadRequest` for a name that is no instruction set.
    """
    _told[:] = [checked_isas(isas)]
    look.cache_clear()
    find()  # which tells a loaded library


def masked() -> tuple[str, ...]:
    """The instruction sets that this process leaves out: by `mask`, else by the environment.

    Raises `BadRequest` if the environment names one that does not exist.
    """
    return _told[0] if _told else checked_isas(os.environ.get(WITHOUT, "").split(","))


def checked_isas(names: Iterable[str]) -> tuple[str, ...]:
    """The names without blanks. Raises `BadRequest` for one that is no instruction set, or that cannot be masked."""
    given = tuple(name.strip() for name in names if name.strip())
    known = sorted({*build.ISA_FLAGS} - {"scalar"})
    for name in given:
        if name not in known:
            raise BadRequest(f"{name!r} is no instruction set that can be masked; expected some of {', '.join(known)}")
    return given


def register(library: Library, settings: Any, leave: Iterable[str] = ()) -> None:
    """Give the operators but those to ``leave`` to sessions that are opened with ``settings``, an
    `onnxruntime.SessionOptions`."""
    with _registering:
        library.handle.calmclip_leave(",".join(leave).encode())
        try:
            settings.register_custom_ops_library(str(library.path))
        finally:
            library.handle.calmclip_leave(b"")


class _Line(ctypes.Structure):
    """`calmclip_kernel` of csrc/kernels/dispatch.h."""

    _fields_ = [  # ctypes requires a list
        ("name", ctypes.c_char_p),
        ("isa", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("runs", ctypes.c_int),
    ]


def listed(handle: ctypes.CDLL) -> tuple[Kernel, ...]:
    """The kernels that a library lists by `calmclip_kernels`."""
    handle.calmclip_kernels.restype = ctypes.POINTER(_Line)
    count = ctypes.c_size_t()
    lines = handle.calmclip_kernels(ctypes.byref(count))
    return tuple(
        Kernel(line.name.decode(), line.isa.decode(), line.function, bool(line.runs)) for line in lines[: count.value]
    )
