"""Classifiers in a folder that several services share, as the replicas of docker-compose.yml do."""

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

import calmclip.service.files
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, ClassifierNotFound, Overloaded
from calmclip.service.classifiers import Classifiers
from calmclip.service.settings import Limits

Pair = tuple[Classifiers, Classifiers]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Classifiers(tmp_path / "sets", Limits()), Classifiers(tmp_path / "sets", Limits())


def test_what_one_writes_changes_and_deletes_the_other_sees_at_once(pair: Pair) -> None:
    one, other = pair
    for round_ in range(5):
        for labels in [("cat",), ("cat", "räv")]:
            one.put(f"pets{round_}", Classifier(labels))
            assert other.get(f"pets{round_}").classifier.labels == labels
        assert [found.name for found in other.all()] == [f"pets{round_}"]
        other.delete(f"pets{round_}")
        with pytest.raises(ClassifierNotFound):
            one.get(f"pets{round_}")
        assert one.all() == []


def test_a_second_change_within_one_tick_of_the_file_system_s_clock_is_seen(pair: Pair, tmp_path: Path) -> None:
    one, other = pair
    one.put("pets", Classifier(("cat",)))
    tick = (tmp_path / "sets").stat().st_mtime_ns
    assert other.get("pets").classifier.labels == ("cat",)
    one.put("pets", Classifier(("dog",)))
    os.utime(tmp_path / "sets", ns=(tick, tick))
    assert other.get("pets").classifier.labels == ("dog",)


def test_changes_by_both_at_the_same_time_are_all_counted(pair: Pair) -> None:
    def put(known: Classifiers, i: int) -> int:
        return known.put("crowd", Classifier((f"label {i}",))).version

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(put, cycle(pair), range(48))) == list(range(1, 49))


def test_a_lock_that_another_keeps_is_not_waited_for_without_end(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calmclip.service.files, "LOCK_S", 0.1)
    one, other = pair
    one.put("pets", Classifier(("cat",)))
    folder = os.open(tmp_path / "sets", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        for change in (lambda: other.put("pets", Classifier(("dog",))), lambda: other.delete("pets")):
            with pytest.raises(Overloaded, match="locked") as kept:
                change()
            assert kept.value.reason == "writes"
        assert one.get("pets").classifier.labels == ("cat",)
    finally:
        os.close(folder)
    assert other.put("pets", Classifier(("dog",))).version == 2


def test_a_temperature_is_not_set_on_what_the_other_has_changed_meanwhile(pair: Pair) -> None:
    one, other = pair
    before = one.put("pets", Classifier(("cat", "dog")))
    other.put("pets", Classifier(("cat", "wolf")))
    with pytest.raises(BadRequest, match="was changed while pictures were looked at for it"):
        one.change(before, temperature=2.0)
    assert one.get("pets").classifier.labels == ("cat", "wolf")


def test_what_has_not_changed_is_not_read_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair
    one.put("pets", Classifier(("cat",)))
    monkeypatch.setattr("calmclip.service.classifiers.time.time_ns", lambda: 2**62)  # long after
    assert other.get("pets").classifier.labels == ("cat",)
    monkeypatch.setattr("calmclip.service.classifiers._read", None)
    assert other.get("pets").classifier.labels == ("cat",)


def fitted(*numbers: float) -> Classifier:
    rows = np.eye(3, dtype=np.float32)[:2] * np.float32(numbers[0])
    return Classifier(("cat", "dog"), head="prototype", assets={"prototypes": rows}, family="f" * 64)


def test_arrays_of_a_head_lie_beside_it_under_their_hash_and_go_with_it(pair: Pair, tmp_path: Path) -> None:
    one, other = pair
    first = one.put("pets", fitted(1))
    assert other.get("pets").classifier.assets["prototypes"].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == [first.assets, "pets.json"]
    assert one.put("pets", fitted(1)).version == 1
    second = other.put("pets", fitted(2))
    assert (second.version, second.assets != first.assets) == (2, True)
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == [second.assets, "pets.json"]
    assert one.get("pets").classifier.assets["prototypes"].max() == 2
    third = one.put("pets", Classifier(("cat", "dog")))
    assert (third.assets, third.version) == ("", 3)
    other.put("others", fitted(3))
    other.delete("others")
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["pets.json"]


def test_arrays_that_are_not_what_was_written_are_refused_by_their_file(pair: Pair, tmp_path: Path) -> None:
    registered = pair[0].put("pets", fitted(1))
    path = tmp_path / "sets" / registered.assets
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BadRequest, match=rf"pets\.json is no classifier .*{registered.assets} is not what was written"):
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
