"""Queries and a gallery of unit vectors -> for each query what its ranking is worth, and its hard negatives.

A query has at least one match in the gallery; all others are its negatives. Hard negatives: negatives whose cosine is
above that of the best match by more than a margin are likely unmarked matches, so they are left out; of the
others the most similar stay. Source: Gu et al. 2025, UniME (arXiv 2504.17432), section 3.3, hard negative sampling.

Time and memory: a block of `BLOCK` queries at once, each with a cosine for every row of the gallery.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from calmclip.models.flow import Array

BLOCK = 256


@dataclass(frozen=True)
class Ranked:
    """For each query: ``rank`` int64 [Q], of its best match from 0; ``precision`` float64 [Q], the average precision;
    ``negatives`` int64 [Q, K], rows of the gallery, most similar first, and -1 where there are fewer; ``hard`` bool
    [Q]: the best match is before all of them. A negative of the same cosine is not before a match."""

    rank: Array
    precision: Array
    negatives: Array
    hard: Array


def ranked(queries: Array, gallery: Array, matches: Callable[[slice], Array], margin: float, count: int) -> Ranked:
    """``queries`` [Q, D], ``gallery`` [G, D]; ``matches``: rows of the queries -> bool [rows, G], at least one True in
    each row. ``count``: hard negatives of a query, at most."""
    parts = []
    for start in range(0, len(queries), BLOCK):
        rows = slice(start, min(start + BLOCK, len(queries)))
        cosines, right = _cosines(queries[rows], gallery), matches(rows)
        best = np.where(right, cosines, -np.inf).max(axis=1, keepdims=True)
        wrong = np.where(right, -np.inf, cosines)
        rank = (wrong > best).sum(axis=1)
        precision = np.array([_precision(row[hit], row[~hit]) for row, hit in zip(cosines, right, strict=True)])
        left = np.where(wrong <= best + margin, wrong, -np.inf)
        order = np.argsort(-left, axis=1, kind="stable")[:, :count]
        kept = np.take_along_axis(left, order, axis=1)
        parts.append((rank, precision, np.where(np.isfinite(kept), order, -1), (kept <= best).all(axis=1)))
    return Ranked(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def before(queries: Array, gallery: Array, matches: Callable[[slice], Array], negatives: Array) -> Array:
    """bool [Q]: the best match is before all ``negatives`` int64 [Q, K], which another model may have chosen."""
    parts = []
    for start in range(0, len(queries), BLOCK):
        rows = slice(start, min(start + BLOCK, len(queries)))
        cosines = _cosines(queries[rows], gallery)
        best = np.where(matches(rows), cosines, -np.inf).max(axis=1, keepdims=True)
        chosen = np.take_along_axis(cosines, np.maximum(negatives[rows], 0), axis=1)
        parts.append(((chosen <= best) | (negatives[rows] < 0)).all(axis=1))
    return np.concatenate(parts)


def _cosines(queries: Array, gallery: Array) -> Array:
    """float64 [Q, G]."""
    cosines: Array = queries.astype(np.float64) @ gallery.astype(np.float64).T
    return cosines


def _precision(hits: Array, misses: Array) -> float:
    """The average precision of a query: the mean over its matches of the part of matches among what is ranked so far.
    ``hits``, ``misses``: cosines."""
    hits = -np.sort(-hits)
    ahead = (misses[:, None] > hits).sum(axis=0) if len(hits) > 1 else np.array([(misses > hits[0]).sum()])
    so_far = np.arange(1, len(hits) + 1)
    return float((so_far / (so_far + ahead)).mean())
