"""Only the library at its fixed place is loaded, and only as it was built."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import onnxruntime as ort
import pytest

from calmclip.models.cli import bundle_options, main, parser
from calmclip.models.errors import BadRequest, OpsLibraryMissing, OpsNotBuilt
from calmclip.models.ops import build
from calmclip.models.ops.library import Library, find, look, mask, why_not
from calmclip.models.ops.table import OPS


@pytest.fixture
def folder(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the built library at the place that `find` reads."""
    for path in (library.path, library.path.with_name(f"{build.NAME}.json")):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    return tmp_path


def test_the_library_is_loaded_unless_ops_is_off(folder: Path):
    library = find("required")
    assert isinstance(library, Library)
    assert library.path == folder / build.NAME
    assert why_not() == ""
    assert find("off") is None


def test_a_changed_byte_is_noticed_before_the_library_is_loaded(folder: Path):
    path = folder / build.NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert find() is None
    assert "not the one it was built with" in why_not()
    with pytest.raises(
        OpsLibraryMissing, match=r"not the one it was built with.*calmclip ops build.*CALMCLIP_OPS=auto"
    ):
        find("required")


@pytest.mark.parametrize("note", ["", "[]", '"text"', "{", "\x00"])
def test_a_library_with_a_broken_note_is_not_loaded(folder: Path, note: str):
    (folder / f"{build.NAME}.json").write_text(note)
    assert find() is None


