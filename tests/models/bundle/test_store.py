"""Directories on disk: sealing is atomic, also with other writers and after a kill."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from calmclip.models.bundle import store
from calmclip.models.bundle.manifest import Manifest
from calmclip.models.bundle.store import Sealed, describe, find, names, read, seal, stage
from calmclip.models.errors import BundleError, BundleInvalid, BundleNotFound

Write = Callable[[Path], Manifest]


def export(bundles: Path, write: Write, *, replace: bool = False, note: str = "") -> Sealed:
    with stage(bundles, "colours") as staged:
        manifest = write(staged)
        (staged / "note.txt").write_text(note)
        return seal(staged, manifest, replace=replace)


def note(bundles: Path) -> str:
    return (read(bundles / "colours").directory / "note.txt").read_text()


def test_a_sealed_bundle_lists_every_file_with_its_hash(sealed: Path):
    contents = read(sealed)
    assert set(contents.manifest.files) == {"image.onnx", "text.onnx", "tokenizer.json"}
    for name, file in contents.manifest.files.items():
        content = (sealed / name).read_bytes()
        assert (file.sha256, file.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert contents.digest == hashlib.sha256((sealed / "bundle.json").read_bytes()).hexdigest()
    assert sealed.stat().st_mode & 0o777 == 0o755
    assert os.listdir(sealed.parent) == ["colours"]


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path, write: Write):
    """A limit of the system stands for the full disk: no file of this process may exceed 100 kB."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most[1]))
    try:
        with pytest.raises(BundleError, match=r"colours cannot be written to .*: File too large\. Nothing was sealed"):
            export(tmp_path, write, note="x" * 100_001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert os.listdir(tmp_path) == []


def test_files_may_lie_in_folders(tmp_path: Path, write: Write):
    with stage(tmp_path, "colours") as staged:
        manifest = write(staged)
        (staged / "assets" / "deep").mkdir(parents=True)
        (staged / "assets" / "deep" / "a.npy").write_bytes(b"x")
        seal(staged, manifest)
    assert "assets/deep/a.npy" in read(tmp_path / "colours").manifest.files


def test_an_existing_bundle_is_not_replaced_by_accident(tmp_path: Path, write: Write):
    export(tmp_path, write, note="old")
    with pytest.raises(BundleError, match="exists; a sealed bundle never changes, so remove it, rename the new one"):
        export(tmp_path, write, note="new")
    assert note(tmp_path) == "old"
    assert os.listdir(tmp_path) == ["colours"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replace_leaves_only_the_new_bundle(
    tmp_path: Path, write: Write, exchange: bool, monkeypatch: pytest.MonkeyPatch
):
    if not exchange:  # as on a system without renameat2
        monkeypatch.setattr(store, "_exchanged", lambda first, second: False)
    export(tmp_path, write, note="old")
    sealed = export(tmp_path, write, replace=True, note="new")
    assert sealed == read(tmp_path / "colours")
    assert note(tmp_path) == "new"
    assert os.listdir(tmp_path) == ["colours"]


def test_a_failed_export_leaves_nothing(tmp_path: Path, write: Write):
    def fail() -> None:
        with stage(tmp_path / "bundles", "colours") as staged:
            write(staged)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path / "bundles") == []


def spoil_link(staged: Path) -> None:
    (staged / "link.onnx").symlink_to(staged / "image.onnx")


def spoil_hidden(staged: Path) -> None:
    (staged / ".DS_Store").write_bytes(b"")


def spoil_absent(staged: Path) -> None:
    (staged / "image.onnx").unlink()


@pytest.mark.parametrize("spoil", [spoil_link, spoil_hidden, spoil_absent])
@pytest.mark.parametrize("replace", [False, True])
def test_an_invalid_directory_is_not_sealed(tmp_path: Path, write: Write, replace: bool, spoil: Callable[[Path], None]):
    if replace:
        export(tmp_path, write, note="old")
    before = os.listdir(tmp_path)
    with stage(tmp_path, "colours") as staged:
        manifest = write(staged)
        spoil(staged)
        with pytest.raises(BundleInvalid):
            seal(staged, manifest, replace=replace)
    assert os.listdir(tmp_path) == before
    assert not replace or note(tmp_path) == "old"


def test_describe_makes_a_staged_directory_readable(tmp_path: Path, write: Write):
    with stage(tmp_path, "colours") as staged:
        with pytest.raises(BundleInvalid, match="task 'detect' needs a graph 'detect'"):
            describe(staged, write(staged).model_copy(update={"tasks": ("detect",)}))
        complete = describe(staged, write(staged))
        assert read(staged).manifest == complete
        assert set(complete.files) == {"image.onnx", "text.onnx", "tokenizer.json"}
        assert names(tmp_path) == []  # hidden until sealed


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"), stage(tmp_path / "file" / "bundles", "colours"):
        pass


@pytest.mark.parametrize("exchange", [True, False])
def test_many_writers_all_succeed_with_replace(
    tmp_path: Path, write: Write, exchange: bool, monkeypatch: pytest.MonkeyPatch
):
    if not exchange:
        monkeypatch.setattr(store, "_exchanged", lambda first, second: False)
    export(tmp_path, write)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: export(tmp_path, write, replace=True, note=str(i)), range(24)))
    assert note(tmp_path) in set(map(str, range(24)))
    assert os.listdir(tmp_path) == ["colours"]


