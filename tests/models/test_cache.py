"""The cache of drivers: rows by key, bounded by their number, least recently used first out, counted, for any
thread."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from calmclip.models.cache import RowCache
from calmclip.models.flow import Arrays, CacheGet, CachePut, Call


def call(*keys: str) -> Call:
    return Call("text", {"ids": np.array([[len(key)] for key in keys])}, keys)


def run(cache: RowCache, *keys: str, owner: str = "one") -> tuple[list[list[int]], list[list[int]] | None]:
    """The rows of a graph that answers each id times ten, and the ids that it was fed."""
    part = cache.split(owner, call(*keys))
    fed = None if part.feeds is None else part.feeds["ids"]
    rows = part.complete({} if fed is None else {"rows": 10 * fed})["rows"]
    return rows.tolist(), None if fed is None else fed.tolist()


def test_only_rows_that_are_not_cached_run_and_all_return_in_their_order():
    cache = RowCache(10)
    assert run(cache, "a", "bb") == ([[10], [20]], [[1], [2]])
    assert run(cache, "ccc", "bb", "a", "ccc") == ([[30], [20], [10], [30]], [[3], [3]])
    assert run(cache, "a") == ([[10]], None)
    assert run(cache, "a", owner="two") == ([[10]], [[1]])  # bundles have separate rows
    assert (cache.hits, cache.misses, len(cache)) == (3, 5, 4)


def test_a_get_is_answered_with_the_rows_that_are_cached():
    cache, counted = RowCache(10), []
    run(cache, "a", "bb")
    asked = CacheGet("text", ("bb", "ccc", "a"))
    rows = cache.answer("one", asked, lambda hits, misses: counted.append((hits, misses)))
    assert {key: outputs["rows"].tolist() for key, outputs in rows.items()} == {"bb": [20], "a": [10]}
    assert counted == [(2, 0)]  # the third row is counted when it runs
    assert cache.answer("one", CacheGet("image", ("a",))) == {}


@pytest.mark.parametrize(("size", "cached"), [(0, []), (1, ["d"]), (3, ["a", "c", "d"]), (4, ["a", "b", "c", "d"])])
def test_the_least_recently_used_row_is_dropped_first(size: int, cached: list[str]):
    cache = RowCache(size)
    for key in ("a", "b", "c", "a", "d"):
        run(cache, key)
    assert [key for key in "abcd" if cache.answer("one", CacheGet("text", (key,)))] == cached
    assert len(cache) == len(cached)


def test_a_put_displaces_rows_and_too_large_a_put_is_not_cached():
    cache = RowCache(5)
    matrix: Arrays = {"vectors": np.ones((3, 2))}
    run(cache, "a", "b", "c")
    cache.answer("one", CachePut("labels", "k", matrix, 3))
    assert len(cache) == 5
    assert cache.answer("one", CacheGet("labels", ("k",))) == {"k": matrix}
    cache.answer("one", CachePut("labels", "large", matrix, 6))
    assert not cache.answer("one", CacheGet("labels", ("large",)))
    assert cache.answer("one", CacheGet("labels", ("k",)))  # it displaced nothing


def test_a_row_does_not_keep_its_batch_alive():
    cache = RowCache(4)
    part = cache.split("one", call("a", "b"))
    batch = np.arange(2_000.0).reshape(2, 1000)
    part.complete({"rows": batch})
    assert all(not np.shares_memory(batch, row.outputs["rows"]) for row in cache._rows.values())


def test_only_a_fingerprint_of_a_key_is_stored():
    cache = RowCache(4)
    keys = ["x" * 100_000, "x" * 99_999, ""]
    run(cache, *keys)
    assert sorted(len(key) for _, _, key in cache._rows) == [16] * 3


def test_threads_use_one_cache_with_exact_counts():
    cache = RowCache(50)

    def use(seed: int) -> None:
        for key in np.random.default_rng(seed).integers(0, 100, 300):
            rows, _ = run(cache, "x" * int(key))
            assert rows == [[10 * int(key)]]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert cache.hits + cache.misses == 8 * 300
    assert len(cache) == len(cache._rows) == 50