@pytest.mark.parametrize(
    ("module", "value", "reason"),
    [("build.FLAGS", (*build.FLAGS, "-DNDEBUG"), "other sources"), ("library.VERSION", 2, "has version 1, not 2")],
)
def test_a_library_of_other_sources_or_another_version_is_not_loaded(
    folder: Path, module: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(f"calmclip.models.ops.{module}", value)
    assert find() is None
    assert reason in why_not()


def test_without_a_library_auto_and_info_succeed_and_required_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert find() is None
    with pytest.raises(OpsLibraryMissing, match=r"no op library is built.*calmclip ops build"):
        find("required")
    assert main(["ops", "info"]) == 0
    assert "no op library is built" in capsys.readouterr().out


def test_a_bundle_and_a_working_directory_cannot_provide_a_library(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The installed package fixes the place; no path of a caller or a bundle is loaded."""
    planted = tmp_path / "models" / "ops" / "lib"
    planted.mkdir(parents=True)
    shutil.copy(library.path, planted / build.NAME)
    monkeypatch.chdir(tmp_path)
    look.cache_clear()
    loaded = find("required")
    assert loaded is not None
    assert loaded.path == library.path
    assert build.FOLDER.is_absolute()


def test_the_list_of_kernels_is_complete(library: Library):
    """Every row of list.inc once for each instruction set of this processor family; scalar runs everywhere."""
    text = (build.SOURCES / "kernels" / "list.inc").read_text()
    lines = re.findall(r"^(INT8_|BYTE_|TABLE_|)KERNEL\((\w+),", text, re.MULTILINE)
    assert [(k.name, k.isa) for k in library.kernels] == [
        (name, isa) for kind, name in lines for isa in build.isas(kind)
    ]
    assert all(k.runs for k in library.kernels if k.isa == "scalar")
    assert len({k.address for k in library.kernels}) == len(library.kernels)


def test_masked_instruction_sets_do_not_run(library: Library):
    """`mask` hides kernels from dispatch, from the list and from `isas`; () brings them back."""
    every = library.isas
    masked = {isa for isa in every.values() if isa != "scalar"}
    try:
        mask(masked)
        left = look(build.FOLDER)
        assert isinstance(left, Library)
        assert not masked & set(left.isas.values())
        assert left.isas.keys() == every.keys()
    finally:
        mask(())
    again = look(build.FOLDER)
    assert isinstance(again, Library)
    assert again.isas == every
    for name in ("scalar", "sse9"):
        with pytest.raises(BadRequest, match="is no instruction set that can be masked; expected some of avx2"):
            mask([name])


def test_the_environment_and_a_flag_mask(library: Library, monkeypatch: pytest.MonkeyPatch, capsys):
    """The environment holds until `mask` is called; a name that does not exist is an error with its reason."""
    monkeypatch.setattr("calmclip.models.ops.library._told", [])
    best = library.isas["quant_linear"]
    if best == "scalar":
        pytest.skip("only the scalar kernels run here")
    try:
        monkeypatch.setenv("CALMCLIP_OPS_WITHOUT", f" {best}, ")
        look.cache_clear()
        assert find().isas["quant_linear"] != best
        mask(())
        assert find().isas["quant_linear"] == best
        options = parser("bench", "")
        bundle_options(options)
        options.parse_args(["--without", best])
        assert find().isas["quant_linear"] != best
        with pytest.raises(SystemExit):
            options.parse_args(["--without", "sse9"])
        assert "'sse9' is no instruction set" in capsys.readouterr().err
        assert find().isas["quant_linear"] != best
        monkeypatch.setattr("calmclip.models.ops.library._told", [])
        monkeypatch.setenv("CALMCLIP_OPS_WITHOUT", "sse9")
        look.cache_clear()
        with pytest.raises(BadRequest, match="'sse9' is no instruction set"):
            find()
    finally:
        monkeypatch.undo()
        mask(())


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="the oracle is Linux's list of processor flags")
def test_kernels_run_if_linux_lists_their_instructions(library: Library):
    flags = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.split(":")[1].split())
    needs = {"scalar": set(), "avx2": {"avx2", "fma"}}
    needs["avx512"] = needs["avx2"] | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needs["vnni"] = needs["avx512"] | {"avx512_vnni"}
    needs["vbmi"] = needs["avx512"] | {"avx512vbmi"}
    needs["avxvnni"] = needs["avx2"] | {"avx_vnni"}
    needs |= {isa: needs["avx2"] for isa in library.about["emulate"].split()}
    for kernel in library.kernels:
        if kernel.isa in needs:
            assert kernel.runs == (needs[kernel.isa] <= flags), kernel


def test_the_library_exports_its_own_names_and_does_not_link_onnx_runtime(library: Library):
    shown = subprocess.run(["nm", "-D", "--defined-only", library.path], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in shown.stdout.splitlines() if " T " in line}
    assert "RegisterCustomOps" in names
    assert all(name == "RegisterCustomOps" or name.startswith("calmclip_") for name in names)
    linked = subprocess.run(["ldd", library.path], capture_output=True, text=True, check=True).stdout
    assert "onnxruntime" not in linked


def test_it_registers_with_a_session_more_than_once(library: Library):
    for _ in range(2):
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library.path))


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"CXX": "no-such-compiler", "PATH": "/nowhere"}, "compiler"),
        ({"ORT_INCLUDE_DIR": "/nowhere"}, "libonnxruntime-dev"),
    ],
)
def test_a_missing_tool_is_named_with_the_way_to_get_it(
    env: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OpsNotBuilt, match=message):
        build.build(tmp_path)
    assert main(["ops", "build"]) == 2
    assert message in capsys.readouterr().err
    assert main(["ops", "build", "--if-possible"]) == 0
    assert "bundles run their own functions" in capsys.readouterr().err
    assert not (tmp_path / build.NAME).exists()


def test_a_compiler_error_is_shown_and_the_old_library_stays(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path_factory.mktemp("sources")
    (other / "register.cc").write_text("int unused() { int never_read; return 0; }\n")
    monkeypatch.setattr(build, "SOURCES", other)
    before = (folder / build.NAME).read_bytes()
    with pytest.raises(OpsNotBuilt, match=r"never_read"):  # a warning is an error
        build.build(folder)
    assert (folder / build.NAME).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [build.NAME, f"{build.NAME}.json"]


def test_a_library_that_does_not_load_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """For example if the loader does not find the compiler's own shared libraries."""
    source = tmp_path / "csrc" / "register.cc"
    source.parent.mkdir()
    source.write_text("extern int absent; int* there() { return &absent; }\n")
    monkeypatch.setattr(build, "SOURCES", source.parent)
    monkeypatch.setattr(build, "FOLDER", tmp_path / "lib")
    assert main(["ops", "build", "--if-possible"]) == 0
    error = capsys.readouterr().err
    assert "does not load" in error
    assert "undefined symbol: absent" in error
    assert error.endswith("bundles run their own functions instead\n")
    assert main(["ops", "build"]) == 2


def test_an_unwritable_folder_is_an_error_unless_the_build_is_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(build, "FOLDER", tmp_path / "file" / "lib")
    assert main(["ops", "build", "--if-possible"]) == 0
    assert "Not a directory" in capsys.readouterr().err
    assert main(["ops", "build"]) == 2


def test_info_shows_ops_kernels_and_library(library: Library, capsys: pytest.CaptureFixture[str]):
    assert main(["ops", "info", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["library"]["sha256"] == library.sha256
    assert list(value["ops"]) == [op.name for op in OPS]
    assert {name: kernel["used"] for name, kernel in value["kernels"].items()} == library.isas
    assert main(["ops", "info"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {op.name} " in out for op in OPS)
    assert all(f"  {name} " in out for name in library.isas)
