"""The library and its tests on emulated ARM: Python and ONNX Runtime of aarch64 under qemu-user.

    python -m tests.aarch64 -m pytest tests/models/ops/test_quant_add.py
    python -m tests.aarch64 --cpu neoverse-n1 -c "import platform; print(platform.machine())"

A folder holds an interpreter out of Debian's packages and the wheels of this environment's versions; nothing is
installed on the machine. apt and pip bring both from where they are set up to look. The op library is cross-compiled.
Times in an emulator say nothing about a processor; bytes, dispatch and counts of instructions do.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from calmclip.models.errors import OpsNotBuilt
from calmclip.models.ops import build

ROOT = Path(__file__).parents[1]
MACHINE = "aarch64"
# AARCH64_FOLDER: another folder for the interpreter and the wheels, such as one that several checkouts share
FOLDER = Path(os.environ.get("AARCH64_FOLDER", ROOT / "build/aarch64/root"))
LIBRARY = ROOT / "build/aarch64/lib"
PROGRAMS = {
    "qemu-aarch64": "qemu-user",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "aarch64-linux-gnu-objdump": "binutils-aarch64-linux-gnu",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}
DEBIAN = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
WHEELS = (
    "httpx", "hypothesis", "numpy", "onnx", "onnxruntime", "pillow", "pydantic", "pytest", "safetensors", "tokenizers",
)  # fmt: skip
GLIBC = range(17, 42)  # versions 2.x that Debian's libc6 may have


def why_not() -> str:
    """The reason why nothing can run here; "" if it can."""
    missing = {package for program, package in PROGRAMS.items() if shutil.which(program) is None}
    if missing:
        return f"no emulated ARM; on Debian: apt install {' '.join(sorted(missing))}"
    try:
        build.toolchain(MACHINE)
    except OpsNotBuilt as error:
        return str(error)
    return ""


def python() -> Path:
    """The emulated interpreter; downloaded if the folder lacks it. QEMU_CPU chooses the processor, at first `max`."""
    wheels = [f"{name}=={metadata.version(name)}" for name in WHEELS]
    wanted = hashlib.sha256(repr((DEBIAN, wheels, Path(__file__).read_bytes())).encode()).hexdigest()
    mark = FOLDER / "made"
    if not mark.is_file() or mark.read_text() != wanted:
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".root-", dir=FOLDER.parent) as scratch:
            made = Path(scratch) / "root"
            _unpack(made, Path(scratch))
            _install(made, wheels)
            (made / "made").write_text(wanted)
            shutil.rmtree(FOLDER, ignore_errors=True)
            made.rename(FOLDER)
        _wrapper(FOLDER)
    return FOLDER / "usr/bin/emulated"


def library() -> Path:
    """The folder with this checkout's op library of aarch64; compiled if it is missing or out of date."""
    about = LIBRARY / f"{build.NAME}.json"
    if not about.is_file() or build.fingerprint(MACHINE) not in about.read_text():
        build.build(LIBRARY, machine=MACHINE)
    return LIBRARY


def command(*words: object, cpu: str = "max") -> tuple[list[str], dict[str, str]]:
    """The command that runs Python with these words on ``cpu``, and its environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "QEMU_"))}
    return [str(python()), *map(str, words)], environment | {"QEMU_CPU": cpu, "PYTHONPATH": str(ROOT)}


def tests(*words: object) -> list[object]:
    """The words for `command` that run pytest. Plug-ins cost seconds of import here, so none is loaded."""
    return ["-m", "pytest", "-p", "no:hypothesispytest", "-p", "no:cacheprovider", f"--ops-folder={library()}", *words]


def _unpack(made: Path, scratch: Path) -> None:
    """Debian's packages and all that they need, without the state of this machine's own packages."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    (scratch / "state/status").touch()
    settings = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State": scratch / "state",
        "Dir::State::status": scratch / "state/status", "Dir::Cache": scratch / "cache", "Debug::NoLocking": 1,
        "APT::Sandbox::User": "root",
    }  # fmt: skip
    apt = ["apt-get", "-qq", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
    _run([*apt, "update"])
    _run([*apt, "install", "--download-only", "--no-install-recommends", "--yes", *DEBIAN])
    for name in ("bin", "lib", "sbin"):
        (made / "usr" / name).mkdir(parents=True)
        (made / name).symlink_to(f"usr/{name}")
    for package in sorted((scratch / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "--extract", package, made])


def _install(made: Path, wheels: list[str]) -> None:
    version = (made / "usr/bin/python3").readlink().name.removeprefix("python")
    platforms = [word for minor in GLIBC for word in ("--platform", f"manylinux_2_{minor}_{MACHINE}")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    target = made / "usr/lib/python3/dist-packages"
    _run([*pip, "--target", target, "--python-version", version, "--only-binary=:all:", *platforms, *wheels])


def _wrapper(folder: Path) -> None:
    """A script as interpreter: the kernel cannot start a program of another processor, but tests start sys.executable.

    Python takes the name that it was started by, -0, for sys.executable, and looks for its library beside it.
    """
    file = folder / "usr/bin/emulated"
    file.write_text(f'#!/bin/sh\nexec qemu-aarch64 -L "{folder}" -0 "$0" "{folder}/usr/bin/python3" "$@"\n')
    file.chmod(0o755)


def _run(words: list[object]) -> None:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words[:2]))} … failed:\n{done.stderr.strip()[-2000:]}")


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(
        prog="python -m tests.aarch64", description="Python on an emulated ARM. Other words are the interpreter's."
    )
    options.add_argument("--cpu", default="max", help="as of `qemu-aarch64 -cpu help`")
    arguments, words = options.parse_known_args(argv)
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 1
    line, environment = command(*(tests(*words[2:]) if words[:2] == ["-m", "pytest"] else words), cpu=arguments.cpu)
    return subprocess.run(line, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
