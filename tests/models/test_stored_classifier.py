"""Stored classifiers are what docs/classifiers.md says, also after a crash and between two changes."""

import hashlib
import json
import os
import stat
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calmclip.models import stored_classifier
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, ClassifierExists, ClassifierNotFound
from calmclip.models.stored_classifier import ClassifierFolder, read_classifier
from calmclip.models.tasks.fit import FitReport

REPORT = FitReport("prototype", 4, 2, 0.5, 1.0, "2-fold cross-validation", {"scale": 4.0}, 0.25, ("räv",))
ROWS = np.array([[1, 0, 0], [0, 0.6, 0.8]], np.float32)


def fitted(rows: np.ndarray = ROWS) -> Classifier:
    return Classifier(
        ("räv", "dog"), ("a {}",), head="prototype", params={"scale": 4.0}, assets={"prototypes": rows}, family="f" * 64
    )


@pytest.fixture
def folder(tmp_path: Path) -> ClassifierFolder:
    folder = ClassifierFolder(tmp_path / "sets")
    folder.store("pets", fitted(), REPORT)
    return folder


def content(folder: ClassifierFolder, name: str = "pets") -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder.directory / f"{name}.json").read_text(encoding="utf-8"))
    return value


def edit(folder: ClassifierFolder, **changed: Any) -> None:
    (folder.directory / "pets.json").write_text(json.dumps(content(folder) | changed), encoding="utf-8")


