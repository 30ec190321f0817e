"""A bank of attributes: the centres of k-means over the vectors of sentences that describe labels.

Source: ExCEL, Yang et al. 2025 (arXiv 2503.20826), section 3.2; k-means++: Arthur and Vassilvitskii 2007.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.flow import Array, CacheGet, CachePut, Flow, Work
from calmclip.models.heads.cosine import softmax
from calmclip.models.tasks.features import texts, unit

BANK = "attribute bank"  # the cache's name for it
UNLIKE = 0.1  # this part of the attributes, those least like a label, do not enrich it
STEPS = 300  # of k-means, at most


def bank(bundle: Bundle, sentences: Sequence[str], centres: int) -> Flow[Array]:
    """-> float32 [K, D], not normalized; K is at most ``centres`` and at most the number of different vectors.

    Time and memory grow with the number of sentences at first use; then the driver caches the bank. Raises
    `TextTooLong`.
    """
    key = repr((centres, sorted(set(sentences))))
    attributes: Array
    if cached := (yield CacheGet(BANK, (key,))):
        attributes = cached[key]["attributes"]
        return attributes
    rows = unit((yield from texts(bundle, sorted(set(sentences)))))
    attributes = yield Work("postprocess", partial(k_means, rows, centres))
    yield CachePut(BANK, key, {"attributes": attributes}, len(attributes))
    return attributes


def enriched(text: Array, attributes: Array) -> Array:
    """Unit rows t [C, D] and a bank [K, D] -> unit rows of t + the attributes' mean, weighted by the softmax of
    t . attribute over the K - int(K / 10) that are most like t. An empty bank changes nothing."""
    if not len(attributes):
        return text
    alike = text @ attributes.T
    least = int(UNLIKE * len(attributes))
    np.put_along_axis(alike, alike.argsort(axis=1, kind="stable")[:, :least], -np.inf, axis=1)
    return unit(text + softmax(alike) @ attributes)


def k_means(rows: Array, centres: int, seed: int = 0) -> Array:
    """Lloyd's algorithm from the start of k-means++ -> float32 [K, D]. Equal rows count once, and their order does not
    matter."""
    rows = np.unique(rows, axis=0).astype(np.float64)
    return refined(rows, start(rows, min(centres, len(rows)), np.random.default_rng(seed))).astype(np.float32)


def start(rows: Array, count: int, random: np.random.Generator) -> Array:
    """``count`` of the different rows, each next one drawn by its squared distance to the nearest before."""
    chosen = [int(random.integers(len(rows)))]
    nearest = np.full(len(rows), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, ((rows - rows[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(random.choice(len(rows), p=nearest / nearest.sum())))
    return rows[chosen]


def refined(rows: Array, centres: Array) -> Array:
    """Each centre becomes the mean of the rows nearest to it, until no row changes its centre. A centre without a row
    stays."""
    centres, before = centres.copy(), None
    for _ in range(STEPS):
        nearest = ((centres**2).sum(axis=1) - 2 * rows @ centres.T).argmin(axis=1)
        if before is not None and (nearest == before).all():
            break
        before = nearest
        for index in np.unique(nearest):
            centres[index] = rows[nearest == index].mean(axis=0)
    return centres
