"""csrc/ -> the op library, by the C++ compiler of the machine. A pip install does not need it.

Headers are ONNX Runtime's public C and C++ ones, 1.21 or newer: in Debian the package libonnxruntime-dev. The library
does not link to ONNX Runtime. It receives the API when it is registered, so older headers work with newer wheels.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from calmclip.models.errors import OpsNotBuilt

SOURCES = Path(__file__).with_name("csrc")
FOLDER = Path(__file__).with_name("lib")  # the only place a library is loaded from
NAME = "calmclip_ops.so"

FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic", "-Werror",
    # a multiply and an add are two roundings, so that every instruction set rounds as numpy does; kernels that want one
    # rounding call fma
    "-ffp-contract=off",
)  # fmt: skip
# file suffix -> flags. A file without a suffix, such as the dispatcher, is compiled for the base architecture.
ISA_FLAGS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
    "avxvnni": ("-mavxvnni", "-mavx2", "-mfma"),
    "dotprod": ("-march=armv8.2-a+dotprod",),
    "i8mm": ("-march=armv8.2-a+dotprod+i8mm",),
    "neon": (),
    "scalar": (),
    "vbmi": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi", "-mavx2", "-mfma"),
    "vnni": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma"),
}
# A kernel's kind in list.inc -> the answer of `platform.machine` -> the instruction sets of the kind's files, in the
# order of dispatch.h: the later, the faster. "arm64" is macOS. Other processors have the scalar kernels.
ISAS: dict[str, dict[str, tuple[str, ...]]] = {
    "": {
        "x86_64": ("scalar", "avx2", "avx512"),
        "aarch64": ("scalar", "neon"),
        "arm64": ("scalar", "neon"),
    },
    "INT8_": {
        "x86_64": ("scalar", "avx2", "avxvnni", "vnni"),
        "aarch64": ("scalar", "neon", "dotprod", "i8mm"),
        "arm64": ("scalar", "neon", "dotprod", "i8mm"),
    },
    "BYTE_": {
        "x86_64": ("scalar", "avx2", "vnni"),
        "aarch64": ("scalar", "neon"),
        "arm64": ("scalar", "neon"),
    },
    "TABLE_": {
        "x86_64": ("scalar", "avx2", "vbmi"),
        "aarch64": ("scalar", "neon"),
        "arm64": ("scalar", "neon"),
    },
}
# Instruction sets whose kernels also compile to plain C and AVX2, for tests on processors without them -> the flags of
# these files. Files without a suffix see the macro, too.
EMULATED = {"avxvnni": ("-DCALMCLIP_AVXVNNI_IN_C", "-mavx2", "-mfma")}
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O1")
_INCLUDES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/include/onnxruntime/core/session")


@dataclass(frozen=True)
class Toolchain:
    """The compiler and the folder of ONNX Runtime's headers."""

    compiler: str
    include: Path


def toolchain(machine: str = "") -> Toolchain:
    """``machine``: a processor family, as of `platform.machine`; this one's if empty. Another one's needs the compiler
    with the name that Debian and others give it, such as aarch64-linux-gnu-g++.

    Raises `OpsNotBuilt`, which names the missing part and how to get it.
    """
    if machine in ("", platform.machine()):
        compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
        expected = "c++, g++, clang++, or the one that CXX names; on Debian: apt install g++"
    else:
        compiler = shutil.which(expected := f"{machine}-linux-gnu-g++")
        expected += f"; on Debian: apt install g++-{machine.replace('_', '-')}-linux-gnu"
    if compiler is None:
        raise OpsNotBuilt(f"no C++ compiler; expected {expected}")
    folders = [os.environ["ORT_INCLUDE_DIR"]] if os.environ.get("ORT_INCLUDE_DIR") else _INCLUDES
    for folder in folders:
        if (Path(folder) / "onnxruntime_cxx_api.h").is_file():
            return Toolchain(compiler, Path(folder))
    raise OpsNotBuilt(
        f"ONNX Runtime's header onnxruntime_cxx_api.h is not in {', '.join(folders)}; on Debian: apt install "
        "libonnxruntime-dev, elsewhere set ORT_INCLUDE_DIR to its folder"
    )


def isas(kind: str, machine: str = "") -> tuple[str, ...]:
    """The instruction sets of a kind of kernels; ``machine``: a processor family, this one's if empty."""
    return ISAS[kind].get(machine or platform.machine(), ("scalar",))


def sources(machine: str = "") -> list[Path]:
    """Every source file of the library for a processor family (this one's if empty), in a fixed order."""
    named = {isa for kind in ISAS for isa in isas(kind, machine)}
    return [
        path
        for path in sorted(SOURCES.rglob("*"))
        if path.suffix in (".cc", ".h", ".inc") and ((isa := _isa(path)) is None or isa in named)
    ]


def fingerprint(machine: str = "") -> str:
    """SHA-256 over a processor family's sources and flags. A library with another fingerprint is out of date."""
    digest = hashlib.sha256(repr((FLAGS, ISA_FLAGS)).encode())
    for path in sources(machine):
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build(folder: Path = FOLDER, *, sanitize: bool = False, emulate: tuple[str, ...] = (), machine: str = "") -> Path:
    """Compile into ``folder`` for ``machine``, see `toolchain`; -> the library. A JSON file has its SHA-256.

    ``emulate``: instruction sets of `EMULATED`; dispatch takes their kernels on every processor with AVX2.

    The new library is renamed into place, so a process keeps the old one that it has loaded. Raises `OpsNotBuilt` with
    the compiler's message.
    """
    tools = toolchain(machine)
    common = [tools.compiler, *FLAGS, *(SANITIZE if sanitize else ()), "-isystem", str(tools.include)]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
        macros = tuple(flag for isa in emulate for flag in EMULATED[isa] if flag.startswith("-D"))
        flags = {None: macros} | ISA_FLAGS | {isa: EMULATED[isa] for isa in emulate}
        jobs = [
            ([*common, *flags[_isa(path)], "-c", str(path)], Path(scratch) / f"{number}.o")
            for number, path in enumerate(path for path in sources(machine) if path.suffix == ".cc")
        ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda job: _run([*job[0], "-o", str(job[1])]), jobs))
        library = Path(scratch) / NAME
        _run([*common, "-shared", "-o", str(library), *(str(target) for _, target in jobs)])
        about = {
            "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
            "sources": fingerprint(machine),
            "compiler": _version(tools.compiler),
            "headers": str(tools.include),
            "machine": machine or platform.machine(),
            "emulate": " ".join(emulate),
            "built": datetime.fromtimestamp(_now(), UTC).isoformat(timespec="seconds"),
        }
        about_file = Path(scratch) / f"{NAME}.json"
        about_file.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        library.replace(folder / NAME)
        about_file.replace(folder / about_file.name)
    return folder / NAME


def _now() -> float:
    """The time of the build; a release, which is the same bytes each time, gives it (reproducible-builds.org)."""
    return float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())


def _isa(path: Path) -> str | None:
    tail = path.stem.rpartition("_")[2]
    return tail if tail in ISA_FLAGS else None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OpsNotBuilt(f"the compiler failed:\n{' '.join(command)}\n{done.stderr.strip()}")


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.stdout else compiler
