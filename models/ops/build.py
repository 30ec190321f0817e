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
    "neon": (),
    "scalar": (),
    "vbmi": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi", "-mavx2", "-mfma"),
    "vnni": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma"),
}
# the answer of `platform.machine` -> the instruction sets that processors of that family may have
ISAS = {
    "x86_64": ("scalar", "avx2", "avx512"),
    "aarch64": ("scalar", "neon"),
    "arm64": ("scalar", "neon"),  # on macOS
}
# for kernels of byte products
INT8_ISAS = {"x86_64": ("scalar", "avx2", "vnni")}
# for kernels of byte tables
TABLE_ISAS = {"x86_64": ("scalar", "avx2", "vbmi")}
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1")
_INCLUDES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/include/onnxruntime/core/session")


@dataclass(frozen=True)
class Toolchain:
    """The compiler and the folder of ONNX Runtime's headers."""

    compiler: str
    include: Path


def toolchain() -> Toolchain:
    """Raises `OpsNotBuilt`, which names the missing part and how to get it."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OpsNotBuilt(
            "no C++ compiler; expected c++, g++, clang++, or the one that CXX names; on Debian: apt install g++"
        )
    folders = [os.environ["ORT_INCLUDE_DIR"]] if os.environ.get("ORT_INCLUDE_DIR") else _INCLUDES
    for folder in folders:
        if (Path(folder) / "onnxruntime_cxx_api.h").is_file():
            return Toolchain(compiler, Path(folder))
    raise OpsNotBuilt(
        f"ONNX Runtime's header onnxruntime_cxx_api.h is not in {', '.join(folders)}; on Debian: apt install "
        "libonnxruntime-dev, elsewhere set ORT_INCLUDE_DIR to its folder"
    )


def sources() -> list[Path]:
    """Every source file of the library for this processor family, in a fixed order."""
    isas = {isa for kind in (ISAS, INT8_ISAS, TABLE_ISAS) for isa in kind.get(platform.machine(), ("scalar",))}
    return [
        path
        for path in sorted(SOURCES.rglob("*"))
        if path.suffix in (".cc", ".h", ".inc") and ((isa := _isa(path)) is None or isa in isas)
    ]


def fingerprint() -> str:
    """SHA-256 over the sources and flags. A library with another fingerprint is out of date."""
    digest = hashlib.sha256(repr((FLAGS, ISA_FLAGS)).encode())
    for path in sources():
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build(folder: Path = FOLDER, *, sanitize: bool = False) -> Path:
    """Compile into ``folder``; -> the library. A JSON file beside it holds its SHA-256.

    The new library is renamed into place, so a process keeps the old one that it has loaded. Raises `OpsNotBuilt` with
    the compiler's message.
    """
    tools = toolchain()
    common = [tools.compiler, *FLAGS, *(SANITIZE if sanitize else ()), "-isystem", str(tools.include)]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
        jobs = [
            ([*common, *ISA_FLAGS.get(_isa(path) or "", ()), "-c", str(path)], Path(scratch) / f"{number}.o")
            for number, path in enumerate(path for path in sources() if path.suffix == ".cc")
        ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda job: _run([*job[0], "-o", str(job[1])]), jobs))
        library = Path(scratch) / NAME
        _run([*common, "-shared", "-o", str(library), *(str(target) for _, target in jobs)])
        about = {
            "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
            "sources": fingerprint(),
            "compiler": _version(tools.compiler),
            "headers": str(tools.include),
            "machine": platform.machine(),
            "built": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        about_file = Path(scratch) / f"{NAME}.json"
        about_file.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        library.replace(folder / NAME)
        about_file.replace(folder / about_file.name)
    return folder / NAME


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
