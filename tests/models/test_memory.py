"""The memory of drivers: rows by key, bounded by their number, least recently used first out, counted, for any
thread."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from calmclip.models.flow import Arrays, Call, Keep, Recall
from calmclip.models.memory import Memory


def call(*keys: str) -> Call:
    return Call("text", {"ids": np.array([[len(key)] for key in keys])}, keys)


def run(memory: Memory, *keys: str, owner: str = "one") -> tuple[list[list[int]], list[list[int]] | None]:
    """The rows of a graph that answers each id times ten, and the ids that it was fed."""
    part = memory.split(owner, call(*keys))
    fed = None if part.feeds is None else part.feeds["ids"]
    rows = part.complete({} if fed is None else {"rows": 10 * fed})["rows"]
    return rows.tolist(), None if fed is None else fed.tolist()


def test_only_rows_that_are_not_known_are_run_and_all_come_in_their_order():
    memory = Memory(10)
    assert run(memory, "a", "bb") == ([[10], [20]], [[1], [2]])
    assert run(memory, "ccc", "bb", "a", "ccc") == ([[30], [20], [10], [30]], [[3], [3]])
    assert run(memory, "a") == ([[10]], None)
    assert run(memory, "a", owner="two") == ([[10]], [[1]])  # the rows of one bundle are none of another's
    assert (memory.hits, memory.misses, len(memory)) == (3, 5, 4)


def test_a_recall_is_answered_where_every_row_is_known():
    memory, counted = Memory(10), []
    run(memory, "a", "bb")
    assert memory.answer("one", Recall("text", ("a", "ccc"))) is None
    found = memory.answer("one", Recall("text", ("bb", "a", "bb")), lambda hits, misses: counted.append((hits, misses)))
    assert found
    assert found["rows"].tolist() == [[20], [10], [20]]
    assert counted == [(3, 0)]
    assert memory.answer("one", Recall("image", ("a",))) is None


@pytest.mark.parametrize(("size", "kept"), [(0, []), (1, ["d"]), (3, ["a", "c", "d"]), (4, ["a", "b", "c", "d"])])
def test_what_was_used_longest_ago_goes_first(size: int, kept: list[str]):
    memory = Memory(size)
    for key in ("a", "b", "c", "a", "d"):
        run(memory, key)
    assert [key for key in "abcd" if memory.answer("one", Recall("text", (key,)))] == kept
    assert len(memory) == len(kept)


def test_what_was_made_of_rows_takes_their_place_and_too_much_is_not_kept():
    memory = Memory(5)
    matrix: Arrays = {"vectors": np.ones((3, 2))}
    run(memory, "a", "b", "c")
    memory.answer("one", Keep("labels", "k", matrix, 3))
    assert len(memory) == 5
    found = memory.answer("one", Recall("labels", ("k",)))
    assert found
    assert found["vectors"].shape == (1, 3, 2)
    memory.answer("one", Keep("labels", "large", matrix, 6))
    assert memory.answer("one", Recall("labels", ("large",))) is None
    assert memory.answer("one", Recall("labels", ("k",)))  # nothing had to go for it


def test_a_row_does_not_hold_the_batch_it_came_with():
    memory = Memory(4)
    part = memory.split("one", call("a", "b"))
    batch = np.arange(2_000.0).reshape(2, 1000)
    part.complete({"rows": batch})
    assert all(not np.shares_memory(batch, row.outputs["rows"]) for row in memory._rows.values())


def test_of_a_key_only_a_fingerprint_is_held():
    memory = Memory(4)
    keys = ["x" * 100_000, "x" * 99_999, ""]
    run(memory, *keys)
    assert sorted(len(key) for _, _, key in memory._rows) == [16] * 3


def test_threads_share_it_without_losing_count():
    memory = Memory(50)

    def use(seed: int) -> None:
        for key in np.random.default_rng(seed).integers(0, 100, 300):
            rows, _ = run(memory, "x" * int(key))
            assert rows == [[10 * int(key)]]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert memory.hits + memory.misses == 8 * 300
    assert len(memory) == len(memory._rows) == 50
