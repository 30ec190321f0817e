"""Relevance: the distribution against numbers worked out in plain Python and against simulated collections."""

import asyncio
import math
import random
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from calmclip.models import references
from calmclip.service.collections import Collection
from calmclip.service.metrics import Metrics
from calmclip.service.relevance import (
    LEAST,
    LOOK_S,
    MEASURING,
    PICTURE,
    SAMPLE,
    STORED,
    TEXT,
    VECTOR,
    WITHOUT_REFERENCES,
    Gumbel,
    Measured,
    Part,
    Relevance,
    normal_maximum,
    sampled,
)
from calmclip.service.stores import Info, Row, open_store

ALONE = (Part(TEXT, 1.0),)
DIM = 64


def units(count: int, seed: int, dim: int = DIM) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_gumbel_is_its_formula():
    below = Gumbel(0.3, 0.05).below(np.array([0.3, 0.4, -40.0]))
    assert below == pytest.approx([math.exp(-1), math.exp(-math.exp(-2)), 0], abs=1e-12)


def test_fit_ignores_references_that_the_collection_shows():
    """Gumbel's quantiles by their formula; a fifth of them replaced by high scores moves the fit little."""
    quantiles = [0.25 - 0.04 * math.log(-math.log((i + 0.5) / 200)) for i in range(200)]
    random.Random(0).shuffle(quantiles)
    fit = Gumbel.fit(np.array(quantiles))
    assert (fit.location, fit.scale) == pytest.approx((0.25, 0.04), abs=1e-4)
    shown = sorted(quantiles)[:160] + [0.9] * 40
    fit = Gumbel.fit(np.array(shown))
    assert (fit.location, fit.scale) == pytest.approx((0.25, 0.04), abs=1e-2)


def test_maximum_of_normal_numbers():
    """Against a simulation; Blom's approximation is good to two decimals."""
    drawn = np.random.default_rng(0).normal(size=(20_000, 100))
    for count in (1, 2, 10, 100):
        assert normal_maximum(count) == pytest.approx(drawn[:, :count].max(axis=1).mean(), abs=0.03)


@pytest.mark.parametrize("rows", [1, 10, 1000, 20_000])
def test_relevance_is_the_probability_that_an_unrelated_best_hit_scores_less(rows):
    """Of 400 other queries, the part whose best hit is above .9 is about a tenth, at each size of the collection.

    In 64 dimensions of noise, any vectors are unrelated."""
    items, queries = units(rows, 1), units(400, 2)
    measured = Measured.of({TEXT: units(231, 3)}, sampled([items]), rows)
    best = (queries.astype(np.float64) @ items.T.astype(np.float64)).max(axis=1)
    above = (measured.relevance(best, ALONE, rows) >= 0.9).mean()
    assert 0.03 <= above <= 0.16  # noise of so few dimensions has lighter tails than normal numbers


def test_relevance_grows_with_the_score_and_falls_with_the_items():
    items = units(SAMPLE, 1)
    measured = Measured.of({TEXT: units(231, 3)}, items, 10**6)
    scores = np.linspace(-1, 1, 41)
    sizes = [measured.relevance(scores, ALONE, rows) for rows in (1, 10, 1000, SAMPLE, 10**5, 10**6)]
    for relevance in sizes:
        assert (np.diff(relevance) >= 0).all()
        assert (relevance[0], relevance[-1]) == pytest.approx((0, 1), abs=1e-3)
    for fewer, more in pairwise(sizes):
        assert (fewer >= more - 0.01).all()  # the tails may cross, for the scales differ


def test_composed_references_are_composed_as_the_query():
    """The cosines of composed references, in float64, from the vectors themselves."""
    texts, pictures, items = units(50, 1), units(40, 2), units(300, 3)
    measured = Measured.of({TEXT: texts, PICTURE: pictures}, items, 300)
    scores = measured._composed((Part(TEXT, 1.0), Part(PICTURE, -0.5)))
    ways = [np.resize(np.random.default_rng(i).permutation(n), 50) for i, n in ((0, 50), (1, 40))]
    want = texts.astype(np.float64)[ways[0]] - 0.5 * pictures.astype(np.float64)[ways[1]]
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    assert scores == pytest.approx(want @ items.T.astype(np.float64), abs=1e-5)
    scaled = measured.best_of(300, (Part(TEXT, 2.0), Part(PICTURE, -1.0)))
    assert scaled == measured.best_of(300, (Part(TEXT, 1.0), Part(PICTURE, -0.5)))


