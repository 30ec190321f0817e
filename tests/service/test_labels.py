"""Label sets in a folder that several services share, as the replicas of docker-compose.yml do."""

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import pytest

import calmclip.service.labels
from calmclip.models.errors import BadRequest, LabelSetNotFound, Overloaded
from calmclip.service.labels import LabelSets
from calmclip.service.settings import Limits

Pair = tuple[LabelSets, LabelSets]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return LabelSets(tmp_path / "sets", Limits()), LabelSets(tmp_path / "sets", Limits())


def test_what_one_writes_changes_and_deletes_the_other_sees_at_once(pair: Pair) -> None:
    one, other = pair
    for round_ in range(5):
        for labels in [("cat",), ("cat", "dog")]:
            one.put(f"pets{round_}", labels)
            assert other.get(f"pets{round_}").labels == labels
        assert [found.name for found in other.all()] == [f"pets{round_}"]
        other.delete(f"pets{round_}")
        with pytest.raises(LabelSetNotFound):
            one.get(f"pets{round_}")
        assert one.all() == []


def test_a_second_change_within_one_tick_of_the_file_system_s_clock_is_seen(pair: Pair, tmp_path: Path) -> None:
    one, other = pair
    one.put("pets", ["cat"])
    tick = (tmp_path / "sets").stat().st_mtime_ns
    assert other.get("pets").labels == ("cat",)
    one.put("pets", ["dog"])
    os.utime(tmp_path / "sets", ns=(tick, tick))
    assert other.get("pets").labels == ("dog",)


def test_changes_by_both_at_the_same_time_are_all_counted(pair: Pair) -> None:
    def put(sets: LabelSets, i: int) -> int:
        return sets.put("crowd", [f"label {i}"]).version

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(put, cycle(pair), range(48))) == list(range(1, 49))


def test_a_lock_that_another_keeps_is_not_waited_for_without_end(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calmclip.service.labels, "LOCK_S", 0.1)
    one, other = pair
    one.put("pets", ["cat"])
    folder = os.open(tmp_path / "sets", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        for change in (lambda: other.put("pets", ["dog"]), lambda: other.delete("pets")):
            with pytest.raises(Overloaded, match="locked") as kept:
                change()
            assert kept.value.reason == "writes"
        assert one.get("pets").labels == ("cat",)
    finally:
        os.close(folder)
    assert other.put("pets", ["dog"]).version == 2


def test_a_temperature_is_not_set_on_what_the_other_has_changed_meanwhile(pair: Pair) -> None:
    one, other = pair
    before = one.put("pets", ["cat", "dog"])
    other.put("pets", ["cat", "wolf"])
    with pytest.raises(BadRequest, match="was changed while it was being calibrated"):
        one.calibrate(before, 2.0, "0" * 64)
    assert one.get("pets").labels == ("cat", "wolf")


def test_what_has_not_changed_is_not_read_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair
    one.put("pets", ["cat"])
    monkeypatch.setattr("calmclip.service.labels.time.time_ns", lambda: 2**62)  # long after
    assert other.get("pets").labels == ("cat",)
    monkeypatch.setattr("calmclip.service.labels._read", None)
    assert other.get("pets").labels == ("cat",)
