"""The recall of LanceDB's vector index through writes and compactions."""

import numpy as np
import pytest

from calmclip.service.stores import Condition, Info, Row, lancedb, open_store

DIM = 128
RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(60, DIM))
VECTORS = (CENTRES[RNG.integers(0, 60, 12_000)] + RNG.normal(size=(12_000, DIM))).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(lancedb, "INDEXED_FROM", 1000)
    monkeypatch.setattr(lancedb, "PARTITION", 512)
    return open_store(f"lancedb:{tmp_path}").create(Info("c", "m", "d", DIM, ""))


def write(table, start, end):
    table.upsert([Row(f"{i:05}", VECTORS[i], {"even": i % 2 == 0}) for i in range(start, end)])


def recall(table, present, where=()):
    hits = 0
    for query in VECTORS[-40:]:
        cosines = VECTORS[present].astype(np.float64) @ query
        nearest = table.search(query, 10, where)
        hits += len({hit.id for hit in nearest} & {f"{present[i]:05}" for i in np.argsort(-cosines)[:10]})
        assert [hit.score for hit in nearest] == pytest.approx(
            [float(VECTORS[int(hit.id)] @ query) for hit in nearest], abs=1e-5
        )
    return hits / 400


def near(table):
    return [index.name for index in table._table.list_indices() if index.columns == ["vector"]]


def test_an_index_is_built_kept_and_rebuilt(table):
    write(table, 0, 900)
    table.compact()
    assert near(table) == []
    write(table, 900, 2000)
    table.compact()
    assert near(table) == ["near2000"]
    assert recall(table, np.arange(2000)) >= 0.99
    write(table, 2000, 3900)
    assert recall(table, np.arange(3900)) >= 0.99  # rows that are newer than the index are searched too
    table.compact()
    assert near(table) == ["near2000"]
    assert recall(table, np.arange(3900)) >= 0.99
    write(table, 3900, 11_000)
    table.compact()
    assert near(table) == ["near11000"]
    table.compact()
    assert recall(table, np.arange(11_000)) >= 0.99
    table.delete([f"{i:05}" for i in range(5000)])
    assert recall(table, np.arange(5000, 11_000)) >= 0.99
    even = np.arange(5000, 11_000, 2)
    assert recall(table, even, [Condition("even", "in", (True,))]) >= 0.99
    table.compact()
    assert recall(table, np.arange(5000, 11_000)) >= 0.99
