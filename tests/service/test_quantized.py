"""The quantized copy in memory over a real LanceDB table, against all cosines in float64."""

import threading

import numpy as np
import pytest

from calmclip.service import quantized
from calmclip.service.quantized import QuantizedTable
from calmclip.service.stores import Condition, Info, Row, open_store

DIM = 96  # no multiple of 64: the last word of signs is half empty
RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(60, DIM))


def draw(n):
    """Unit vectors around 60 centres, with a nonzero mean like the vectors of a tower."""
    x = CENTRES[RNG.integers(0, 60, n)] + RNG.normal(size=(n, DIM)) + 0.5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


VECTORS = draw(6000)
QUERIES = draw(40)


def rows(start, end, vectors=VECTORS):
    return [Row(f"{i:05}", vectors[i], {"n": i}) for i in range(start, end)]


def best(query, present):
    """Ids of the ten rows of ``present`` that are nearest to the query, by float64 cosines."""
    cosines = VECTORS.astype(np.float64)[present] @ query
    return [f"{present[i]:05}" for i in np.argsort(-cosines)[:10]]


def nearest(table, query):
    return [hit.id for hit in table.search(query, 10)]


@pytest.fixture
def plain(tmp_path):
    table = open_store(f"lancedb:{tmp_path}").create(Info("c", "m", "d", DIM, ""))
    table.upsert(rows(0, 3000))
    return table


@pytest.fixture
def table(plain, monkeypatch):
    monkeypatch.setattr(quantized, "MIN_ROWS", 1000)
    return QuantizedTable(plain, 1 << 20)


@pytest.fixture
def scans(plain, monkeypatch):
    """The searches that reach the table itself; a copy avoids them."""
    searches = []
    search = plain.search
    monkeypatch.setattr(plain, "search", lambda *a: searches.append(a) or search(*a))
    return searches


def test_it_finds_the_nearest_rows_with_exact_scores(table, scans):
    matched = 0
    for query in QUERIES:
        hits = table.search(query, 10)
        matched += len({hit.id for hit in hits} & set(best(query, np.arange(3000))))
        exact = [float(VECTORS[int(hit.id)].astype(np.float64) @ query) for hit in hits]
        assert [hit.score for hit in hits] == pytest.approx(exact, abs=1e-6)
        assert exact == sorted(exact, reverse=True)
        assert [hit.meta["n"] for hit in hits] == [int(hit.id) for hit in hits]
    assert matched / 400 >= 0.99
    assert not scans


def test_new_rows_are_found_and_removed_rows_are_not(table, scans):
    table.upsert(rows(3000, 4500))  # more rows than the copy has room for
    table.upsert([Row("00007", VECTORS[5000], {"n": -7})])
    assert table.delete(["00003", "never"]) == 1
    assert [(hit.id, hit.meta) for hit in table.search(VECTORS[5000], 1)] == [("00007", {"n": -7})]
    assert table.search(VECTORS[4000], 1)[0].id == "04000"
    assert table.search(VECTORS[7], 1)[0].score < 0.999  # the old vector of 00007
    assert "00003" not in {hit.id for hit in table.search(VECTORS[3], 100)}
    table.compact()  # rows that move within the store keep their positions in the copy
    assert table.search(VECTORS[4000], 1)[0].id == "04000"
    assert not scans


def test_deleted_rows_leave_no_gap_in_an_answer(table):
    present = np.arange(0, 3000, 2)
    table.delete([f"{i:05}" for i in range(1, 3000, 2)])
    for query in QUERIES[:5]:
        assert nearest(table, query) == best(query, present)


def test_a_replaced_row_is_found_once(table):
    table.upsert(rows(0, 300))  # the store gives the rows their old positions
    assert nearest(table, VECTORS[5]) == best(VECTORS[5], np.arange(3000))
    table.delete([f"{i:05}" for i in range(300, 3000)])  # fewer rows remain than the first pass proposes
    assert nearest(table, VECTORS[5]) == best(VECTORS[5], np.arange(300))


def test_the_old_vector_of_a_row_hides_no_other_row(table):
    table.upsert([Row(f"{i:05}", QUERIES[0], {}) for i in range(100)])
    table.upsert(rows(0, 100))
    assert nearest(table, QUERIES[0]) == best(QUERIES[0], np.arange(3000))


def test_the_copy_is_rebuilt_when_the_collection_has_doubled(table):
    before = table._copy
    table.upsert(rows(3000, 5000))
    table.compact()
    assert table._copy is before
    table.upsert(rows(5000, 6000))
    table.compact()
    assert table._copy is not before
    assert nearest(table, QUERIES[0]) == best(QUERIES[0], np.arange(6000))


@pytest.mark.parametrize(("least", "most"), [(3001, 1 << 20), (1, 3000 * DIM)])
def test_few_rows_and_too_many_bytes_have_no_copy(plain, scans, monkeypatch, least, most):
    monkeypatch.setattr(quantized, "MIN_ROWS", least)
    table = QuantizedTable(plain, most)
    assert nearest(table, QUERIES[0]) == best(QUERIES[0], np.arange(3000))
    assert len(scans) == 1


def test_after_a_write_that_failed_in_part_searches_go_to_the_table(table, plain, scans, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(plain, "row_numbers", lambda ids: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            table.upsert(rows(3000, 3010))
    assert table.search(VECTORS[3005], 1)[0].id == "03005"
    assert len(scans) == 1
    table.compact()
    assert table.search(VECTORS[3005], 1)[0].id == "03005"
    assert len(scans) == 1


def test_filters_and_many_hits_go_to_the_table(table, scans):
    assert [hit.id for hit in table.search(QUERIES[0], 5, [Condition("n", "in", (9,))])] == ["00009"]
    assert len(table.search(QUERIES[0], 300)) == 300
    assert len(scans) == 2


def test_readers_and_a_writer_do_not_disturb_each_other(table):
    stop = threading.Event()
    wrong = []

    def read():
        while not stop.is_set():
            for hit in table.search(VECTORS[10], 10):
                if abs(hit.score - float(VECTORS[hit.meta["n"]] @ VECTORS[10])) > 1e-5:
                    wrong.append(hit)

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
