"""`Relevance`: what the score of a hit means in its collection.

A collection always has a nearest item, also to a query that it has no answer to. So the scores of such queries are
measured: `models.references` holds texts and pictures of many kinds, few of which any collection shows. Their best
scores in the collection have a distribution of their own, and the relevance of a hit is the probability that the best
hit of such a query scores less. It grows with the score, and falls with the number of items, for the best of more
items scores higher. The references are embedded by the collection's bundle, each kind of query has its own.

The best of many scores follows Gumbel's distribution. It is fitted to the lower `KEPT` of the references' best scores,
by least squares between quantiles, so that a few references that the collection does show count for nothing. A sample
of `SAMPLE` items stands for a larger collection: the location moves by the difference of the expected maxima of as many
normal numbers. A composed query has references that are composed alike, by the same weights.

Source: Gumbel, Statistics of Extremes (1958), sections 5.2 and 6.2; Blom's approximation of normal order statistics.

Cost: one thread of low priority, which embeds the references once for each embedding of a bundle (231 texts and 64
pictures), and reads all vectors of a collection when the service starts, and again when a tenth of its items was
written, also by others if the store is shared. Memory: 2.4 MB for each collection of `SAMPLE` items or more, of the
`MAX_COLLECTIONS` that were asked last; 1.2 KB a dimension for each bundle. A search spends 20 microseconds, and waits
for nothing else: its hits have no relevance until the collection is measured. Nothing is stored.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from statistics import NormalDist
from time import monotonic
from typing import NamedTuple, TypeAlias

import numpy as np

from calmclip.models import references
from calmclip.models.errors import CalmclipError
from calmclip.models.flow import Array, drive
from calmclip.models.preprocess.truncation import Truncation
from calmclip.models.tasks.embed import EmbedRequest, embed, query_prompt
from calmclip.models.tasks.features import prefix
from calmclip.service.collections import Collection
from calmclip.service.hub import Loaded

log = logging.getLogger("calmclip")

SAMPLE = 2048  # items
KEPT = 0.75  # of the references' best scores
FITTED = 4096  # best scores, at most
LEAST = 32  # references that differ, of a kind
LEAST_SCALE = 1e-4  # of the distribution: below it, the references score alike
STALE = 0.1  # of the items: so many writes, and the collection is measured again
PAUSE_S = 1.0  # between looks at one collection that this service writes to,
LOOK_S = 15.0  # and at one that others may write to
MAX_COLLECTIONS = 64
MAX_FITS = 64  # kept for one collection
EMBEDDED = 8  # references in one run of a graph
NICENESS = 10
TEXT, PICTURE, STORED, VECTOR = "text", "image", "id", "vector"  # kinds of queries: fields of a query
UNKNOWN = frozenset((STORED, VECTOR))  # kinds that do not say of what the vector was made
MEASURING = "the collection is being measured; search again in a second"
WITHOUT_REFERENCES = "it is searched by vectors of another model, and no bundle makes those of reference texts"
OTHER_PROMPT = "the reference texts were embedded with the bundle's prompt for queries, not with `prompt_name`"


class Part(NamedTuple):
    """Of a query: its kind, and the weight of its unit vector."""

    kind: str
    weight: float


Parts: TypeAlias = tuple[Part, ...]


@dataclass(frozen=True)
class Gumbel:
    """Of best scores: ``location`` and ``scale``, in cosines."""

    location: float
    scale: float

    def below(self, scores: Array) -> Array:
        """The probability that a best score is less than each of ``scores``, any shape; its shape."""
        # beyond 50, the probability is 0 in float64
        below: Array = np.exp(-np.exp(np.minimum((self.location - np.asarray(scores, np.float64)) / self.scale, 50.0)))
        return below

    @classmethod
    def fit(cls, best: Array) -> "Gumbel":
        """Of best scores, any shape, at least two; the highest of them may be of another kind."""
        ordered = np.sort(best, axis=None)
        ordered = ordered[:: -(-len(ordered) // FITTED)]
        probability = (np.arange(len(ordered)) + 0.5) / len(ordered)
        kept = probability <= KEPT
        scale, location = np.polyfit(-np.log(-np.log(probability[kept])), ordered[kept].astype(np.float64), 1)
        return cls(float(location), float(scale))


def normal_maximum(count: int) -> float:
    """The expected maximum of so many standard normal numbers, by Blom's approximation; 0 for one of them."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


