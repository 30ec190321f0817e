"""The contract of every store (`service.stores`), against answers worked out by hand or by numpy."""

import json
import operator
import subprocess
import sys
from contextlib import ExitStack, closing

import numpy as np
import pytest

from calmclip.models.errors import BadRequest, UnknownName
from calmclip.service import quantized
from calmclip.service.stores import STORES, Condition, Info, Row, open_store

INFO = Info("photos", "tiny-int8", "ab" * 32, 4, "2026-01-01T00:00:00+00:00")
AXES = np.eye(4, dtype=np.float32)


@pytest.fixture(params=["lancedb", "copied", "pgvector"])
def url(request, tmp_path):
    """A new store for each test: a folder, or a database of a real server."""
    if request.param == "pgvector":
        return f"pgvector:{request.getfixturevalue('postgres').database()}"
    return f"lancedb:{tmp_path / 'store'}"


@pytest.fixture
def opened():
    """`open_store`; the stores are closed at the end of the test."""
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(closing(open_store(url)))


def test_every_store_is_under_test():
    assert set(STORES.names()) <= {"lancedb", "pgvector"}


@pytest.fixture
def table(url, opened, request, monkeypatch):
    """An empty table; for ``copied``, a table with a quantized copy in memory, however few rows it has."""
    table = opened(url).create(INFO)
    if "copied" in request.node.name:
        monkeypatch.setattr(quantized, "MIN_ROWS", 1)
        table.upsert([Row(f"before{i}", axis) for i, axis in enumerate([*AXES, *-AXES])])
        table = quantized.QuantizedTable(table, 1 << 20)
        table.delete([f"before{i}" for i in range(8)])
    return table


def ids(hits):
    return [hit.id for hit in hits]


def test_a_store_url_has_a_kind_and_a_location():
    with pytest.raises(BadRequest, match="KIND:LOCATION"):
        open_store("data")
    with pytest.raises(UnknownName, match="did you mean 'lancedb'"):
        open_store("lancdb:data")


def test_a_collection_survives_a_restart(url, table, opened):
    table.upsert([Row("a", AXES[0], {"title": "dünes «x»", "deep": {"list": [1, 2.5, None, True]}})])
    store = opened(url)
    assert store.names() == ["photos"]
    again = store.open("photos")
    assert again.info == INFO
    assert again.count() == 1
    assert again.page(None, 10)[0].meta == {"title": "dünes «x»", "deep": {"list": [1, 2.5, None, True]}}


def test_drop_deletes_a_collection_and_frees_its_name(url, table, opened):
    table.upsert([Row("a", AXES[0])])
    store = opened(url)
    store.drop("photos")
    assert store.names() == []
    assert store.create(INFO).count() == 0


def test_upsert_replaces_by_id(table):
    table.upsert([Row("a", AXES[0], {"v": 1}), Row("b", AXES[1])])
    table.upsert([Row("a", AXES[2], {"v": 2})])
    assert table.count() == 2
    best = table.search(AXES[2], 1)[0]
    assert (best.id, best.meta) == ("a", {"v": 2})
    assert best.score == pytest.approx(1, abs=1e-6)


def test_delete_counts_the_rows_that_existed(table):
    table.upsert([Row("a", AXES[0]), Row("it's", AXES[1]), Row("c", AXES[2])])
    assert table.delete(["a", "it's", "never"]) == 2
    assert table.delete(["a"]) == 0
    assert ids(table.page(None, 10)) == ["c"]


def test_search_is_exact_cosine(table):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table.upsert([Row(f"{i:03}", v.astype(np.float32)) for i, v in enumerate(vectors)])
    query = vectors[17]
    cosines = vectors @ query  # float64
    hits = table.search(query.astype(np.float32), 10)
    assert ids(hits) == [f"{i:03}" for i in np.argsort(-cosines)[:10]]
    assert [hit.score for hit in hits] == pytest.approx(np.sort(cosines)[::-1][:10], abs=1e-5)


def test_pages_go_by_id(table):
    table.upsert([Row(f"{i:02}", AXES[i % 4]) for i in reversed(range(7))])
    table.upsert([Row("03", AXES[0], {"new": True})])
    assert ids(table.page(None, 3)) == ["00", "01", "02"]
    assert ids(table.page("02", 3)) == ["03", "04", "05"]
    assert ids(table.page("05", 3)) == ["06"]
    assert table.page("06", 3) == []


