"""The contract of every store (`service.stores`), against answers worked out by hand or by numpy."""

import json
import operator
import string
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from calmclip.models.errors import BadRequest, CollectionError, CollectionNotFound, UnknownName
from calmclip.service import quantized
from calmclip.service.stores import STORES, Condition, Group, Info, Row, lancedb, open_store

INFO = Info("photos", "tiny-int8", "ab" * 32, 4, "2026-01-01T00:00:00+00:00")
AXES = np.eye(4, dtype=np.float32)


def pytest_generate_tests(metafunc):
    """Each store; a test of a `table` also with the copy in memory."""
    if "url" in metafunc.fixturenames:
        kinds = ["lancedb", "copied", "pgvector"] if "table" in metafunc.fixturenames else ["lancedb", "pgvector"]
        metafunc.parametrize("url", kinds, indirect=True)


@pytest.fixture
def url(request, tmp_path):
    """A new store for each test: a folder, or a database of a real server."""
    if request.param == "pgvector":
        return f"pgvector:{request.getfixturevalue('postgres').database()}"
    return f"lancedb:{tmp_path / 'store'}"


@pytest.fixture
def opened():
    """`open_store`, as after a restart: it closes the store that it opened before. The last is closed at the end."""
    with ExitStack() as stack:

        def reopened(url):
            stack.close()
            return stack.enter_context(closing(open_store(url)))

        yield reopened


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
    {"l": [1.0, "1", [2], {"x": [2, "a"]}, "a,b]", None, True]},
]


CONDITIONS = [
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
    # what equals none, only of the same type; a missing field never
    (Condition("n", "not_in", (3,)), [1, 5]),
    (Condition("n", "not_in", (3, "4")), [1, 2, 5]),
    (Condition("b", "not_in", (False,)), [0]),
    (Condition("b", "not_in", (True, False)), []),
    (Condition("s", "not_in", ("red",)), [1, 2]),
    (Condition("never", "not_in", (1,)), []),
    (Condition("s", "contains", "e"), [0, 2]),
    (Condition("s", "contains", "n"), [2]),  # no part of an escaped line end
    (Condition("s", "contains", "\\ and \n"), [2]),
    (Condition("s", "contains", "E"), []),
    (Condition("s", "contains", "%"), []),
    (Condition("s", "contains", ".*"), []),
    (Condition("n", "contains", "3"), [2]),
    (Condition("s", "has", "red"), [3]),
    (Condition("s", "has", "re"), []),
    (Condition("l", "has", 1), [6]),
    (Condition("l", "has", "1"), [6]),
    (Condition("l", "has", 2), []),  # in a list of the list
    (Condition("l", "has", "a,b]"), [6]),
    (Condition("l", "has", False), []),
    (Condition("n", "exists", True), [0, 1, 2, 5]),
    (Condition("n", "exists", False), [3, 4, 6]),
    (Group("or", ((Condition("n", "in", (3,)),), (Condition("s", "has", "red"),))), [0, 3]),
    (
        Group("or", ((Condition("n", "gte", 3), Condition("s", "contains", "'")), (Condition("l", "exists", True),))),
        [1, 6],
    ),
    # true of every number, and of nothing else: an engine that simplifies them must not forget null
    *(
        (Group("or", ((Condition("n", *first),), (Condition("n", *second),))), [0, 1, 5])
        for first, second in [
            (("not_in", (1,)), ("not_in", (2,))),
            (("not_in", (1, 2)), ("not_in", (3,))),
            (("not_in", (3,)), ("in", (3,))),
            (("gt", 3), ("lte", 3)),
            (("gte", 3), ("not_in", (3,))),
        ]
    ),
    (Group("or", ((Condition("s", "not_in", ("a",)),), (Condition("s", "not_in", ("b",)),))), [0, 1, 2]),
    (Group("or", ((Condition("b", "not_in", (True,)),), (Condition("b", "not_in", (False,)),))), [0]),
    (Group("and", ((Condition("n", "gte", 3),), (Group("or", ((Condition("s", "in", ("red",)),),)),))), [0]),
    # text that looks like SQL is a name or a value and matches nothing
    (Condition("s", "in", ("x' OR '1' = '1",)), []),
    (Condition("n') OR 1 = 1 --", "in", (1,)), []),
    (Condition('n" OR "1', "in", (3,)), []),
    (Condition("s", "gt", "zzz' OR 'a' < 'b"), []),
]