def test_one_of_many_writers_succeeds_without_replace(tmp_path: Path, write: Write):
    def attempt(i: int) -> str | None:
        try:
            export(tmp_path, write, note=str(i))
        except BundleError:
            return None
        return str(i)

    with ThreadPoolExecutor(8) as pool:
        winners = [i for i in pool.map(attempt, range(16)) if i is not None]
    assert winners == [note(tmp_path)]
    assert os.listdir(tmp_path) == ["colours"]


def test_a_reader_always_sees_a_complete_bundle_during_a_replacement(tmp_path: Path, write: Write):
    if not _exchanges(tmp_path):
        return  # this system replaces in two steps
    export(tmp_path, write, note="0")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [export(tmp_path, write, replace=True, note=str(i)) for i in range(30)])
        while not writing.done():
            assert (tmp_path / "colours" / "bundle.json").is_file()
        writing.result()


def _exchanges(directory: Path) -> bool:
    (directory / "a").mkdir()
    (directory / "b").mkdir()
    done = store._exchanged(directory / "a", directory / "b")
    (directory / "a").rmdir()
    (directory / "b").rmdir()
    return done


@pytest.mark.parametrize("step", ["describe", "_flush", "read", "_moved", "_exchanged"])
def test_a_kill_in_the_middle_leaves_the_old_or_the_new(tmp_path: Path, write: Write, step: str):
    export(tmp_path, write, note="old")
    with stage(tmp_path / "source", "colours") as source:
        (source / "manifest").write_text(write(source).model_dump_json())
        script = f"""
            import os, shutil, signal
            from pathlib import Path
            from calmclip.models.bundle import store
            from calmclip.models.bundle.manifest import Manifest
            source, bundles = Path({str(source)!r}), Path({str(tmp_path)!r})
            original = store.{step}
            def die(*args, **kwargs):
                original(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            with store.stage(bundles, "colours") as staged:
                shutil.copytree(source, staged, dirs_exist_ok=True)
                manifest = Manifest.model_validate_json((staged / "manifest").read_text())
                (staged / "manifest").unlink()
                (staged / "note.txt").write_text("new")
                store.{step} = die
                store.seal(staged, manifest, replace=True)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert note(tmp_path) == ("new" if step == "_exchanged" and _exchanges(tmp_path) else "old")
    assert names(tmp_path) == ["colours"]
    assert export(tmp_path, write, replace=True, note="newer").directory == tmp_path / "colours"


def test_bundles_are_found_by_name_or_path(sealed: Path):
    bundles = sealed.parent
    assert find("colours", bundles) == sealed
    assert find(str(sealed), bundles / "elsewhere") == sealed
    (bundles / ".hidden").mkdir()
    (bundles / "no-bundle").mkdir()
    assert names(bundles) == ["colours"]
    assert names(bundles / "absent") == []


@pytest.mark.parametrize("name", ["colour", "../colours", "", ".", "a\0b", "x" * 5000])
def test_an_unknown_name_is_refused_with_the_known_ones(sealed: Path, name: str):
    with pytest.raises(BundleNotFound, match="there is no bundle") as refused:
        find(name, sealed.parent)
    assert refused.value.known == ["colours"]


def test_the_manifest_on_disk_is_plain_json(sealed: Path):
    data = json.loads((sealed / "bundle.json").read_text(encoding="utf-8"))
    assert data["format"] == 2
    assert "mask" not in data["graphs"]["text"]["preprocess"]  # absent values are not written