@dataclass
class Measured:
    """A collection's unrelated scores. ``vectors``: kind -> the references' unit vectors, float32 [R, D]; ``scores``:
    kind -> their cosines with the sampled items, float32 [R, S]. ``rows``: items in the collection. ``writes``: rows
    that were written to it when it was measured."""

    vectors: Mapping[str, Array]
    scores: Mapping[str, Array]
    rows: int
    writes: int = 0
    _fits: dict[tuple[Parts, int], Gumbel] = field(default_factory=dict)

    @classmethod
    def of(cls, vectors: Mapping[str, Array], sample: Array, rows: int, writes: int = 0) -> "Measured":
        """``sample``: unit vectors of items, float32 [S, D], in random order."""
        # not @: BLAS would take all cores from the requests
        scores = {
            kind: np.stack([np.vecdot(sample, row) for row in references]) for kind, references in vectors.items()
        }
        return cls(vectors, scores, rows, writes)

    def relevance(self, scores: Array, parts: Parts, rows: int) -> Array | None:
        """float64 [N]: of each score of a query of these parts, among so many items. None without references.

        The kind of a vector is not known, stored or sent, so it is the least of what its possible kinds give.
        """
        if not self.scores.keys() >= {part.kind for part in parts} - UNKNOWN:
            return None
        choices = [*self.scores] if any(part.kind in UNKNOWN for part in parts) else [""]
        alike = [
            tuple(part._replace(kind=kind) if part.kind in UNKNOWN else part for part in parts) for kind in choices
        ]
        fits = [self.best_of(rows, each) for each in alike]
        if not fits or min(fit.scale for fit in fits) < LEAST_SCALE:
            return None
        least: Array = np.min([fit.below(scores) for fit in fits], axis=0)
        return least

    def best_of(self, rows: int, parts: Parts) -> Gumbel:
        """The distribution of the best score among so many items."""
        largest = max(abs(part.weight) for part in parts)
        parts = tuple(Part(part.kind, round(part.weight / largest, 2)) for part in parts)
        if (fit := self._fits.get((parts, rows))) is None:
            if len(self._fits) >= MAX_FITS:
                self._fits.clear()
            fit = self._fits[parts, rows] = self._fit(rows, parts)
        return fit

    def _fit(self, rows: int, parts: Parts) -> Gumbel:
        scores = self._composed(parts)
        count = scores.shape[1]
        block = min(rows, count)
        blocks = scores[:, : count // block * block].reshape(len(scores), -1, block)
        fit = Gumbel.fit(blocks.max(axis=2))
        if rows > count:
            more = normal_maximum(rows) - normal_maximum(count)
            fit = Gumbel(fit.location + float(np.median(scores.std(axis=1))) * more, fit.scale)
        return fit

    def _composed(self, parts: Parts) -> Array:
        """float32 [R, S]: cosines of references that are composed as the query."""
        if len(parts) == 1:
            sign = np.float32(np.sign(parts[0].weight))
            return sign * self.scores[parts[0].kind]
        count = max(len(self.vectors[part.kind]) for part in parts)
        vectors: Array = np.zeros((count, 1), np.float32)
        scores: Array = np.zeros((count, 1), np.float32)
        for number, part in enumerate(parts):
            order = np.random.default_rng(number).permutation(len(self.vectors[part.kind]))
            rows = np.resize(order, count)
            vectors = vectors + np.float32(part.weight) * self.vectors[part.kind][rows]
            scores = scores + np.float32(part.weight) * self.scores[part.kind][rows]
        composed: Array = scores / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
        return composed


class Relevance:
    """Measures the collections that are asked for, in a thread of its own. ``bound(digest)``: the loaded bundle."""

    def __init__(self, bound: Callable[[str], Loaded | None]) -> None:
        self._bound = bound
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="relevance", initializer=_yield_to_others)
        self._references: dict[str, Mapping[str, Array]] = {}  # by embedding digest
        self._measured: dict[Collection, Measured] = {}  # the last asked is last
        self._looked: dict[Collection, float] = {}
        self._waiting: dict[Collection, None] = {}
        self._task: asyncio.Task[None] | None = None
        self._closed = threading.Event()

    async def of(
        self, collection: Collection, scores: Sequence[float], parts: Sequence[Part], matching: int | None = None
    ) -> list[float] | str:
        """For each score a number from 0 to 1, or why there is none. ``matching``: the number of items that the filter
        lets pass, if it is known; else it is taken to be all."""
        if collection.info.foreign:
            return WITHOUT_REFERENCES
        self.wake(collection)
        measured, parts = self._measured.pop(collection, None), tuple(parts)
        if measured is None:
            return MEASURING
        self._measured[collection] = measured
        if TEXT not in measured.scores and any(part.kind == VECTOR for part in parts):
            return WITHOUT_REFERENCES
        if not scores:
            return []
        rows = max(1, min(matching or measured.rows, measured.rows))
        values = np.array(scores)
        if len(parts) == 1:  # less than a millisecond; most were fitted before
            relevance = measured.relevance(values, parts, rows)
        else:
            relevance = await asyncio.to_thread(measured.relevance, values, parts, rows)
        if relevance is None:
            kinds = " or ".join(sorted({part.kind for part in parts}))
            return f"fewer than {LEAST} references differ for the bundle of the collection, for a query of {kinds}"
        return [float(value) for value in relevance]

    def wake(self, collection: Collection) -> None:
        """See soon whether the collection must be measured, if it may have changed since the last look."""
        if self._closed.is_set() or collection.info.foreign or collection in self._waiting:
            return
        if known := self._measured.get(collection):
            written = collection.writes - known.writes > STALE * known.rows
            if monotonic() - self._looked[collection] < (PAUSE_S if written else LOOK_S):
                return
        self._waiting[collection] = None
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work(), name="relevance")

    async def settled(self) -> None:
        """Wait until no collection waits to be measured."""
        while self._task and not self._task.done():
            await asyncio.wait([self._task])

    async def close(self) -> None:
        self._closed.set()  # a reading of a large collection ends at the next batch
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    async def _work(self) -> None:
        while self._waiting:
            collection = next(iter(self._waiting))
            del self._waiting[collection]  # first: what is written meanwhile needs another look
            self._looked[collection] = monotonic()
            try:
                await self._look(collection)
            except Exception:  # it is tried again when the collection is asked for
                if not collection.closed:
                    log.exception("the scores of collection %s cannot be measured", collection.info.name)

    async def _look(self, collection: Collection) -> None:
        loaded = self._bound(collection.info.digest)
        if loaded is None or collection.closed:
            self._measured.pop(collection, None)
            return
        loop = asyncio.get_running_loop()
        with loaded.lease():
            measured = await loop.run_in_executor(self._thread, self._measure, collection, loaded)
        if measured is not None:
            self._measured.pop(collection, None)
            self._measured[collection] = measured
            for old in [*self._measured][:-MAX_COLLECTIONS]:
                del self._measured[old]
        for table in (self._looked, self._measured):
            for old in [each for each in table if each.closed]:
                table.pop(old, None)

    def _measure(self, collection: Collection, loaded: Loaded) -> Measured | None:
        """In the thread. None: what is known still holds, or the collection is empty."""
        known, writes, rows = self._measured.get(collection), collection.writes, collection.table.count()
        if known and max(abs(rows - known.rows), writes - known.writes) <= STALE * known.rows:
            return None
        digest = collection.info.digest
        if digest not in self._references:
            self._references[digest] = embedded(loaded)
        vectors = {kind: prefix(rows, collection.info.dim) for kind, rows in self._references[digest].items()}
        sample = sampled(self._batches(collection))
        return Measured.of(vectors, sample, max(rows, len(sample)), writes) if len(sample) else None

    def _batches(self, collection: Collection) -> Iterator[Array]:
        table = collection.table
        if scan := getattr(table, "scan", None):  # of an `ExclusiveTable`; it reads no metadata
            for *_, vectors in scan():
                self._check()
                yield vectors
            return
        with closing(table.rows(originals=False)) as batches:  # type: ignore[type-var]  # it is a generator
            for batch in batches:
                self._check()
                yield np.stack([row.vector for row in batch])

    def _check(self) -> None:
        if self._closed.is_set():
            raise CalmclipError("the service shuts down")