def test_filters_compare_types_and_never_run_a_value_as_sql(table):
    table.upsert([Row(str(i), AXES[i % 4], meta) for i, meta in enumerate(META)])
    for condition, wanted in CONDITIONS:
        assert sorted(ids(table.search(AXES[0], 50, [condition]))) == [str(i) for i in wanted], condition


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


def test_every_character_is_itself_in_each_condition_on_strings(url, opened):
    """Stores write some of them as escapes; `not_in`, `contains` and `has` then compare what is written."""
    table = opened(url).create(INFO)
    letters = [*map(chr, range(1, 33)), *string.punctuation, "a", "n", "u", "0", "\x7f", "é", "\u2028", "\uffff", "🎨"]
    table.upsert([Row(f"{i:03}", AXES[0], {"s": f"🏁{c}", "l": [c, f"{c}{c}"]}) for i, c in enumerate(letters)])
    for i, letter in enumerate(letters):
        rest = tuple(f"🏁{c}" for c in letters if c != letter)
        same = [
            Condition("s", "contains", f"🏁{letter}"),
            Condition("l", "has", letter),
            Condition("s", "not_in", rest),
        ]
        assert ids(table.search(AXES[0], 300, same)) == [f"{i:03}"], letter
        assert ids(table.search(AXES[0], 300, [same[i % 3]])) == [f"{i:03}"], (letter, same[i % 3].op)


def test_items_are_read_by_id_and_with_their_vectors(table):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(9, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = ["a/b", "it's", "é\n", "..", "%2F", "a", "A", " ", "🎨"]
    table.upsert([Row(id_, vectors[i], {"n": i}) for i, id_ in enumerate(names)])
    for row in table.get([*names, "never"]):
        i = names.index(row.id)
        assert (row.meta, row.original) == ({"n": i}, None)
        np.testing.assert_array_equal(row.vector, vectors[i])
    assert sorted(row.id for row in table.get([*names, "never"])) == sorted(names)
    assert table.get(["never"]) == []
    page = table.page(None, 5, vectors=True)
    assert ids(page) == sorted(names)[:5]
    for item in page:
        np.testing.assert_array_equal(item.vector, vectors[names.index(item.id)])
    assert [item.vector for item in table.page("it's", 5)] == [None] * 2
    assert table.page("🎨", 5, vectors=True) == []


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


def test_a_killed_writer_leaves_every_acknowledged_row(url, opened):
    store = opened(url)
    store.create(INFO)
    store.close()
    with subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True) as writer:
        acknowledged = [int(writer.stdout.readline()) for _ in range(15)]
        writer.kill()
        acknowledged += [int(line) for line in writer.stdout.read().splitlines()]
    again = opened(url).open("photos")
    stored = {item.meta["n"] for item in again.page(None, 10_000)}
    assert stored >= set(acknowledged), json.dumps(sorted(stored))
    again.upsert([Row("after", AXES[0])])


KEPT = replace(INFO, originals=True)
ORIGINALS = ["dünes «x»\n", b"\xff\xd8\x00\x01", "", b"", None]


def all_rows(table):
    """id -> (vector, meta, original)."""
    rows = [row for batch in table.rows() for row in batch]
    stored = {row.id: (row.vector.tolist(), row.meta, row.original) for row in rows}
    assert len(stored) == len(rows)
    return stored


def test_originals_are_kept_replaced_and_deleted_with_their_rows(url, opened):
    table = opened(url).create(KEPT)
    assert table.info.originals
    table.upsert([Row(f"{i}", AXES[i % 4], {"n": i}, original) for i, original in enumerate(ORIGINALS)])
    table.upsert([Row("0", AXES[1], {}, b"picture"), Row("1", AXES[2])])
    table.delete(["4"])
    table.compact()
    wanted = {
        "0": (AXES[1].tolist(), {}, b"picture"),
        "1": (AXES[2].tolist(), {}, None),
        "2": (AXES[2].tolist(), {"n": 2}, ""),
        "3": (AXES[3].tolist(), {"n": 3}, b""),
    }
    assert all_rows(table) == wanted
    assert {row.id: row.original for row in table.get(["1", "2", "3"], originals=True)} == {
        "1": None,
        "2": "",
        "3": b"",
    }
    without = {row.id: (row.vector.tolist(), row.meta, row.original) for batch in table.rows(False) for row in batch}
    assert without == {id_: (vector, meta, None) for id_, (vector, meta, _) in wanted.items()}
    assert all_rows(opened(url).open("photos")) == wanted


