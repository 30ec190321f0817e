"""`Runner`: the synchronous driver and the Python API. Composes bundle, sessions, memory and tasks."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from calmclip.models import tasks
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import read
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays, Call, Done, Flow, Keep, Recall, Walk, drive
from calmclip.models.memory import Memory
from calmclip.models.ops.library import Mode
from calmclip.models.preprocess.image import MAX_PIXELS
from calmclip.models.preprocess.image import Picture as Loaded
from calmclip.models.runtime.clock import Stopwatch
from calmclip.models.runtime.session import Session, SessionOptions
from calmclip.models.tasks.calibrate import best_temperature, require_two
from calmclip.models.tasks.classify import ClassifyRequest, LogitsRequest, Ranking, chosen, classify, logits
from calmclip.models.tasks.detect import Detections, DetectRequest, Example, Suppression, detect
from calmclip.models.tasks.embed import EmbedRequest, embed
from calmclip.models.tasks.fit import fit_vectors, prepare
from calmclip.models.tasks.raw import RawRequest, raw

T = TypeVar("T")
Picture = str | Loaded  # a path, the bytes of a file, a picture of Pillow's, or uint8 [height, width, 3]
REMEMBERED = 32_768  # rows of text: 64 MiB of 512 numbers
BATCH_BYTES = 3_670_016  # of a run's inputs, as the service has it: with more they leave the caches
AHEAD = 2  # runs' worth of pictures that are decoded while a graph runs


class Runner:
    """One bundle, loaded; answers in the calling thread.

    Graphs load when first used. Pictures are paths, the bytes of a file, pictures of Pillow's, or arrays uint8
    [height, width, 3]. Rows of text are remembered, ``remembered`` of them, so that a label is embedded once.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions | None = None, *, remembered: int = REMEMBERED) -> None:
        self.bundle = bundle
        self.options = options or SessionOptions()
        self.memory = Memory(remembered)
        self._sessions: dict[str, Session] = {}
        self._clock: Stopwatch | None = None

    def session(self, role: str) -> Session:
        if role not in self._sessions:
            graph = self.bundle.graph(role)
            self._sessions[role] = Session(self.bundle.directory / graph.file, graph, self.options)
        return self._sessions[role]

    def run(self, flow: Flow[T]) -> T:
        """Drive any flow over this bundle."""
        return drive(flow, self._call, self._clock, self._remember)

    def ask(self, task: str, request: Any) -> Any:
        """The answer of any task, also of another package's. Raises `UnknownName`, and what its flow raises."""
        return self.run(tasks.TASKS.get(task).flow(self.bundle, request))

    def map(self, flows: Iterable[Flow[T]], *, batch: int | None = None, threads: int | None = None) -> Iterator[T]:
        """Answers of many flows, in their order; the flows are taken from the iterable as they are needed.

        Pictures are decoded by ``threads`` threads while graphs run in the calling one (None: one for each core but
        one; 0: none, all in the calling thread). Calls of one graph and shape run together, at most ``batch`` rows of
        them (None: as many as `BATCH_BYTES` hold). The first flow runs alone, and what it leaves in memory, such as the
        vectors of labels, the others find. An error of a flow is raised where its answer would come, and ends the rest.
        """
        if batch is not None and batch < 1:
            raise BadRequest(f"batch is {batch}; expected at least 1")
        waiting = iter(flows)
        for first in islice(waiting, 1):
            yield self.run(first)
        threads = len(os.sched_getaffinity(0)) - 1 if threads is None else threads
        yield from _Many(self, batch, threads).answers(waiting)

    def classify(
        self,
        image: Picture,
        labels: Sequence[str] = (),
        *,
        templates: Sequence[str] = (),
        top_k: int | None = None,
        temperature: float | None = None,
        none_below: float | None = None,
        classifier: Classifier | None = None,
    ) -> Ranking:
        """One picture; see `ClassifyRequest`."""
        asked = ClassifyRequest(_picture(image), labels, templates, top_k, temperature, none_below, classifier)
        return self.run(classify(self.bundle, asked))

    def classify_many(
        self,
        images: Iterable[Picture],
        labels: Sequence[str] = (),
        *,
        templates: Sequence[str] = (),
        top_k: int | None = None,
        temperature: float | None = None,
        none_below: float | None = None,
        classifier: Classifier | None = None,
        batch: int | None = None,
        threads: int | None = None,
    ) -> Iterator[Ranking]:
        """Rankings in the order of the pictures; see `map` for ``batch`` and ``threads``, `ClassifyRequest` for the
        rest.

        The labels are embedded once. ``labels`` and ``templates`` are read once too, so an iterator of ten thousand
        pictures costs no more than its pictures.
        """
        own = self._classifier(classifier, labels, templates)
        asked = ClassifyRequest(b"", top_k=top_k, temperature=temperature, none_below=none_below, classifier=own)
        flows = (classify(self.bundle, replace(asked, image=_picture(image))) for image in images)
        return self.map(flows, batch=batch, threads=threads)

    def logits(
        self,
        images: Iterable[Picture],
        labels: Sequence[str] = (),
        *,
        templates: Sequence[str] = (),
        classifier: Classifier | None = None,
        batch: int | None = None,
        threads: int | None = None,
    ) -> Array:
        """float32 [N, C]: the head's logits before temperature, a row for each picture, a column for each label."""
        own = self._classifier(classifier, labels, templates)
        flows = (logits(self.bundle, LogitsRequest(_picture(image), classifier=own)) for image in images)
        return _rows(self.map(flows, batch=batch, threads=threads), len(own.labels))

    def embed(
        self,
        *,
        texts: Sequence[str] = (),
        images: Iterable[Picture] = (),
        batch: int | None = None,
        threads: int | None = None,
    ) -> Array:
        """float32 [len(texts) + len(images), D], unit rows, texts first. Raises `BadRequest` where there are none."""
        said = [self.run(embed(self.bundle, EmbedRequest(texts))).vectors] if texts else []
        seen = list(self.embed_many(images, batch=batch, threads=threads))
        if not said and not seen:
            raise BadRequest("no inputs were given; expected at least one text or picture")
        return np.concatenate([*said, _rows(seen, self.bundle.dim)])

    def embed_many(
        self, images: Iterable[Picture], *, batch: int | None = None, threads: int | None = None
    ) -> Iterator[Array]:
        """A unit row float32 [D] for each picture, in their order."""
        flows = (embed(self.bundle, EmbedRequest([_picture(image)])) for image in images)
        return (found.vectors[0] for found in self.map(flows, batch=batch, threads=threads))

    def fit(
        self,
        images: Sequence[Picture],
        truth: Sequence[str],
        head: str,
        *,
        labels: Sequence[str] = (),
        templates: Sequence[str] = (),
        **params: Any,
    ) -> Classifier:
        """A classifier whose head is fitted to pictures whose labels are known: ``truth`` has the label of each.
        ``labels``: their order, and labels without a picture; else those of ``truth``, as they come. ``params``: the
        head's own. Raises `BadRequest` for a label that is none of ``labels``, and as `fit_vectors`.
        """
        known = Classifier(tuple(labels) or tuple(dict.fromkeys(truth)), tuple(templates))
        places = _places(images, truth, known.labels)
        prepare(self.bundle, known, head, params, len(places))  # what is wrong is said before pictures are embedded
        return self.run(fit_vectors(self.bundle, known, head, params, self.embed(images=images), places))

    def calibrate(self, images: Sequence[Picture], truth: Sequence[str], classifier: Classifier) -> Classifier:
        """``classifier`` with the temperature at which its scores are as sure as they are right, see
        `best_temperature`; ``truth`` has the label of each picture. Raises `BadRequest` as `fit`, and for fewer than
        two labels.
        """
        own = chosen(self.bundle, classifier)
        places = _places(images, truth, own.labels)
        require_two(own.labels)
        found = best_temperature(self.logits(images, classifier=own), places, own.bound.scores)
        return replace(classifier, temperature=found, family=self.bundle.family)

    def detect(
        self,
        image: Picture,
        labels: Sequence[str] = (),
        *,
        templates: Sequence[str] = (),
        suppression: Suppression | None = None,
        examples: Sequence[Example | Picture] = (),
        classifier: Classifier | None = None,
    ) -> Detections:
        """One picture; see `DetectRequest`. ``suppression`` None: the bundle's own."""
        asked = self._detection(labels, templates, suppression, examples, classifier)
        return self.run(detect(self.bundle, replace(asked, image=_picture(image))))

    def detect_many(
        self,
        images: Iterable[Picture],
        labels: Sequence[str] = (),
        *,
        templates: Sequence[str] = (),
        suppression: Suppression | None = None,
        examples: Sequence[Example | Picture] = (),
        classifier: Classifier | None = None,
        batch: int | None = None,
        threads: int | None = None,
    ) -> Iterator[Detections]:
        """Boxes in the order of the pictures; see `map` for ``batch`` and ``threads``, `DetectRequest` for the rest.
        ``examples``: pictures of what is wanted, with or without labels."""
        asked = self._detection(labels, templates, suppression, examples, classifier)
        flows = (detect(self.bundle, replace(asked, image=_picture(image))) for image in images)
        return self.map(flows, batch=batch, threads=threads)

    def raw(self, graph: str, feeds: Arrays) -> Arrays:
        return self.run(raw(self.bundle, RawRequest(graph, feeds)))

    @contextmanager
    def clock(self) -> Iterator[Stopwatch]:
        """Times what is run inside the block: ``with runner.clock() as clock: …; clock.stages``. Of `map` the stages of
        all its threads are added up."""
        self._clock = Stopwatch()
        try:
            yield self._clock
        finally:
            self._clock = None

    def _detection(
        self,
        labels: Sequence[str],
        templates: Sequence[str],
        suppression: Suppression | None,
        examples: Sequence[Example | Picture],
        classifier: Classifier | None,
    ) -> DetectRequest:
        """What is looked for, of no picture yet."""
        if isinstance(examples, str | Path | bytes | Example):
            raise BadRequest("examples is one picture; expected a list of them")
        shown = [one if isinstance(one, Example) else Example(one) for one in examples]
        shown = [replace(one, image=_picture(one.image)) for one in shown]
        return DetectRequest(b"", labels, templates, suppression, shown, classifier)

    def _classifier(self, classifier: Classifier | None, labels: Sequence[str], templates: Sequence[str]) -> Classifier:
        """What is asked for, worked out once for many pictures."""
        own = self.bundle.classifier
        return (own if classifier is None else classifier.over(own)).asked(labels, templates)

    def _remember(self, asked: Recall | Keep) -> Arrays | None:
        return self.memory.answer(self.bundle.digest, asked)

    def _call(self, call: Call) -> Arrays:
        session = self.session(call.graph)
        if call.keys is None:
            return session.run(call.feeds)
        part = self.memory.split(self.bundle.digest, call)
        return part.complete(session.run(part.feeds) if part.feeds else {})