def test_the_files_are_as_the_contract_says(folder: ClassifierFolder):
    """Read without the code under test: the standard library's JSON, and the layout of safetensors by hand."""
    value = content(folder)
    fit = value.pop("fit")
    assert value == {
        "format": 1, "name": "pets", "version": 1, "labels": ["räv", "dog"], "templates": ["a {}"], "descriptions": {},
        "head": "prototype", "params": {"scale": 4.0}, "temperature": 1.0, "none_below": None, "family": "f" * 64,
    }  # fmt: skip
    assert fit["report"] == {
        "method": "prototype", "pictures": 4, "labels": 2, "before": 0.5, "after": 1.0,
        "measured": "2-fold cross-validation", "params": {"scale": 4.0}, "seconds": 0.25, "notes": ["räv"],
    }  # fmt: skip
    data = (folder.directory / fit["arrays"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == fit["sha256"]
    assert fit["arrays"] == f"pets-{fit['sha256'][:16]}.safetensors"
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header == {"prototypes": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    assert np.frombuffer(data[8 + length :], "<f4").reshape(2, 3).tolist() == ROWS.tolist()
    kept = ("labels", "templates", "descriptions", "head", "params", "family")
    made = {key: value[key] for key in kept} | {"sha256": fit["sha256"], "report": fit["report"]}
    text = json.dumps(made, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert fit["digest"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_stored_classifier_is_read_as_it_was(folder: ClassifierFolder):
    again = read_classifier(folder.directory / "pets.json")
    assert (again.name, again.version, again.report) == ("pets", 1, REPORT)
    assert again.classifier.assets["prototypes"].tolist() == ROWS.tolist()
    assert replace(again.classifier, assets={}) == replace(fitted(), assets={})
    assert folder.store("pets", fitted(), REPORT).version == 1  # the same content
    assert folder.store("pets", fitted(), replace(REPORT, after=0.75)).version == 2
    with pytest.raises(ClassifierNotFound, match=r"there is no file .*dogs\.json"):
        read_classifier(folder.directory / "dogs.json")


def test_a_temperature_leaves_what_the_fit_made(folder: ClassifierFolder):
    before = content(folder)
    changed = folder.change(folder.get("pets"), temperature=2.5)
    assert (changed.version, changed.report) == (2, REPORT)
    assert content(folder) == before | {"version": 2, "temperature": 2.5}
    assert ClassifierFolder(folder.directory).get("pets").classifier.assets["prototypes"].tolist() == ROWS.tolist()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"labels": ["dog", "räv"]}, "what the fit made has changed since it was written; fit the classifier again"),
        ({"params": {"scale": 5.0}}, "what the fit made has changed"),
        ({"family": "a" * 64}, "what the fit made has changed"),
        ({"name": "dogs"}, "it holds the classifier 'dogs'; rename it to dogs.json"),
        ({"format": 2}, "format: Input should be 1"),
        ({"colour": "red"}, "colour: unknown key"),
        ({"version": "x"}, "version: Input should be a valid integer"),
        ({"temperature": 1000.0}, "temperature is 1000.0; expected 0.01 to 100"),
    ],
)
def test_a_file_that_was_changed_is_refused(folder: ClassifierFolder, changed: dict[str, Any], says: str):
    edit(folder, **changed)
    with pytest.raises(
        BadRequest, match=r"pets\.json is not a classifier .*repair the file or move it away"
    ) as refused:
        read_classifier(folder.directory / "pets.json")
    assert says in str(refused.value)


def test_a_changed_report_or_file_of_arrays_is_refused(folder: ClassifierFolder):
    fit = content(folder)["fit"]
    for part, says in (
        ({"report": fit["report"] | {"after": 0.99}}, "what the fit made has changed"),
        ({"arrays": "../pets-0000000000000000.safetensors"}, "expected the name and the hash of the classifier"),
        ({"sha256": "0" * 64}, "what the fit made has changed"),
    ):
        edit(folder, fit=fit | part)
        with pytest.raises(BadRequest, match=says):
            read_classifier(folder.directory / "pets.json")
    edit(folder, fit=fit)
    arrays = folder.directory / fit["arrays"]
    data = arrays.read_bytes()
    arrays.write_bytes(data[:-1] + b"\x00")
    with pytest.raises(BadRequest, match=rf"{fit['arrays']} has changed since it was written"):
        read_classifier(folder.directory / "pets.json")
    arrays.unlink()
    with pytest.raises(BadRequest, match=rf"its arrays .*{fit['arrays']} are missing"):
        read_classifier(folder.directory / "pets.json")


def test_a_name_in_use_is_kept_unless_it_is_to_be_replaced(folder: ClassifierFolder):
    with pytest.raises(ClassifierExists, match="there is a classifier 'pets' already, of version 1; choose"):
        folder.store("pets", fitted(ROWS[::-1].copy()), REPORT, replace=False)
    assert content(folder)["version"] == 1
    assert folder.store("dogs", fitted(), REPORT, replace=False).version == 1
    folder.require_free("cats")
    with pytest.raises(BadRequest, match="is not a name for a classifier"):
        folder.require_free("../cats")


def test_a_reader_between_the_json_and_the_arrays_of_a_change_reads_again(
    folder: ClassifierFolder, monkeypatch: pytest.MonkeyPatch
):
    """It has read the old JSON when the change deletes the old arrays."""
    other, parsed = ClassifierFolder(folder.directory), stored_classifier._parsed

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr(stored_classifier, "_parsed", parsed)
        folder.store("pets", fitted(ROWS[::-1].copy()), REPORT)
        return parsed(*arguments)

    monkeypatch.setattr(stored_classifier, "_parsed", late)
    assert other.get("pets").version == 2
    assert other.get("pets").classifier.assets["prototypes"].tolist() == ROWS[::-1].tolist()


@pytest.mark.parametrize("breaks", ["arrays", "json"])
def test_a_write_that_breaks_off_leaves_the_old_classifier(
    folder: ClassifierFolder, monkeypatch: pytest.MonkeyPatch, breaks: str
):
    moved, move = [], os.replace

    def breaking(source: Any, target: Any) -> None:
        moved.append(Path(target).suffix)
        if Path(target).suffix == {"arrays": ".safetensors", "json": ".json"}[breaks]:
            raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(os, "replace", breaking)
    with pytest.raises(OSError, match="No space left"):
        folder.store("pets", fitted(ROWS[::-1].copy()), REPORT)
    monkeypatch.setattr(os, "replace", move)
    assert moved == [".safetensors", ".json"][: 1 + (breaks == "json")]  # the arrays first
    read = ClassifierFolder(folder.directory).get("pets")
    assert (read.version, read.classifier.assets["prototypes"].tolist()) == (1, ROWS.tolist())
    assert not [*folder.directory.glob(".*")]
    assert folder.store("pets", fitted(ROWS[::-1].copy()), REPORT).version == 2


def test_files_are_as_open_as_the_umask_allows(tmp_path: Path):
    """A service reads what the command line of another user writes."""
    before = os.umask(0o022)
    try:
        ClassifierFolder(tmp_path / "sets").store("pets", fitted(), REPORT)
    finally:
        os.umask(before)
    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "sets").iterdir()}
    assert modes == {".json": 0o644, ".safetensors": 0o644}