def test_a_collection_without_originals_stores_none(table):
    table.upsert([Row("a", AXES[0], {"n": 1}, "text"), Row("b", AXES[1], {}, b"picture")])
    assert all_rows(table) == {"a": (AXES[0].tolist(), {"n": 1}, None), "b": (AXES[1].tolist(), {}, None)}
    table.verify()


def test_rows_come_in_batches_of_bounded_bytes(url, opened, monkeypatch):
    for module in (lancedb, "calmclip.service.stores.pgvector"):
        monkeypatch.setattr(f"{getattr(module, '__name__', module)}.BATCH_BYTES", 100_000)
        monkeypatch.setattr(f"{getattr(module, '__name__', module)}.BATCH_ROWS", 500)
    store = opened(url)
    table = store.create(KEPT)
    table.upsert([Row(f"{i:04}", AXES[i % 4]) for i in range(1200)])
    assert [len(batch) for batch in table.rows()] == [500, 500, 200]
    noise = np.random.default_rng(0)
    large = store.replace(KEPT, [[Row(f"{i:04}", AXES[i % 4], {}, noise.bytes(20_000)) for i in range(50)]])
    sizes = [len(batch) for batch in large.rows()]
    assert sum(sizes) == 50
    assert max(sizes) <= 5


def test_rows_are_one_snapshot_whatever_is_written_meanwhile(url, table, monkeypatch):
    monkeypatch.setattr(lancedb, "VERSION_AGE", timedelta(0))
    monkeypatch.setattr(lancedb, "CLOCK_MARGIN", timedelta(seconds=0.5))
    for module in (lancedb, "calmclip.service.stores.pgvector"):
        monkeypatch.setattr(f"{getattr(module, '__name__', module)}.BATCH_ROWS", 10)
    for start in range(0, 300, 5):  # in more files than are opened ahead of the reader
        table.upsert([Row(f"{i:03}", AXES[i % 4], {"n": i}) for i in range(start, start + 5)])
    batches = table.rows()
    first = next(batches)
    for turn in range(3):
        table.upsert([Row(f"{i:03}", AXES[0], {"n": -1}) for i in range(turn, 300, 3)])
        table.upsert([Row(f"new{turn}", AXES[0])])
        table.delete([f"{i:03}" for i in range(turn, 300, 7)])
        time.sleep(0.6)
        table.compact()
    rows = first + [row for batch in batches for row in batch]
    assert sorted(row.meta["n"] for row in rows) == list(range(300))
    now = {item.id for item in table.page(None, 1000)}
    assert all_rows(table).keys() == now
    unfinished = table.rows()
    next(unfinished)
    unfinished.close()
    monkeypatch.setattr(lancedb, "CLOCK_MARGIN", timedelta(0))
    table.compact()
    assert all_rows(table).keys() == now
    if url.startswith("lancedb:"):
        folder = Path(url.removeprefix("lancedb:"))
        assert not [*folder.glob("calmclip-rows-*"), *folder.glob("*/_refs/tags/*")]
        assert len([*folder.glob("*/_versions/*.manifest")]) == 1  # nothing holds older versions any more


def test_replace_changes_rows_and_info_at_once(url, table, opened):
    table.upsert([Row(str(i), AXES[i % 4], {"n": i}) for i in range(50)])
    store = opened(url)
    old = store.open("photos")
    info = Info("photos", "other", "cd" * 32, 3, "2026-02-01T00:00:00+00:00", originals=True)
    three = np.eye(3, dtype=np.float32)

    def embedded():
        for batch in old.rows():
            yield [Row(row.id, three[row.meta["n"] % 3], row.meta, f"text {row.id}") for row in batch]
            assert store.open("photos").count() == 50
            assert store.open("photos").info == INFO

    new = store.replace(info, embedded())
    wanted = {str(i): (three[i % 3].tolist(), {"n": i}, f"text {i}") for i in range(50)}
    assert all_rows(new) == wanted
    for again in (new, store.open("photos"), opened(url).open("photos")):
        assert again.info == info
    again.verify()
    again.upsert([Row("0", three[1], {"n": 0}), Row("new", three[2])])
    assert again.count() == 51
    again.compact()
    assert ids(again.search(three[2], 1, [Condition("n", "in", (2,))])) == ["2"]
    assert all_rows(again)["0"] == (three[1].tolist(), {"n": 0}, None)