def test_a_stored_item_has_the_least_of_both_kinds():
    items = units(500, 1)
    near = items[:80] + 0.5 * units(80, 2)  # as pictures are to pictures
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    measured = Measured.of({TEXT: units(80, 3), PICTURE: near}, items, 500)
    scores = np.linspace(0, 1, 11)
    by_kind = [measured.relevance(scores, (Part(kind, 1.0),), 500) for kind in (TEXT, PICTURE)]
    assert measured.relevance(scores, (Part(STORED, 1.0),), 500) == pytest.approx(np.minimum(*by_kind), abs=0)
    assert Measured.of({TEXT: units(80, 3)}, items, 500).relevance(scores, (Part(PICTURE, 1.0),), 500) is None
    alike = {TEXT: np.tile(units(1, 3), (80, 1))}
    assert Measured.of(alike, np.tile(items[:1], (9, 1)), 9).relevance(scores, ALONE, 9) is None


def test_a_sample_takes_each_row_alike_and_the_same_each_time():
    rows = np.arange(3 * SAMPLE, dtype=np.float32)[:, None]
    batches = [rows[i : i + 700] for i in range(0, len(rows), 700)]
    sample = sampled(batches)[:, 0]
    assert len(sample) == len({*sample}) == SAMPLE
    thirds = np.bincount((sample // SAMPLE).astype(int))
    assert (abs(thirds - SAMPLE / 3) < 5 * (SAMPLE * 2 / 9) ** 0.5).all()
    assert (sampled(batches)[:, 0] == sample).all()
    assert {*sampled(batches[:1])[:, 0]} == {*rows[:700, 0]}
    assert len(sampled([])) == 0


def test_references_are_distinct_and_none_is_a_query_of_the_bench():
    texts, pictures = references.texts(), references.pictures()
    assert len({*texts}) == len(texts) > 3 * LEAST
    assert len({*pictures}) == len(pictures) == 2 * LEAST
    with open("tests/bench/data/off_topic.txt", encoding="utf-8") as file:
        queries = {line.strip() for line in file if not line.startswith("# ")}
    assert len(queries) == 100
    assert not queries & {*texts}


def test_a_collection_is_measured_beside_its_searches(tmp_path):
    """Nothing is known, then it is; small changes do not count, a tenth does; a closed service measures nothing."""
    vectors = {TEXT: units(231, 3)}

    async def story() -> None:
        store = open_store(f"lancedb:{tmp_path}/store")
        table = store.create(Info("things", "colours", "0" * 64, DIM, "2026-01-01T00:00:00+00:00"))
        collection = Collection(table, Metrics(_slo()), 8, None)
        relevance = Relevance(lambda digest: _Loaded())
        relevance._references["0" * 64] = vectors
        assert await relevance.of(collection, [0.5], ALONE) == MEASURING
        await relevance.settled()
        assert await relevance.of(collection, [0.5], ALONE) == MEASURING  # it is empty
        items = units(100, 1)
        await collection.upsert([Row(str(i), row) for i, row in enumerate(items)])
        relevance.wake(collection)
        await relevance.settled()
        want = Measured.of(vectors, items, 100).relevance(np.array([0.3]), ALONE, 100)
        assert await relevance.of(collection, [0.3], ALONE) == pytest.approx(want, abs=0.1)  # the order differs
        assert relevance._measured[collection].rows == 100
        for more, rows in ((10, 100), (1, 111)):
            relevance._looked[collection] = -LOOK_S
            count = table.count()
            await collection.upsert([Row(str(count + i), row) for i, row in enumerate(units(more, count))])
            relevance.wake(collection)
            await relevance.settled()
            assert relevance._measured[collection].rows == rows
        assert await relevance.of(collection, [0.3], (Part(VECTOR, 1.0),)) == await relevance.of(
            collection, [0.3], ALONE
        )
        only = {PICTURE: units(40, 4)}
        relevance._measured[collection] = Measured.of(only, items, 100)
        assert await relevance.of(collection, [0.5], (Part(VECTOR, 1.0),)) == WITHOUT_REFERENCES
        relevance._measured[collection] = Measured.of(vectors, items, 100)
        alone, all_ = [await relevance.of(collection, [0.2], ALONE, matching) for matching in (1, None)]
        assert alone[0] > all_[0]
        shared = SimpleNamespace(info=table.info, rows=table.rows)  # a store that others write to has no `scan`
        read = [np.concatenate([*relevance._batches(each)]) for each in (collection, SimpleNamespace(table=shared))]
        assert sorted(map(tuple, read[0])) == sorted(map(tuple, read[1]))
        await collection.close()
        relevance._looked[collection] = -LOOK_S
        relevance.wake(collection)
        await relevance.settled()
        assert not relevance._measured
        await relevance.close()
        relevance.wake(collection)
        assert not relevance._waiting
        store.close()

    asyncio.run(story())


def _slo():
    from calmclip.service.settings import Slo

    return Slo()


class _Loaded:
    """A loaded bundle whose references were embedded before."""

    def lease(self):
        from contextlib import nullcontext

        return nullcontext()
