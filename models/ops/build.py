"""csrc/ -> the op library, with whatever C++ compiler the machine has. A pip install needs none of this.

Headers are ONNX Runtime's public C and C++ ones, 1.21 or newer: in Debian the package libonnxruntime-dev. The library
links to nothing of ONNX Runtime; it gets the API handed when it is registered, so older headers serve newer wheels.
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
    # a multiply and an add stay two roundings, so that every instruction set rounds as numpy does; where one is
    # wanted, a kernel says fma
    "-ffp-contract=off",
)  # fmt: skip
# file suffix -> flags. A file without one is compiled for the base architecture, and so is the dispatcher.
ISA_FLAGS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
    "neon": (),
    "scalar": (),
    "vbmi": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi", "-mavx2", "-mfma"),
    "vnni": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma"),
}
# what `platform.machine` says -> the sets that processors of that family may have
ISAS = {
    "x86_64": ("scalar", "avx2", "avx512"),
    "aarch64": ("scalar", "neon"),
    "arm64": ("scalar", "neon"),  # as macOS calls it
}
# of kernels that live on products of bytes
INT8_ISAS = {"x86_64": ("scalar", "avx2", "vnni")}
# of kernels that live on tables of bytes
TABLE_ISAS = {"x86_64": ("scalar", "avx2", "vbmi")}
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1")
_INCLUDES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/include/onnxruntime/core/session")


@dataclass(frozen=True)
class Toolchain:
    """What `build` needs."""

    compiler: str
    include: Path


def toolchain() -> Toolchain:
    """Raises `OpsNotBuilt`, which says what is missing and how to get it."""
    wanted = os.environ.get("CXX", "c++")
    compiler = shutil.which(wanted) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OpsNotBuilt("there is no C++ compiler (c++, g++, clang++, or what CXX names); on Debian: apt install g++")
    given = os.environ.get("ORT_INCLUDE_DIR")
    for folder in [given] if given else _INCLUDES:
        if (Path(folder) / "onnxruntime_cxx_api.h").is_file():
            return Toolchain(compiler, Path(folder))
    looked = given or ", ".join(_INCLUDES)
    raise OpsNotBuilt(
        f"ONNX Runtime's header onnxruntime_cxx_api.h is not in {looked}; on Debian: apt install libonnxruntime-dev, "
        "elsewhere name its folder in ORT_INCLUDE_DIR"
    )


def sources() -> list[Path]:
    """Every file the library of this processor family is made of, in a fixed order."""
    isas = {isa for kind in (ISAS, INT8_ISAS, TABLE_ISAS) for isa in kind.get(platform.machine(), ("scalar",))}
    return [
        path
        for path in sorted(SOURCES.rglob("*"))
        if path.suffix in (".cc", ".h", ".inc") and ((isa := _isa(path)) is None or isa in isas)
    ]


def fingerprint() -> str:
    """SHA-256 over the sources and flags: a library of another one is out of date."""
    digest = hashlib.sha256(repr((FLAGS, ISA_FLAGS)).encode())
    for path in sources():
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build(folder: Path = FOLDER, *, sanitize: bool = False) -> Path:
    """Compile into ``folder``; -> the library, with a JSON file beside it that holds its SHA-256.

    A process that has the old library loaded keeps it: the new one is renamed into place. Raises `OpsNotBuilt`
    with what the compiler said.
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
        raise OpsNotBuilt(f"the compiler refused:\n{' '.join(command)}\n{done.stderr.strip()}")


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.stdout else compiler