@dataclass
class _Under(Generic[T]):
    """A flow that `map` has begun: its next step in a thread, or the call it waits with."""

    walk: Walk[T]
    step: "Future[Call | Done[T]]"


class _Many:
    """The driver of `Runner.map`. Graphs run in the calling thread, everything between them in ``threads`` others."""

    def __init__(self, runner: Runner, batch: int | None, threads: int) -> None:
        self.runner = runner
        self.batch = batch
        self.threads = threads
        self.rows = batch or 1  # that the last run had room for
        self.pool: ThreadPoolExecutor | None = None

    def answers(self, flows: Iterator[Flow[T]]) -> Iterator[T]:
        under: deque[_Under[T]] = deque()
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="map") if self.threads else None
        try:
            while True:
                # begun: what fits in a run, and as much again for the one that is made ready meanwhile
                begun = self.rows * (AHEAD if self.pool else 1) + self.threads
                for flow in islice(flows, max(0, begun - len(under))):
                    walk = Walk(flow, Stopwatch(), self.runner._remember)  # a watch is one thread's
                    under.append(_Under(walk, self._submit(walk.step)))
                if not under:
                    return
                state = under[0].step.result()
                if isinstance(state, Done):
                    self._timed(under.popleft().walk.clock)
                    yield state.value
                else:
                    self._run(state, under)
        finally:
            for one in under:
                one.step.cancel()
            if self.pool:
                self.pool.shutdown(wait=True, cancel_futures=True)
            for one in under:  # a flow may hold a file
                one.walk.flow.close()

    def _room(self, call: Call) -> int:
        """Rows of calls like this one that run together."""
        if call.keys is not None or not self.runner.bundle.graph(call.graph).batch:
            return 1
        rows = _height(call)
        size = sum(array.nbytes for array in call.feeds.values())
        return max(rows, self.batch or rows * (BATCH_BYTES // max(size, 1)))

    def _run(self, call: Call, under: "deque[_Under[T]]") -> None:
        """Run the oldest flow's call, with those of others that wait with one of the same graph and shape."""
        together, rows, room = [under[0]], _height(call), self._room(call)
        self.rows = room
        if room > rows:
            for one in islice(under, 1, None):
                other = _waiting(one)
                if other and rows + _height(other) <= room and _alike(call, other):
                    together.append(one)
                    rows += _height(other)
        calls = [one.step.result() for one in together]
        feeds = {
            name: np.concatenate([c.feeds[name] for c in calls if isinstance(c, Call)]) if len(calls) > 1 else array
            for name, array in call.feeds.items()
        }
        with under[0].walk.clock.stage("infer"):
            found = self.runner._call(replace(call, feeds=feeds))
        start = 0
        for one, asked in zip(together, calls, strict=True):
            assert isinstance(asked, Call)
            end = start + _height(asked)
            part = found if len(calls) == 1 else {name: array[start:end] for name, array in found.items()}
            one.step = self._submit(partial(one.walk.step, part))
            start = end

    def _timed(self, clock: Stopwatch) -> None:
        if self.runner._clock:
            for stage, seconds in clock.stages.items():
                self.runner._clock.add(stage, seconds)

    def _submit(self, do: "Callable[[], Call | Done[T]]") -> "Future[Call | Done[T]]":
        if self.pool:
            return self.pool.submit(do)
        done: Future[Call | Done[T]] = Future()
        try:
            done.set_result(do())
        except BaseException as error:
            done.set_exception(error)
        return done


def _waiting(one: _Under[Any]) -> Call | None:
    """The call that a flow waits with, where its step is done and it has not failed."""
    if one.step.done() and not one.step.cancelled() and one.step.exception() is None:
        state = one.step.result()
        return state if isinstance(state, Call) else None
    return None


def _height(call: Call) -> int:
    """Rows; of a graph that takes a number alone, one."""
    first = next(iter(call.feeds.values()), None)
    return 1 if first is None or not first.ndim else len(first)


def _alike(one: Call, other: Call) -> bool:
    return (
        one.graph == other.graph
        and other.keys is None
        and all(
            other.feeds[name].shape[1:] == array.shape[1:] and other.feeds[name].dtype == array.dtype
            for name, array in one.feeds.items()
        )
    )


def _rows(found: Iterable[Array], width: int) -> Array:
    """One array of many rows, float32 [N, width], also of none."""
    rows = list(found)
    return np.stack(rows) if rows else np.empty((0, width), np.float32)


def open_bundle(
    directory: str | Path,
    *,
    threads: int = 0,
    verify: bool = True,
    max_pixels: int = MAX_PIXELS,
    ops: Mode = "auto",
    remembered: int = REMEMBERED,
) -> Runner:
    """Verify and open the bundle in ``directory``. Raises `BundleNotFound`, `BundleInvalid`, `BundleTooNew`.

    ``ops``: whether graphs and pictures use the op library, see `models.ops.library.find`; `OpsLibraryMissing` where it
    is required and absent. ``remembered``: see `Runner`.
    """
    bundle = Bundle(read(Path(directory), verify=verify), max_pixels=max_pixels, ops=ops)
    return Runner(bundle, SessionOptions(threads=threads, ops=ops), remembered=remembered)


def _places(images: Sequence[Picture], truth: Sequence[str], labels: Sequence[str]) -> list[int]:
    """The place of each picture's label. Raises `BadRequest` where one is unknown, or the counts differ."""
    place = {label: index for index, label in enumerate(labels)}
    if len(images) != len(truth):
        raise BadRequest(f"{len(images)} pictures and {len(truth)} labels of theirs were given; expected as many")
    if unknown := [label for label in truth if label not in place]:
        raise BadRequest(f"the label {unknown[0]!r} of a picture is none of the {len(labels)} labels")
    return [place[label] for label in truth]


def _picture(picture: Picture) -> Loaded:
    return Path(picture) if isinstance(picture, str) else picture