def sampled(batches: Iterable[Array], most: int = SAMPLE) -> Array:
    """At most ``most`` rows of all, each with the same probability, in random order: float32 [S, D]. The same rows in
    the same order give the same sample."""
    random = np.random.default_rng(0)
    keys, rows = np.empty(0), np.empty((0, 0), np.float32)
    for batch in batches:
        if not len(batch):
            continue
        keys = np.concatenate([keys, random.random(len(batch))])
        rows = np.concatenate([rows.reshape(-1, batch.shape[1]), batch])
        if len(keys) > most:
            kept = np.argpartition(keys, most)[:most]
            keys, rows = keys[kept], rows[kept]
    return np.ascontiguousarray(rows[np.argsort(keys)])


def embedded(loaded: Loaded) -> dict[str, Array]:
    """Kind -> the unit vectors of its references, float32 [R, D]; no kind that the bundle does not read, and none of
    which fewer than `LEAST` differ. In this thread; the graphs' metrics do not count it."""
    bundle, graphs, answer = loaded.bundle, loaded.graphs, {}
    prompt, cut = query_prompt(bundle), Truncation.of(True)
    inputs: dict[str, Sequence[str | bytes]] = {TEXT: references.texts(), PICTURE: references.pictures()}
    for kind, values in inputs.items():
        rows = []
        try:
            for start in range(0, len(values), EMBEDDED):
                some = values[start : start + EMBEDDED]
                flow = embed(bundle, EmbedRequest(some, prompt if kind == TEXT else None, cut))
                rows.append(drive(flow, lambda call: graphs[call.graph].run(call.feeds)).vectors)
                if len(np.unique(rows[0].round(4), axis=0)) == 1:
                    break  # it knows none of the words
        except CalmclipError as error:
            log.info("%s embeds no reference of the kind %s: %s", loaded.name, kind, error)
            continue
        vectors = np.concatenate(rows)
        if len(np.unique(vectors.round(4), axis=0)) >= LEAST:
            answer[kind] = vectors
    return answer


def _yield_to_others() -> None:
    """Lower the priority of this thread alone, where the system can."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
