"""`Runner`: the synchronous driver and the Python API. It composes bundle, sessions, row cache and tasks."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from calmclip.models import tasks
from calmclip.models.batched import BatchedDriver
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import read
from calmclip.models.cache import RowCache
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays, Cached, CacheGet, CachePut, Call, Flow, drive
from calmclip.models.labels import listed
from calmclip.models.ops.library import Mode
from calmclip.models.preprocess.image import MAX_PIXELS, is_picture
from calmclip.models.preprocess.image import Picture as Loaded
from calmclip.models.preprocess.truncation import Method, Truncation
from calmclip.models.preprocess.vectors import Vector
from calmclip.models.runtime.clock import Stopwatch
from calmclip.models.runtime.session import Session, SessionOptions
from calmclip.models.segmenters import Windows
from calmclip.models.suppression import Suppression
from calmclip.models.tasks.anomaly import Anomaly, AnomalyRequest, anomaly
from calmclip.models.tasks.anomaly import Method as AnomalyMethod
from calmclip.models.tasks.attributes import Attributes
from calmclip.models.tasks.calibrate import Calibration, calibration, require_pictures
from calmclip.models.tasks.classify import ClassifyRequest, Ranking, chosen, classify, logits
from calmclip.models.tasks.compress import CompressRequest, compress
from calmclip.models.tasks.compression import Compressed
from calmclip.models.tasks.detect import Detections, DetectRequest, Example, detect
from calmclip.models.tasks.embed import EmbedRequest, embed
from calmclip.models.tasks.enhance import MAP_PIXELS, EnhanceRequest, enhance
from calmclip.models.tasks.explain import AUTO, ExplainRequest, Explanation, explain
from calmclip.models.tasks.features import check_dimensions, prefix
from calmclip.models.tasks.fit import FitReport, FitRequest, fit_rows, picture_flows, prepare
from calmclip.models.tasks.rank import RankRequest, Ranks, judge, ranks
from calmclip.models.tasks.rank import require_pictures as require_ranked
from calmclip.models.tasks.raw import RawRequest, raw
from calmclip.models.tasks.regions import Boxes, Grid, region_vectors
from calmclip.models.tasks.segment import SegmentRequest, Segments, segment
from calmclip.models.tasks.tag import TagRequest, Tags, tag

T = TypeVar("T")
Picture = str | Loaded  # a `str` is a path
CACHED_ROWS = 32_768  # 64 MiB with rows of 512 float32 numbers


class Runner:
    """One open bundle, which answers in the calling thread.

    A graph loads when it is first used. A picture is a path (also as a `str`), a file's bytes, an open binary file,
    a Pillow image, or a numpy array uint8 [height, width] (grey), [height, width, 3] (RGB) or [height, width, 4] (with
    alpha, shown on white). Where a method takes a list, one text or picture alone is a `BadRequest`. At most
    ``cached_rows`` rows of text are cached, so a repeated label is embedded once. ``sessions``: of open graphs.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: SessionOptions | None = None,
        *,
        cached_rows: int = CACHED_ROWS,
        sessions: Mapping[str, Session] = MappingProxyType({}),
    ) -> None:
        self.bundle = bundle
        self.options = options or SessionOptions()
        self.cache = RowCache(cached_rows)
        self._sessions = {**sessions}
        self._clock: Stopwatch | None = None

    def session(self, role: str) -> Session:
        if role not in self._sessions:
            graph = self.bundle.graph(role)
            self._sessions[role] = Session(self.bundle.directory / graph.file, graph, self.options)
        return self._sessions[role]

    def run(self, flow: Flow[T]) -> T:
        """Drive any flow over this bundle."""
        return drive(flow, self._call, self._clock, self._cached)

    def ask(self, task: str, request: Any) -> Any:
        """The answer of any task, also of another package. Raises `UnknownName`, and what its flow raises."""
        return self.run(tasks.TASKS.get(task).flow(self.bundle, request))

    def map(self, flows: Iterable[Flow[T]], *, batch: int | None = None, threads: int | None = None) -> Iterator[T]:
        """Answers of many flows, in their order. Flows are taken from the iterable as they are needed.

        ``threads`` threads decode pictures while graphs run in the calling thread (None: the number of cores less 1;
        0: all in the calling thread). Calls of one graph and shape run together, at most ``batch`` rows of them (None:
        as many as `batched.BATCH_BYTES` hold). The first flow runs alone, so the others find its cached rows, such as
        the vectors of labels. An error of a flow is raised in place of its answer, and ends the iteration.
        """
        if batch is not None and batch < 1:
            raise BadRequest(f"batch is {batch}; expected at least 1")
        waiting = iter(flows)
        for first in islice(waiting, 1):
            yield self.run(first)
        threads = len(os.sched_getaffinity(0)) - 1 if threads is None else threads
        driver = BatchedDriver(
            self._call, self._cached, lambda role: self.bundle.graph(role).batch, self._record, batch, threads
        )
        yield from driver.answers(waiting)

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
        attributes: Attributes | Mapping[str, Sequence[str]] | None = None,
        descriptions: Mapping[str, Sequence[str]] = MappingProxyType({}),
        alpha: float | None = None,
    ) -> Ranking:
        """One picture; see `ClassifyRequest`."""
        numbers = (top_k, temperature, none_below)
        composed = (attributes, descriptions, alpha)
        request = ClassifyRequest(_picture(image), labels, templates, *numbers, classifier, *composed)
        return self.run(classify(self.bundle, request))

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
        attributes: Attributes | Mapping[str, Sequence[str]] | None = None,
        descriptions: Mapping[str, Sequence[str]] = MappingProxyType({}),
        alpha: float | None = None,
        batch: int | None = None,
        threads: int | None = None,
    ) -> Iterator[Ranking]:
        """Rankings in the order of the pictures. ``batch`` and ``threads``: see `map`; the others: `ClassifyRequest`.

        ``labels`` and all texts are read once, and labels are embedded once.
        """
        classifier = self.bundle.classifier_for(classifier, labels, templates, descriptions)
        given = Attributes(attributes) if isinstance(attributes, Mapping) else attributes
        request = ClassifyRequest(b"", (), (), top_k, temperature, none_below, classifier, given, alpha=alpha)
        flows = (classify(self.bundle, replace(request, image=image)) for image in _pictures(images))
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
        classifier = self.bundle.classifier_for(classifier, labels, templates)
        flows = (logits(self.bundle, image, classifier) for image in _pictures(images))
        return _stack(self.map(flows, batch=batch, threads=threads), len(classifier.labels))

    def embed(
        self,
        *,
        texts: Sequence[str] = (),
        images: Iterable[Picture] = (),
        vectors: Iterable[ArrayLike] = (),
        prompt_name: str | None = None,
        truncate: bool | Method | Truncation | None = None,
        dimensions: int | None = None,
        batch: int | None = None,
        threads: int | None = None,
    ) -> Array:
        """float32 [N, D], unit rows: of ``texts``, then of ``vectors``, then of ``images``.

        ``vectors``: rows that the model of the bundle's `VectorPreprocess` made of texts. ``prompt_name``: the bundle's
        prompt that goes before each text; None: its default. ``truncate``: of a text that is too long, see
        `Truncation`; None: the bundle's. ``dimensions``: D, one of `Bundle.dimensions`; None: all. Raises `BadRequest`
        if there are no inputs, for an unknown prompt, or for another length.
        """
        texts, images = listed("texts", texts), _pictures(images)
        words: list[str | Vector] = [*texts, *map(Vector, vectors)]
        truncation = None if truncate is None else Truncation.of(truncate)
        asked = EmbedRequest(words, prompt=prompt_name, truncation=truncation, dimensions=dimensions)
        text_rows = [self.run(embed(self.bundle, asked)).vectors] if words else []
        image_rows = list(self.embed_many(images, dimensions=dimensions, batch=batch, threads=threads))
        if not text_rows and not image_rows:
            raise BadRequest("no inputs were given; expected at least one text or picture")
        return np.concatenate([*text_rows, _stack(image_rows, dimensions or self.bundle.dim)])

    def embed_many(
        self,
        images: Iterable[Picture],
        *,
        dimensions: int | None = None,
        batch: int | None = None,
        threads: int | None = None,
    ) -> Iterator[Array]:
        """A unit row float32 [D] for each picture, in the order of the pictures; ``dimensions`` as in `embed`."""
        flows = (embed(self.bundle, EmbedRequest([image], dimensions=dimensions)) for image in _pictures(images))
        return (answer.vectors[0] for answer in self.map(flows, batch=batch, threads=threads))

    def embed_boxes(
        self, image: Picture, boxes: Boxes | None = None, *, dimensions: int | None = None
    ) -> tuple[Array, Array]:
        """-> a unit row for each box, float32 [R, D], and the boxes in pixels; None: see `region_vectors`.
        ``dimensions`` as in `embed`."""
        check_dimensions(self.bundle, dimensions)
        rows, placed = self.run(region_vectors(self.bundle, _picture(image), boxes))
        return prefix(rows, dimensions), placed

    def fit(
        self,
        images: Sequence[Picture],
        truth: Sequence[str],
        head: str,
        *,
        labels: Sequence[str] = (),
        templates: Sequence[str] = (),
        captions: Sequence[str] = (),
        validation: tuple[Sequence[Picture], Sequence[str]] | None = None,
        unlabelled: Iterable[Picture] = (),
        words: Sequence[str] = (),
        augment: int = 0,
        **params: Any,
    ) -> tuple[Classifier, FitReport]:
        """A classifier with a head that is fitted to labelled pictures; ``truth`` has the label of each picture.

        ``labels``: all labels in order, also those without a picture; if empty, those of ``truth`` in order of first
        use. ``validation``: pictures, and the label of each. ``params``: the head's own. For the others see
        `FitRequest`. Raises `BadRequest` for a label that is not in ``labels``; and as `prepare`.
        """
        labels, templates, truth = listed("labels", labels), listed("templates", templates), listed("truth", truth)
        classifier = Classifier(tuple(labels or dict.fromkeys(truth)), tuple(templates))
        pictures = [*_pictures(images)]
        indices = _indices(pictures, truth, classifier.labels)
        request = FitRequest(
            pictures,
            indices,
            classifier,
            head,
            params,
            listed("captions", captions),
            _validation(validation, classifier.labels),
            augment,
            [*_pictures(unlabelled)],
            listed("words", words),
        )
        prepare(self.bundle, request)  # raises before any picture is embedded
        fitted = self.run(fit_rows(self.bundle, request, [*self.map(picture_flows(self.bundle, request))]))
        return fitted.classifier, fitted.report

    def calibrate(
        self, images: Sequence[Picture], truth: Sequence[str], classifier: Classifier
    ) -> tuple[Classifier, Calibration]:
        """``classifier`` with the temperature at which its scores are calibrated, and the errors before and after.

        ``truth`` has the label of each picture. Raises `BadRequest` as `fit`, and as `require_pictures`.
        """
        complete = chosen(self.bundle, classifier)
        pictures = [*_pictures(images)]
        indices = _indices(pictures, truth, complete.labels)
        require_pictures(complete.labels, indices)
        fitted = calibration(self.bundle, complete, self.logits(pictures, classifier=complete), indices)
        return replace(classifier, temperature=fitted.temperature, family=self.bundle.family), fitted

    def detect(
        self,
        image: Picture,
        labels: Sequence[str] = (),
        *,
        templates: Sequence[str] = (),
        suppression: Suppression | None = None,
        examples: Sequence[Example | Picture] = (),
        classifier: Classifier | None = None,
        boxes: Boxes | None = None,
        grid: Grid | None = None,
    ) -> Detections:
        """One picture; see `DetectRequest`."""
        settings = {"templates": templates, "suppression": suppression, "examples": examples, "classifier": classifier}
        return next(self.detect_many([image], labels, boxes=boxes, grid=grid, **settings))  # type: ignore[arg-type]

    def detect_many(
        self,
        images: Iterable[Picture],
        labels: Sequence[str] = (),
        *,
        templates: Sequence[str] = (),
        suppression: Suppression | None = None,
        examples: Sequence[Example | Picture] = (),
        classifier: Classifier | None = None,
        boxes: Boxes | None = None,
        grid: Grid | None = None,
        batch: int | None = None,
        threads: int | None = None,
    ) -> Iterator[Detections]:
        """Boxes in the order of the pictures. ``batch`` and ``threads``: see `map`; the others: `DetectRequest`."""
        labels, templates = listed("labels", labels), listed("templates", templates)
        pictures = [example if isinstance(example, Example) else Example(example) for example in _list(examples)]
        pictures = [replace(example, image=_picture(example.image)) for example in pictures]
        request = DetectRequest(b"", labels, templates, suppression, pictures, classifier, boxes, grid)
        flows = (detect(self.bundle, replace(request, image=image)) for image in _pictures(images))
        return self.map(flows, batch=batch, threads=threads)

    def rank(
        self,
        images: Iterable[Picture],
        instruction: str | None = None,
        *,
        classifier: Classifier | None = None,
        label: str | None = None,
        top: int | None = None,
        batch: int | None = None,
        threads: int | None = None,
    ) -> Ranks:
        """Pictures in the order of their scores. ``batch`` and ``threads``: see `map`; the others: `RankRequest`."""
        pictures = [*_pictures(images)]
        request = RankRequest(pictures, instruction, classifier, label, top)
        require_ranked(request)
        judged = self.run(judge(self.bundle, request))
        return ranks(judged.scale, [*self.map(map(judged.score, pictures), batch=batch, threads=threads)], top)

    def segment(
        self,
        image: Picture,
        labels: Sequence[str] = (),
        *,
        templates: Sequence[str] = (),
        classifier: Classifier | None = None,
        method: str | None = None,
        params: Mapping[str, Any] = MappingProxyType({}),
        background: Sequence[str] | None = None,
        threshold: float | None = None,
        independent: bool = False,
        windows: Windows | None = None,
        suppression: Suppression | None = None,
    ) -> Segments:
        """One picture; see `SegmentRequest`."""
        labels, templates = listed("labels", labels), listed("templates", templates)
        how = (method, params, background, threshold, independent, windows, suppression)
        return self.run(segment(self.bundle, SegmentRequest(_picture(image), labels, templates, classifier, *how)))

    def segment_many(
        self,
        images: Iterable[Picture],
        labels: Sequence[str] = (),
        *,
        templates: Sequence[str] = (),
        classifier: Classifier | None = None,
        method: str | None = None,
        params: Mapping[str, Any] = MappingProxyType({}),
        background: Sequence[str] | None = None,
        threshold: float | None = None,
        independent: bool = False,
        windows: Windows | None = None,
        suppression: Suppression | None = None,
        batch: int | None = None,
        threads: int | None = None,
    ) -> Iterator[Segments]:
        """Masks in the order of the pictures. ``batch`` and ``threads``: see `map`; the others: `SegmentRequest`."""
        labels, templates = listed("labels", labels), listed("templates", templates)
        how = (method, params, background, threshold, independent, windows, suppression)
        request = SegmentRequest(b"", labels, templates, classifier, *how)
        flows = (segment(self.bundle, replace(request, image=image)) for image in _pictures(images))
        return self.map(flows, batch=batch, threads=threads)

    def tag(
        self,
        image: Picture,
        words: Sequence[str] = (),
        *,
        templates: Sequence[str] = (),
        top: int = 10,
        regions: bool = True,
    ) -> Tags:
        """One picture; see `TagRequest`. Without ``words`` the first call takes seconds: it embeds the vocabulary."""
        return self.run(tag(self.bundle, TagRequest(_picture(image), words, templates, top, regions)))

    def enhance(self, image: Picture, *, map_pixels: int = MAP_PIXELS) -> Image.Image:
        """RGB, as large as the upright picture; see `EnhanceRequest`."""
        return self.run(enhance(self.bundle, EnhanceRequest(_picture(image), map_pixels))).picture

    def anomaly(
        self,
        image: Picture,
        thing: str = "",
        *,
        normal: Sequence[str] = (),
        damaged: Sequence[str] = (),
        templates: Sequence[str] = (),
        classifier: Classifier | None = None,
        method: AnomalyMethod | None = None,
        threshold: float | None = None,
    ) -> Anomaly:
        """One picture; see `AnomalyRequest`."""
        phrases = (thing, normal, damaged, templates)
        request = AnomalyRequest(_picture(image), *phrases, classifier, method, threshold)
        return self.run(anomaly(self.bundle, request))

    def explain(
        self, image: Picture, caption: str, *, method: str = AUTO, threshold: float | None = None
    ) -> Explanation:
        """How much each word of the caption fits one picture; see `ExplainRequest`."""
        return self.run(explain(self.bundle, ExplainRequest(_picture(image), caption, method, threshold)))

    def compress(self, texts: Sequence[str], budget: int | None = None) -> list[Compressed]:
        """Sentences of each text that stay near the vector of the whole; see `CompressRequest`."""
        return self.run(compress(self.bundle, CompressRequest(texts, budget)))

    def raw(self, graph: str, feeds: Arrays) -> Arrays:
        return self.run(raw(self.bundle, RawRequest(graph, feeds)))

    @contextmanager
    def clock(self) -> Iterator[Stopwatch]:
        """Times the flows that run inside the block: ``with runner.clock() as clock: …; clock.stages``.

        With `map` the seconds of all its threads add up.
        """
        self._clock = Stopwatch()
        try:
            yield self._clock
        finally:
            self._clock = None

    def _record(self, clock: Stopwatch) -> None:
        if self._clock:
            for stage, seconds in clock.stages.items():
                self._clock.add(stage, seconds)

    def _cached(self, request: CacheGet | CachePut) -> Cached:
        return self.cache.answer(self.bundle.digest, request)

    def _call(self, call: Call) -> Arrays:
        session = self.session(call.graph)
        if call.keys is None:
            return session.run(call.feeds)
        part = self.cache.split(self.bundle.digest, call)
        return part.complete(session.run(part.feeds) if part.feeds else {})


