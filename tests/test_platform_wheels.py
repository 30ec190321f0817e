"""Platform wheels: what is in them, where they load, and that they work where they are installed."""

import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from calmclip.models.ops import build
from calmclip.models.ops.library import Library
from calmclip.service.deploy import platform_wheels
from tests import aarch64

ROOT = Path(__file__).parents[1]
OPS = ROOT / "models/ops"
PLAIN = "calmclip-7.8.9-py3-none-any.whl"
INFO = "calmclip-7.8.9.dist-info"


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with zipfile.ZipFile(tmp_path / PLAIN, "w") as archive:
        for file in (OPS / "build.py", *(OPS / "csrc").rglob("*.*")):
            archive.write(file, f"calmclip/models/ops/{file.relative_to(OPS)}")
        archive.writestr("calmclip/__init__.py", "")
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n\n")
        archive.writestr(f"{INFO}/RECORD", "")
    return tmp_path / PLAIN


def test_a_platform_wheel_is_the_plain_one_and_the_library(plain: Path, library: Library, tmp_path: Path) -> None:
    """Its record is that of the wheel's specification: a line for each file, with its unpadded hash."""
    machine, folder = platform.machine(), library.path.parent
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(platform_wheels.platform_wheel(plain, tmp_path / name, machine, folder))
    assert made[0].name == f"calmclip-7.8.9-py3-none-manylinux_2_28_{machine}.whl"
    assert made[0].read_bytes() == made[1].read_bytes()
    with zipfile.ZipFile(made[0]) as wheel:
        names = [entry.filename for entry in wheel.infolist()]
        record = [line.rsplit(",", 2) for line in wheel.read(f"{INFO}/RECORD").decode().splitlines()]
        assert [line[0] for line in record] == names
        added = {f"calmclip/models/ops/lib/{name}" for name in (build.NAME, f"{build.NAME}.json")}
        assert {*names} == {*zipfile.ZipFile(plain).namelist()} | added
        for name, digest, size in record[:-1]:
            content = wheel.read(name)
            exact = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            assert (digest, size) == (f"sha256={exact}", str(len(content)))
        assert record[-1] == [f"{INFO}/RECORD", "", ""]
        head = wheel.read(f"{INFO}/WHEEL").decode().splitlines()
        assert f"Tag: py3-none-manylinux_2_28_{machine}" in head
        assert "Root-Is-Purelib: false" in head
        assert {entry.date_time for entry in wheel.infolist()} == {(2023, 11, 14, 22, 13, 20)}


def test_a_library_that_other_linuxes_cannot_load_is_refused(plain: Path, library: Library, tmp_path: Path) -> None:
    folder = tmp_path / "library"
    shutil.copytree(library.path.parent, folder)
    platform_wheels.check(folder / build.NAME)
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[platform.machine()]
    with pytest.raises(ValueError, match=f"is of {platform.machine()} or of other sources"):
        platform_wheels.platform_wheel(plain, tmp_path, other, folder)
    compiler = build.toolchain().compiler
    source = tmp_path / "new.cc"
    for code, flags, message in (
        ("int f() { return 0; }", ("-Wl,--no-as-needed", "-lgomp"), "needs libgomp.so.1, which not every Linux has"),
        (
            'extern "C" int arc4random(); int f() { return arc4random(); }',
            (),
            "needs GLIBC_2.36; a wheel may need GLIBC",
        ),
    ):
        source.write_text(code)
        command = [compiler, "-shared", "-fPIC", source, *flags, "-o", folder / build.NAME]
        subprocess.run(command, check=True, capture_output=True)
        with pytest.raises(ValueError, match=message):
            platform_wheels.check(folder / build.NAME)


def test_a_wheel_of_other_sources_is_refused(plain: Path, library: Library, tmp_path: Path) -> None:
    """An installed package would take the library for one of other sources, and would not load it."""
    with zipfile.ZipFile(plain, "a") as archive:
        archive.writestr("calmclip/models/ops/csrc/kernels/more.cc", "")
    (tmp_path / "made").mkdir()
    with pytest.raises(ValueError, match=r"has another calmclip/models/ops/csrc/kernels/more\.cc than this checkout"):
        platform_wheels.platform_wheel(plain, tmp_path / "made", platform.machine(), library.path.parent)
    assert not list((tmp_path / "made").iterdir())


def test_the_folder_and_the_hour_of_a_build_leave_no_trace(
    monkeypatch: pytest.MonkeyPatch, library: Library, tmp_path: Path
) -> None:
    """One file stands for all. It has static data, which a compiler may name by the file."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    csrc, made = build.SOURCES, []
    for name in ("a", "another/deeper"):
        monkeypatch.setattr(build, "SOURCES", tmp_path / name / "csrc")
        shutil.copytree(csrc, build.SOURCES)
        for file in build.SOURCES.rglob("*.cc"):
            if file.name != "dispatch.cc":
                file.unlink()
        folder = build.build(tmp_path / name / "lib").parent
        made.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert made[0] == made[1]
    about = json.loads(made[0][f"{build.NAME}.json"])
    assert about["built"] == "2023-11-14T22:13:20+00:00"
    assert about["sha256"] == hashlib.sha256(made[0][build.NAME]).hexdigest()


def calmclip(*words: str, installed: Path, emulated: bool) -> tuple[int, str]:
    """The command of the package that is installed there, with this environment's other packages."""
    code = f"import sys; from calmclip.models.cli import main; sys.exit(main({list(words)}))"
    command, environment = [sys.executable, "-c", code], {**os.environ}
    if emulated:
        command, environment = aarch64.command("-c", code)
    environment["PYTHONPATH"] = str(installed)
    done = subprocess.run(command, env=environment, cwd=installed, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow  # `calmclip ops check` on an emulated processor: half a minute
def test_wheels_of_this_checkout_work_where_they_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Library
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    if reason := aarch64.why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    tree, made, libraries = (tmp_path / name for name in ("tree", "made", "libraries"))
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "lib", "bundles", "dist"))
    for machine, folder in {platform.machine(): library.path.parent, "aarch64": aarch64.library()}.items():
        (libraries / machine).mkdir(parents=True)
        for name in (build.NAME, f"{build.NAME}.json"):  # not what `calmclip ops build` measured
            shutil.copy(folder / name, libraries / machine)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", made, tree], check=True)
    (plain,) = made.iterdir()
    script = [sys.executable, str(tree / "service/deploy/platform_wheels.py"), "--libraries", str(libraries)]
    subprocess.run([*script, str(plain), str(made)], cwd=tree, check=True)

    for name in ("any", "x86_64", "aarch64"):
        (wheel,) = made.glob(f"*{name}.whl")
        target = tmp_path / name
        platforms = ["--platform", f"manylinux_2_28_{name}", "--only-binary=:all:"] if name != "any" else []
        subprocess.run([*pip, "install", "--no-deps", "--target", target, *platforms, wheel], check=True)
        emulated = name not in ("any", platform.machine())
        if name == "any":
            assert "no op library is built" in calmclip("ops", "info", installed=target, emulated=False)[1]
            continue
        status, printed = calmclip("ops", "info", installed=target, emulated=emulated)
        assert status == 0, printed
        assert f"\n{target}/calmclip/models/ops/lib/{build.NAME}  " in printed
        assert re.search(rf"quant_linear +{build.isas('INT8_', name)[-1]} " if emulated else "quant_linear", printed)
        status, printed = calmclip("ops", "check", installed=target, emulated=emulated)
        assert status == 0, printed
        assert "FAIL" not in printed
        assert " library " in printed
