"""A wheel for any platform becomes one for each processor, with the compiled op library inside.

    python service/deploy/platform_wheels.py dist/calmclip-1.0-py3-none-any.whl dist [--libraries FOLDER]

FOLDER/MACHINE holds the library of a processor, as `calmclip.models.ops.build.build` writes it; what is missing is
compiled there. The library has no Python ABI and chooses its kernels at run time, so one wheel serves every Python and
every processor of a family. The same wheel and libraries give the same bytes; SOURCE_DATE_EPOCH is the time in them.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from calmclip.models.ops import build

MACHINES = ("x86_64", "aarch64")
GLIBC = (2, 28)  # what the wheels of ONNX Runtime need
# and what the platform manylinux_2_28 has (PEP 600, and the policy of auditwheel)
MOST = {"GLIBC": GLIBC, "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}
SYSTEM = re.compile(r"(libc|libm|libstdc\+\+|libgcc_s|ld-linux-[\w-]+)\.so\.\d+")
OPS = "calmclip/models/ops"
OURS = re.compile(rf"{OPS}/(build\.py|csrc/)")


def platform_wheel(plain: Path, out: Path, machine: str, library: Path) -> Path:
    """``library``: the folder of the library. Raises `ValueError` for one of another machine or of other sources than
    the wheel's, or for one that needs this machine's Linux."""
    about = json.loads((library / f"{build.NAME}.json").read_text(encoding="utf-8"))
    if about["machine"] != machine or about["sources"] != build.fingerprint(machine):
        raise ValueError(f"{library} is of {about['machine']} or of other sources; remove it, and it is compiled anew")
    check(library / build.NAME)
    tag = f"py3-none-manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"
    target = out / plain.name.replace("py3-none-any", tag)
    with zipfile.ZipFile(plain) as old:
        files = {entry.filename: old.read(entry) for entry in old.infolist() if not entry.is_dir()}
    if other := {name for name, _ in _ours() ^ {(name, files[name]) for name in files if OURS.match(name)}}:
        raise ValueError(f"{plain} has another {min(other)} than this checkout; make the wheel anew")
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    wheel = record.replace("RECORD", "WHEEL")
    files |= {f"{OPS}/lib/{name}": (library / name).read_bytes() for name in (build.NAME, f"{build.NAME}.json")}
    head = files[wheel].decode()
    head = head.replace("Root-Is-Purelib: true", "Root-Is-Purelib: false").replace("py3-none-any", tag)
    files[wheel] = head.encode()
    del files[record]
    rows = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in sorted(files, key=lambda name: (".dist-info/" in name, name)):
            digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(files[name])}\n")
            _add(new, name, files[name])
        _add(new, record, ("".join(rows) + f"{record},,\n").encode())
    return target


def _ours() -> set[tuple[str, bytes]]:
    """What an installed package computes `build.fingerprint` of: name in a wheel, content."""
    ops = Path(build.__file__).parent
    files = (ops / "build.py", *(path for path in build.SOURCES.rglob("*") if path.is_file()))
    return {(f"{OPS}/{path.relative_to(ops).as_posix()}", path.read_bytes()) for path in files}


def check(library: Path) -> None:
    """Raises `ValueError` if it needs more than a Linux of `MOST` has."""
    for name in _listed("--dynamic", library, r"\(NEEDED\).*\[(.+)\]"):
        if not SYSTEM.fullmatch(name):
            raise ValueError(f"{library} needs {name}, which not every Linux has")
    for version in _listed("--version-info", library, r"Name: ([A-Z]+_[\d.]+)\b"):
        what, _, number = version.partition("_")
        if tuple(map(int, number.split("."))) > MOST.get(what, ()):
            raise ValueError(f"{library} needs {version}; a wheel may need {what} {'.'.join(map(str, MOST[what]))}")


def _listed(what: str, library: Path, pattern: str) -> list[str]:
    command = ["readelf", what, "--wide", str(library)]
    return re.findall(pattern, subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    entry = zipfile.ZipInfo(name, max(time.gmtime(epoch)[:6], (1980, 1, 1, 0, 0, 0)))
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
    entry.create_system = 3  # Unix, wherever it is made
    archive.writestr(entry, content)


def main(argv: list[str]) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("plain", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--libraries", type=Path, default=Path("build/libraries"))
    options.add_argument("--machine", action="append", choices=MACHINES, help="one of several; all if not given")
    arguments = options.parse_args(argv)
    for machine in arguments.machine or MACHINES:
        library = arguments.libraries / machine
        if not (library / build.NAME).is_file():
            build.build(library, machine=machine)
        print(platform_wheel(arguments.plain, arguments.out, machine, library))


if __name__ == "__main__":
    main(sys.argv[1:])