def _stack(rows: Iterable[Array], width: int) -> Array:
    """float32 [N, width], also for N = 0."""
    stacked = [*rows]
    return np.stack(stacked) if stacked else np.empty((0, width), np.float32)


def open_bundle(
    directory: str | Path,
    *,
    threads: int = 0,
    verify: bool = True,
    max_pixels: int = MAX_PIXELS,
    ops: Mode = "auto",
    cached_rows: int = CACHED_ROWS,
) -> Runner:
    """Verify and open the bundle in ``directory``. Raises `BundleNotFound`, `BundleInvalid`, `BundleTooNew`.

    ``ops``: whether graphs and pictures use the op library, see `models.ops.library.find`; raises `OpsLibraryMissing`
    if the library is required and absent. ``cached_rows``: see `Runner`.
    """
    bundle = Bundle(read(Path(directory), verify=verify), max_pixels=max_pixels, ops=ops)
    return Runner(bundle, SessionOptions(threads=threads, ops=ops), cached_rows=cached_rows)


def _indices(images: Sequence[Loaded], truth: Sequence[str], labels: Sequence[str]) -> list[int]:
    """The index of each picture's label. Raises `BadRequest` if a label is unknown, or the counts differ."""
    truth = listed("truth", truth)
    index = {label: number for number, label in enumerate(labels)}
    if len(images) != len(truth):
        raise BadRequest(f"{len(images)} pictures and {len(truth)} labels were given; expected one label per picture")
    if unknown := [label for label in truth if label not in index]:
        raise BadRequest(f"the label {unknown[0]!r} of a picture is none of the {len(labels)} labels")
    return [index[label] for label in truth]


def _validation(
    validation: tuple[Sequence[Picture], Sequence[str]] | None, labels: Sequence[str]
) -> tuple[list[Loaded], list[int]] | None:
    if validation is None:
        return None
    pictures = [*_pictures(validation[0])]
    return pictures, _indices(pictures, validation[1], labels)


def _picture(picture: Picture) -> Loaded:
    return Path(picture) if isinstance(picture, str) else picture


def _pictures(images: Iterable[Picture]) -> Iterator[Loaded]:
    """Each picture of a list, as it is needed. Raises `BadRequest` at once for one picture instead of a list."""
    return map(_picture, _list(images, "images"))


def _list(pictures: Iterable[T], name: str = "examples") -> Iterable[T]:
    if isinstance(pictures, str | Example) or is_picture(pictures):
        raise BadRequest(f"{name} is one picture, a {type(pictures).__name__}; expected a list of pictures")
    if not isinstance(pictures, Iterable):
        raise BadRequest(f"{name} is of the type {type(pictures).__name__}; expected a list of pictures")
    return pictures
