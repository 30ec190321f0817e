"""The copy in memory: what it proposes over a real LanceDB table, against all cosines in float64."""

import threading

import numpy as np
import pytest

from calmclip.service import quantized
from calmclip.service.quantized import Quantized
from calmclip.service.stores import Condition, Info, Row, open_store

DIM = 96  # no multiple of 64: the last word of signs is half empty
RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(60, DIM))


def draw(n):
    """Unit vectors around 60 centres, off the origin as a tower's are."""
    x = CENTRES[RNG.integers(0, 60, n)] + RNG.normal(size=(n, DIM)) + 0.5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


VECTORS = draw(6000)
QUERIES = draw(40)


def rows(start, end, vectors=VECTORS):
    return [Row(f"{i:05}", vectors[i], {"n": i}) for i in range(start, end)]


def best(query, there, top_k=10):
    cosines = VECTORS.astype(np.float64)[there] @ query
    return [f"{there[i]:05}" for i in np.argsort(-cosines)[:top_k]]


@pytest.fixture
def plain(tmp_path):
    table = open_store(f"lancedb:{tmp_path}").create(Info("c", "m", "d", DIM, ""))
    table.upsert(rows(0, 3000))
    return table


@pytest.fixture
def table(plain, monkeypatch):
    monkeypatch.setattr(quantized, "LEAST", 1000)
    return Quantized(plain, 1 << 20)


@pytest.fixture
def scans(plain, monkeypatch):
    """Searches of the table itself, which a copy makes needless."""
    asked = []
    search = plain.search
    monkeypatch.setattr(plain, "search", lambda *a: asked.append(a) or search(*a))
    return asked


def test_it_finds_what_is_nearest_with_exact_scores(table, scans):
    hits = 0
    for query in QUERIES:
        found = table.search(query, 10)
        hits += len({one.id for one in found} & set(best(query, np.arange(3000))))
        exact = [float(VECTORS[int(one.id)].astype(np.float64) @ query) for one in found]
        assert [one.score for one in found] == pytest.approx(exact, abs=1e-6)
        assert exact == sorted(exact, reverse=True)
        assert [one.meta["n"] for one in found] == [int(one.id) for one in found]
    assert hits / 400 >= 0.99
    assert not scans


def test_what_was_written_since_is_found_and_what_was_removed_is_not(table, scans):
    table.upsert(rows(3000, 4500))  # beyond the room it was made with
    table.upsert([Row("00007", VECTORS[5000], {"n": -7})])
    assert table.delete(["00003", "never"]) == 1
    assert [(one.id, one.meta) for one in table.search(VECTORS[5000], 1)] == [("00007", {"n": -7})]
    assert table.search(VECTORS[4000], 1)[0].id == "04000"
    assert table.search(VECTORS[7], 1)[0].score < 0.999  # what 00007 was
    assert "00003" not in {one.id for one in table.search(VECTORS[3], 100)}
    table.compact()  # what moves rows about in the store changes no place
    assert table.search(VECTORS[4000], 1)[0].id == "04000"
    assert not scans


def test_deleted_rows_leave_no_gap_in_an_answer(table):
    there = np.arange(0, 3000, 2)
    table.delete([f"{i:05}" for i in range(1, 3000, 2)])
    for query in QUERIES[:5]:
        assert [one.id for one in table.search(query, 10)] == best(query, there)


def test_a_replaced_row_is_found_once(table):
    table.upsert(rows(0, 300))  # the store gives them the places they had
    found = [one.id for one in table.search(VECTORS[5], 10)]
    assert found == best(VECTORS[5], np.arange(3000))
    table.delete([f"{i:05}" for i in range(300, 3000)])  # fewer are left than the first sieve would let through
    assert [one.id for one in table.search(VECTORS[5], 10)] == best(VECTORS[5], np.arange(300))


def test_what_a_row_was_stands_in_nobody_s_way(table):
    table.upsert([Row(f"{i:05}", QUERIES[0], {}) for i in range(100)])
    table.upsert(rows(0, 100))
    assert [one.id for one in table.search(QUERIES[0], 10)] == best(QUERIES[0], np.arange(3000))


def test_it_is_made_anew_when_the_collection_has_doubled(table):
    before = table._copy
    table.upsert(rows(3000, 5000))
    table.compact()
    assert table._copy is before
    table.upsert(rows(5000, 6000))
    table.compact()
    assert table._copy is not before
    assert [one.id for one in table.search(QUERIES[0], 10)] == best(QUERIES[0], np.arange(6000))


@pytest.mark.parametrize(("least", "most"), [(3001, 1 << 20), (1, 3000 * DIM)])
def test_few_rows_and_too_many_bytes_have_no_copy(plain, scans, monkeypatch, least, most):
    monkeypatch.setattr(quantized, "LEAST", least)
    table = Quantized(plain, most)
    assert [one.id for one in table.search(QUERIES[0], 10)] == best(QUERIES[0], np.arange(3000))
    assert len(scans) == 1


def test_after_a_write_that_failed_half_way_the_table_is_asked(table, plain, scans, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(plain, "places", lambda ids: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            table.upsert(rows(3000, 3010))
    assert table.search(VECTORS[3005], 1)[0].id == "03005"
    assert len(scans) == 1
    table.compact()
    assert table.search(VECTORS[3005], 1)[0].id == "03005"
    assert len(scans) == 1


def test_filters_and_many_hits_are_the_table_s(table, scans):
    assert [one.id for one in table.search(QUERIES[0], 5, [Condition("n", "in", (9,))])] == ["00009"]
    assert len(table.search(QUERIES[0], 300)) == 300
    assert len(scans) == 2


def test_readers_and_a_writer_do_not_meet(table):
    stop = threading.Event()
    wrong = []

    def read():
        while not stop.is_set():
            for one in table.search(VECTORS[10], 10):
                if abs(one.score - float(VECTORS[one.meta["n"]] @ VECTORS[10])) > 1e-5:
                    wrong.append(one)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for start in range(3000, 6000, 500):
        table.upsert(rows(start, start + 500))
        table.delete([f"{i:05}" for i in range(start, start + 20)])
        table.compact()
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert table.count() == 6000 - 6 * 20