def test_replace_creates_a_collection(url, opened):
    store = opened(url)
    batches = [[Row(f"{turn}{i}", AXES[i], {"n": i}) for i in range(4)] for turn in range(3)]
    table = store.replace(INFO, [*batches, []])
    assert store.names() == ["photos"]
    assert table.count() == 12
    assert store.replace(INFO, []).count() == 0
    store.open("photos").verify()


class Broke(Exception): ...


@pytest.mark.parametrize("exists", [True, False])
def test_a_replace_that_fails_leaves_the_old_collection(url, opened, exists):
    store = opened(url)
    if exists:
        table = store.create(INFO)
        table.upsert([Row("a", AXES[0], {"n": 1})])

    def rows():
        yield [Row(str(i), AXES[0]) for i in range(5000)]
        raise Broke("the picture is broken")

    with pytest.raises(Broke, match=r"^the picture is broken$"):
        store.replace(KEPT, rows())
    store = opened(url)
    assert store.names() == ["photos"] * exists
    if exists:
        table = store.open("photos")
        assert table.info == INFO
        assert all_rows(table) == {"a": (AXES[0].tolist(), {"n": 1}, None)}
        table.compact()
        table.verify()
        if url.startswith("lancedb:"):  # the rows that were written are gone
            assert sum(path.stat().st_size for path in Path(url.removeprefix("lancedb:")).rglob("data/*")) < 5000


REPLACER = """
import sys, numpy as np
from dataclasses import replace
from calmclip.service.stores import Row, open_store
store = open_store(sys.argv[1])
axes = np.eye(4, dtype=np.float32)
def rows(count):
    for start in range(0, count, 1000):
        print("rows", flush=True)
        yield [Row(f"{i:06}", axes[i % 4], {"n": i}, "x" * 100) for i in range(start, start + 1000)]
info = store.open("photos").info
for turn in range(10_000):
    store.replace(replace(info, model=f"turn {turn}", originals=True), rows(3000))
    print("done", turn, flush=True)
"""


@pytest.mark.parametrize("lines", [2, 9])
def test_a_killed_replace_leaves_the_old_rows_or_the_new_ones(url, opened, lines):
    store = opened(url)
    table = store.create(INFO)
    table.upsert([Row(f"{i:06}", AXES[0], {"n": -1}) for i in range(100)])
    store.close()
    with subprocess.Popen([sys.executable, "-c", REPLACER, url], stdout=subprocess.PIPE, text=True) as writer:
        heard = [writer.stdout.readline().split() for _ in range(lines)]
        writer.kill()
        heard += [line.split() for line in writer.stdout]
    finished = [int(words[1]) for words in heard if words[:1] == ["done"]]
    store = opened(url)
    assert store.names() == ["photos"]
    table = store.open("photos")
    table.verify()
    rows = all_rows(table)
    if table.info == INFO:
        assert not finished
        assert {row[1]["n"] for row in rows.values()} == {-1}
        assert len(rows) == 100
    else:
        assert int(table.info.model.split()[1]) - max(finished, default=-1) in (0, 1)
        assert {row[1]["n"] for row in rows.values()} == set(range(3000))
    table.upsert([Row("after", AXES[0])])
    table.compact()
    assert table.count() == len(rows) + 1


def test_a_store_that_is_opened_for_reading_refuses_writes_and_creates_nothing(url, table, tmp_path):
    table.upsert([Row("a", AXES[0])])
    with closing(open_store(url, read_only=True)) as store:  # beside the one that writes
        reader = store.open("photos")
        table.upsert([Row("b", AXES[1])])
        assert reader.count() == 2
        assert ids(reader.search(AXES[1], 1)) == ["b"]
        for write in (
            lambda: reader.upsert([Row("c", AXES[0])]),
            lambda: reader.delete(["a"]),
            lambda: store.create(INFO),
            lambda: store.replace(INFO, []),
            lambda: store.drop("photos"),
        ):
            with pytest.raises(CollectionError, match="opened for reading"):
                write()
    with pytest.raises(CollectionNotFound, match="there is no folder"):
        open_store(f"lancedb:{tmp_path / 'nowhere'}", read_only=True)
    assert not (tmp_path / "nowhere").exists()


def test_what_is_not_there_is_not_found(url, opened):
    store = opened(url)
    with pytest.raises(CollectionNotFound, match="'nothing'"):
        store.open("nothing")
