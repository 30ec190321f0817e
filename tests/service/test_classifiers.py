"""Classifiers in a folder that several services share, like the replicas of docker-compose.yml."""

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

import calmclip.models.files
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, ClassifierNotFound, Overloaded
from calmclip.service.classifiers import Classifiers
from calmclip.service.settings import Limits

Pair = tuple[Classifiers, Classifiers]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Classifiers(tmp_path / "sets", Limits()), Classifiers(tmp_path / "sets", Limits())


def test_writes_and_deletes_of_a_service_are_visible_to_the_other_at_once(pair: Pair) -> None:
    first, second = pair
    for round_ in range(5):
        for labels in [("cat",), ("cat", "räv")]:
            first.put(f"pets{round_}", Classifier(labels))
            assert second.get(f"pets{round_}").classifier.labels == labels
        assert [classifier.name for classifier in second.all()] == [f"pets{round_}"]
        second.delete(f"pets{round_}")
        with pytest.raises(ClassifierNotFound):
            first.get(f"pets{round_}")
        assert first.all() == []


def test_a_second_change_within_a_tick_of_the_file_systems_clock_is_noticed(pair: Pair, tmp_path: Path) -> None:
    first, second = pair
    first.put("pets", Classifier(("cat",)))
    tick = (tmp_path / "sets").stat().st_mtime_ns
    assert second.get("pets").classifier.labels == ("cat",)
    first.put("pets", Classifier(("dog",)))
    os.utime(tmp_path / "sets", ns=(tick, tick))
    assert second.get("pets").classifier.labels == ("dog",)


def test_concurrent_changes_by_both_are_all_counted(pair: Pair) -> None:
    def put(known: Classifiers, i: int) -> int:
        return known.put("crowd", Classifier((f"label {i}",))).version

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(put, cycle(pair), range(48))) == list(range(1, 49))


def test_waiting_for_a_held_lock_has_a_limit(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calmclip.models.files, "LOCK_S", 0.1)
    first, second = pair
    first.put("pets", Classifier(("cat",)))
    folder = os.open(tmp_path / "sets", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        for change in (lambda: second.put("pets", Classifier(("dog",))), lambda: second.delete("pets")):
            with pytest.raises(Overloaded, match="locked") as refused:
                change()
            assert refused.value.reason == "writes"
        assert first.get("pets").classifier.labels == ("cat",)
    finally:
        os.close(folder)
    assert second.put("pets", Classifier(("dog",))).version == 2


def test_a_temperature_is_not_set_on_a_classifier_that_the_other_has_changed(pair: Pair) -> None:
    first, second = pair
    before = first.put("pets", Classifier(("cat", "dog")))
    second.put("pets", Classifier(("cat", "wolf")))
    with pytest.raises(BadRequest, match="another request changed classifier 'pets' while"):
        first.change(before, temperature=2.0)
    assert first.get("pets").classifier.labels == ("cat", "wolf")


def test_an_unchanged_file_is_not_read_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair
    first.put("pets", Classifier(("cat",)))
    monkeypatch.setattr("calmclip.models.stored_classifier.time_ns", lambda: 2**62)  # long after
    assert second.get("pets").classifier.labels == ("cat",)
    monkeypatch.setattr("calmclip.models.stored_classifier._read", None)
    assert second.get("pets").classifier.labels == ("cat",)


def fitted(*numbers: float) -> Classifier:
    rows = np.eye(3, dtype=np.float32)[:2] * np.float32(numbers[0])
    return Classifier(("cat", "dog"), head="prototype", assets={"prototypes": rows}, family="f" * 64)


def test_arrays_of_a_head_are_files_named_by_hash_and_are_deleted_with_it(pair: Pair, tmp_path: Path) -> None:
    first, second = pair
    version1 = first.put("pets", fitted(1))
    assert second.get("pets").classifier.assets["prototypes"].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == [version1.arrays, "pets.json"]
    assert first.put("pets", fitted(1)).version == 1
    version2 = second.put("pets", fitted(2))
    assert (version2.version, version2.arrays != version1.arrays) == (2, True)
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == [version2.arrays, "pets.json"]
    assert first.get("pets").classifier.assets["prototypes"].max() == 2
    version3 = first.put("pets", Classifier(("cat", "dog")))
    assert (version3.arrays, version3.version) == ("", 3)
    second.put("others", fitted(3))
    second.delete("others")
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["pets.json"]


def test_changed_array_files_are_refused_by_name(pair: Pair, tmp_path: Path) -> None:
    registered = pair[0].put("pets", fitted(1))
    path = tmp_path / "sets" / registered.arrays
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BadRequest, match=rf"pets\.json is not a classifier .*{registered.arrays} has changed since"):
        Classifiers(tmp_path / "sets", Limits())


def test_a_head_that_does_not_fit_its_labels_is_not_registered(pair: Pair) -> None:
    for wrong, says in (
        (replace(fitted(1), labels=("cat", "dog", "fox")), "has 2 columns; expected one for each of 3 labels"),
        (replace(fitted(1), assets={}), r"has the assets \[\]; expected \['prototypes'\]"),
        (replace(fitted(1), params={"scale": 0}), "params .*scale"),
        (Classifier(("cat", "dog", "cat")), "the label 'cat' is given twice"),
        (Classifier(("cat",), descriptions={"cat": ("x",) * 33}), "33 descriptions of 'cat' were given; at most 32"),
    ):
        with pytest.raises(BadRequest, match=says):
            pair[0].put("pets", wrong)
    assert pair[0].all() == []