META = [
    {"n": 3, "s": "red", "b": True},
    {"n": 5.5, "s": "it's"},
    {"n": "3", "s": 'quote " and \\ and \n and é'},
    {"n": None, "s": ["red"], "b": "true"},
    {},
    {"n": -2, "a b": 1, "deep": {"n": 3}},
]


@pytest.mark.parametrize(
    ("condition", "wanted"),
    [
        (Condition("n", "in", (3,)), [0]),
        (Condition("n", "in", (3.0, "3")), [0, 2]),
        (Condition("n", "gte", 3), [0, 1]),
        (Condition("n", "gt", 3), [1]),
        (Condition("n", "lt", 3), [5]),
        (Condition("n", "lte", 1e300), [0, 1, 5]),
        (Condition("s", "in", ("it's", "red")), [0, 1]),
        (Condition("s", "in", (META[2]["s"],)), [2]),
        (Condition("s", "gte", "j"), [0, 2]),
        (Condition("b", "in", (True,)), [0]),
        (Condition("b", "in", ("true",)), [3]),
        (Condition("a b", "in", (1,)), [5]),
        (Condition("deep", "in", ("red",)), []),
        (Condition("never", "in", (1,)), []),
        # text that looks like SQL is a name or a value and matches nothing
        (Condition("s", "in", ("x' OR '1' = '1",)), []),
        (Condition("n') OR 1 = 1 --", "in", (1,)), []),
        (Condition('n" OR "1', "in", (3,)), []),
        (Condition("s", "gt", "zzz' OR 'a' < 'b"), []),
    ],
)
def test_filters_compare_types_and_never_run_a_value_as_sql(table, condition, wanted):
    table.upsert([Row(str(i), AXES[i % 4], meta) for i, meta in enumerate(META)])
    assert sorted(ids(table.search(AXES[0], 50, [condition]))) == [str(i) for i in wanted]


def test_strings_are_ordered_as_python_orders_them(table):
    """By code points, on words with characters that JSON can escape in several ways."""
    rng = np.random.default_rng(0)
    letters = [*" !\"#'\\/ab\n\t\x01", "\x7f", "é", "\ud7ff", "\uffff", "🎨"]
    words = ["", "a", "a b", 'a"', *("".join(rng.choice(letters, rng.integers(1, 5))) for _ in range(40))]
    table.upsert([Row(f"{i:03}", AXES[0], {"a.b c": word}) for i, word in enumerate(words)])
    table.upsert(
        [Row(f"no{i}", AXES[0], {"a.b c": other}) for i, other in enumerate([3, True, None, ["b"], {"a": "b"}])]
    )
    orders = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
    for bound in words[:20]:
        for op, holds in orders.items():
            matched = ids(table.search(AXES[0], 100, [Condition("a.b c", op, bound)]))
            assert sorted(matched) == [f"{i:03}" for i, word in enumerate(words) if holds(word, bound)], (op, bound)


def test_all_conditions_must_hold_and_the_filter_comes_before_the_limit(table):
    table.upsert([Row(f"{i:02}", AXES[0], {"n": i}) for i in range(20)])
    table.upsert([Row("far", AXES[1], {"n": 100})])
    between = [Condition("n", "gte", 5), Condition("n", "lt", 8)]
    assert sorted(ids(table.search(AXES[0], 50, between))) == ["05", "06", "07"]
    assert ids(table.search(AXES[0], 1, [Condition("n", "in", (100,))])) == ["far"]


def test_compaction_loses_nothing(table):
    for i in range(20):
        table.upsert([Row(f"{i:02}", AXES[i % 4], {"n": i})])
    table.delete(["00"])
    table.compact()
    assert [item.meta["n"] for item in table.page(None, 50)] == list(range(1, 20))


WRITER = """
import sys, numpy as np
from calmclip.service.stores import Row, open_store
table = open_store(sys.argv[1]).open("photos")
for i in range(10_000):
    table.upsert([Row(f"{i:05}", np.eye(4, dtype=np.float32)[i % 4], {"n": i})])
    print(i, flush=True)
"""


def test_a_killed_writer_leaves_every_acknowledged_row(url, table, opened):
    with subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True) as writer:
        acknowledged = [int(writer.stdout.readline()) for _ in range(15)]
        writer.kill()
        acknowledged += [int(line) for line in writer.stdout.read().splitlines()]
    again = opened(url).open("photos")
    stored = {item.meta["n"] for item in again.page(None, 10_000)}
    assert stored >= set(acknowledged), json.dumps(sorted(stored))
    again.upsert([Row("after", AXES[0])])
