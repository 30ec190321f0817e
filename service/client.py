"""A typed client of the service: `Client`, and `AsyncClient` with the same methods as coroutines.

It imports httpx and the standard library, and nothing of calmclip. Each method comes from a function of `Calls`, which
turns the arguments into a `Call`: the request, and how to read its answer. The generator `_attempts` decides when to
send and when to wait; each client drives it.

    ClientError
    ├── Unreachable            no answer: no connection, connection lost, or timeout
    ├── Unreadable             the answer is not calmclip's
    └── Problem                the service answered with a problem
        ├── Rejected           4xx: the request is wrong; the same request will fail again
        │   ├── Unauthorized   401: no key, or an unknown key
        │   ├── Forbidden      403: the key lacks the scope
        │   ├── NotFound       404: no such model, collection or classifier
        │   └── Conflict       409: not with this bundle, or the name is in use
        └── Failed             5xx
            ├── Overloaded     503: try again after ``retry_after`` seconds
            └── DeadlineExceeded   504
"""

import asyncio
import base64
import inspect
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    BinaryIO,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)
from urllib.parse import quote

import httpx

T = TypeVar("T")
V = TypeVar("V")
H = TypeVar("H")
P = ParamSpec("P")
# A path, or the content of a picture in any format that the service reads: bytes, or a file opened in binary mode.
Truncate: TypeAlias = Literal["none", "end", "compress", "chunk"]
Picture: TypeAlias = str | PathLike[str] | bytes | bytearray | memoryview | BinaryIO
File: TypeAlias = Picture  # of another format
URL = "http://127.0.0.1:8080"
LINES = {"Accept": "application/x-ndjson"}
ANY = "*/*"


class ClientError(Exception): ...


class Unreachable(ClientError): ...


class Unreadable(ClientError): ...


class Problem(ClientError):
    """A problem document (RFC 9457). ``slug``: its kind, see service/README.md; "" without such a document.

    ``known``: the names that exist. ``errors``: where the request does not match the schema. ``retry_after``: seconds.
    """

    def __init__(self, status: int, document: Mapping[str, Any], retry_after: float | None = None) -> None:
        self.status = status
        self.slug = str(document.get("type", "")).rpartition("/")[2]
        self.title = str(document.get("title", ""))
        self.detail = str(document.get("detail", ""))
        self.request_id = str(document.get("request_id", ""))
        self.known: list[str] = document.get("known") or []
        self.errors: list[dict[str, str]] = document.get("errors") or []
        self.retry_after = retry_after
        self.document = document
        super().__init__(f"{status} {self.detail or self.title}")


class Rejected(Problem): ...


class Unauthorized(Rejected): ...


class Forbidden(Rejected): ...


class NotFound(Rejected): ...


class Conflict(Rejected): ...


class Failed(Problem): ...


class Overloaded(Failed): ...


class DeadlineExceeded(Failed): ...


PROBLEMS: dict[int, type[Problem]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    503: Overloaded,
    504: DeadlineExceeded,
}


@dataclass(frozen=True)
class Result(Generic[T]):
    """Of one of many pictures or inputs; ``index`` is its place in the request. Either ``answer`` or ``problem`` is
    None."""

    index: int
    answer: T | None = None
    problem: Problem | None = None

    def get(self) -> T:
        """The answer. Raises the problem."""
        if self.problem:
            raise self.problem
        assert self.answer is not None
        return self.answer


@dataclass(frozen=True)
class RankedLabel:
    label: str
    index: int
    score: float
    cosine: float


@dataclass(frozen=True)
class Composite:
    """A value of each attribute, joined by commas."""

    text: str
    probability: float


@dataclass(frozen=True)
class Ranking:
    """``labels``: best first. ``none_of_these``: whether every score is below `none_below`; None without one.

    ``temperature``: of these scores. ``attributes``: attribute -> value -> its probability, and ``composites``: those
    of all attributes together, best first; None without attributes.
    """

    model: str
    temperature: float
    labels: list[RankedLabel]
    none_of_these: bool | None
    attributes: dict[str, dict[str, float]] | None
    composites: list[Composite] | None


@dataclass(frozen=True)
class Embeddings:
    """``embeddings``: unit vectors of length ``dim``, texts first."""

    model: str
    dim: int
    embeddings: list[list[float]]


@dataclass(frozen=True)
class Example:
    """An object to find. ``box``: its x0, y0, x1, y1 in pixels of ``image``. ``label``: its name in the answer."""

    image: Picture
    box: Sequence[float] | None = None
    label: str | None = None


@dataclass(frozen=True)
class Box:
    """Pixels of the upright picture."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Detection:
    """``score``: after soft-NMS. ``raw_score``: before. ``index`` counts the labels, then the examples."""

    label: str
    index: int
    score: float
    raw_score: float
    box: Box


@dataclass(frozen=True)
class Size:
    width: int
    height: int


@dataclass(frozen=True)
class Suppression:
    """How overlapping boxes are suppressed."""

    method: str
    sigma: float
    iou_threshold: float
    min_score: float
    max_output: int
    per_class: bool


@dataclass(frozen=True)
class SuppressionUsed(Suppression):
    candidates: int
    kept: int


@dataclass(frozen=True)
class Detections:
    """``detections``: best first."""

    model: str
    image: Size
    detections: list[Detection]
    suppression: SuppressionUsed


@dataclass(frozen=True)
class RankedPicture:
    """``index``: in the pictures of the request."""

    index: int
    score: float


@dataclass(frozen=True)
class Ranks:
    """``pictures``: best first. ``scale``: whether a score is a cosine or a logit."""

    model: str
    scale: str
    pictures: list[RankedPicture]


@dataclass(frozen=True)
class Tag:
    """``cosine``: before soft-NMS; ``score``: after."""

    word: str
    index: int
    score: float
    cosine: float


@dataclass(frozen=True)
class RegionTag(Tag):
    box: Box


@dataclass(frozen=True)
class Tags:
    """``tags`` of the whole picture, and of its ``regions``, best first. ``captioned_by``: "template" or "graph"."""

    model: str
    tags: list[Tag]
    regions: list[RegionTag]
    caption: str
    captioned_by: str


@dataclass(frozen=True)
class RunLengths:
    """A mask as COCO writes it, for `pycocotools.mask.decode`. ``size``: height and width."""

    size: list[int]
    counts: str


@dataclass(frozen=True)
class MaskPart:
    """A connected component of a mask."""

    score: float
    box: Box


@dataclass(frozen=True)
class Segment:
    """``area``: pixels of the mask. ``boxes``: of its connected components, best first. ``rle``, ``png``: the mask in
    the format of the request; a PNG is base64."""

    label: str
    index: int
    score: float
    area: int
    boxes: list[MaskPart]
    rle: RunLengths | None
    png: str | None


@dataclass(frozen=True)
class Segments:
    """``segments``: best first; a label without a pixel is left out."""

    model: str
    method: str
    image: Size
    segments: list[Segment]


@dataclass(frozen=True)
class Anomaly:
    """``score``: 0 to 1, higher is more damaged. ``damaged``: whether it is above the ``threshold``; None without one.
    ``heat``: where, as a PNG in base64."""

    model: str
    method: str
    image: Size
    score: float
    threshold: float | None
    damaged: bool | None
    heat: str


@dataclass(frozen=True)
class ExplainedWord:
    """``start``, ``end``: its place in the caption, as in ``caption[start:end]``. ``contribution``: positive if it
    brings the caption nearer to the picture; ``margin``: beyond what a word that fits would contribute."""

    text: str
    start: int
    end: int
    contribution: float
    margin: float
    flagged: bool


@dataclass(frozen=True)
class Explanation:
    """``score``: the cosine of picture and caption. ``lowest``: the index of the word with the lowest margin that is
    no function word; None without one. ``flagged``: the words with a margin below the ``threshold``."""

    model: str
    method: str
    threshold: float
    score: float
    clip_score: float
    f_score: float
    words: list[ExplainedWord]
    lowest: int | None
    flagged: list[str]


@dataclass(frozen=True)
class CompressedText:
    """``text``: sentences of the whole, in order. ``tokens`` and ``tokens_before``: of this text and of the whole;
    ``ratio``: their quotient. ``cosine``: of their vectors. ``kept``: the positions of the sentences, of ``sentences``.
    ``cut``: the answer is the first words of one sentence."""

    text: str
    tokens: int
    tokens_before: int
    ratio: float
    cosine: float
    kept: list[int]
    sentences: int
    cut: bool


@dataclass(frozen=True)
class Item:
    """An item of a collection: a text, a picture, or a vector in place of a text; and any JSON object as metadata."""

    id: str
    text: str | None = None
    image: Picture | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    vector: Sequence[float] | None = None


@dataclass(frozen=True)
class StoredItem:
    """``vector``: a unit vector; None unless it was asked for."""

    id: str
    meta: dict[str, Any]
    vector: list[float] | None = None


@dataclass(frozen=True)
class Page:
    """``next``: the ``after`` of the next page; None on the last page."""

    items: list[StoredItem]
    next: str | None


@dataclass(frozen=True)
class Hit:
    """``score``: cosine. ``relevance``: 0 to 1; None: `Hits.uncalibrated` says why."""

    id: str
    score: float
    meta: dict[str, Any]
    relevance: float | None = None


class Hits(list[Hit]):
    """Nearest first. ``below``: so many of the nearest were left out, for their relevance is less than
    ``min_relevance``. ``uncalibrated``: why the hits have no relevance, None if they have."""

    min_relevance: float = 0.0
    below: int = 0
    uncalibrated: str | None = None

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "Hits":
        hits = cls(_reader(list[Hit])(answer["hits"]))
        hits.min_relevance, hits.below = answer["min_relevance"], answer["below"]
        hits.uncalibrated = answer["uncalibrated"]
        return hits


@dataclass(frozen=True)
class Part:
    """Of a composed query: a text, a picture, a ``vector`` in place of a text, or the ``id`` of a stored item, exactly
    one of them. ``weight``: of its unit vector in the sum; a negative number subtracts it."""

    text: str | None = None
    image: "Picture | None" = None
    vector: Sequence[float] | None = None
    id: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Count:
    """``count``: items written or removed. ``items``: items in the collection afterwards."""

    count: int
    items: int


@dataclass(frozen=True)
class Collection:
    """``model``: the bundle that fills it, or another program's model; then ``digest`` is empty."""

    name: str
    model: str
    digest: str
    dim: int
    created: str
    originals: bool
    items: int


@dataclass(frozen=True)
class ImportedBank(Collection):
    """``scaled``: the number of vectors that were no unit vectors, and have become such."""

    scaled: int


@dataclass(frozen=True)
class FitReport:
    """``before``: accuracy of zero-shot, ``after``: of the fitted head, on the pictures that ``measured`` names."""

    method: str
    pictures: int
    labels: int
    before: float | None
    after: float | None
    measured: str
    params: dict[str, Any]
    seconds: float
    notes: list[str]


@dataclass(frozen=True)
class Classifier:
    """``head`` None: the bundle's head. ``family``: the bundles that it was fitted or calibrated with; None: any.

    ``report``: of its fit; None for one that was not fitted. ``vector_dim``: the numbers of each of its label vectors;
    None: it has texts.
    """

    name: str
    version: int
    labels: list[str]
    templates: list[str]
    descriptions: dict[str, list[str]]
    head: str | None
    params: dict[str, Any]
    temperature: float
    none_below: float | None
    family: str | None
    fitted: bool
    report: FitReport | None
    vector_dim: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class CalibrationErrors:
    """Of the scores of labelled pictures (Guo et al. 2017, equations 3 and 6)."""

    expected_calibration_error: float
    negative_log_likelihood: float


@dataclass(frozen=True)
class Calibrated(Classifier):
    """``before``, ``after``: errors at the old and at the new temperature, on the ``pictures`` that chose it."""

    pictures: int
    before: CalibrationErrors
    after: CalibrationErrors


@dataclass(frozen=True)
class Fitted(Classifier):
    """``skipped``: items of the collection without one of the labels."""

    skipped: int


@dataclass(frozen=True)
class Segmentation:
    """What a segment request gets that sets nothing. ``methods``: those that the bundle can run, the default first."""

    methods: list[str]
    background: list[str]
    threshold: float


@dataclass(frozen=True)
class ExplanationDefaults:
    """What an explain request gets that sets nothing. ``methods``: those that the bundle can run, the default first."""

    methods: list[str]
    threshold: float


@dataclass(frozen=True)
class Model:
    """``embedding_digest``: equal for bundles that make the same vectors; None if the bundle does not embed.
    ``dimensions``: the lengths that `embed` may ask for. ``languages``: BCP 47 tags of the languages of texts; empty if
    the bundle does not say. ``suppression``, ``segmentation``, ``explanation``: the defaults of a detect, a segment and
    an explain request; None without the task."""

    name: str
    digest: str
    embedding_digest: str | None
    family: str
    tasks: list[str]
    languages: list[str]
    precision: str
    dim: int | None
    dimensions: list[int]
    labels: int
    suppression: Suppression | None
    segmentation: Segmentation | None
    explanation: ExplanationDefaults | None
    examples: int


@dataclass(frozen=True)
class ModelFiles:
    """A bundle's manifest and report, as on disk."""

    name: str
    digest: str
    manifest: dict[str, Any]
    report: dict[str, Any] | None


@dataclass(frozen=True)
class Ready:
    """``failed``: bundle -> why it did not load. ``degraded``: the store or a collection -> why it is not served."""

    ready: bool
    loaded: list[str]
    failed: dict[str, str]
    degraded: dict[str, str]


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and how to read its answer. ``ok_statuses``: statuses besides 2xx that are answers. ``kind``: the
    content type of an answer that is a file, or `ANY`; ``read`` gets its bytes. ``file``: a body of bytes instead of
    JSON."""

    method: str
    path: str
    read: Callable[[Any], T]
    json: Any = None
    params: Mapping[str, str | int | list[str]] = field(default_factory=dict)
    ok_statuses: tuple[int, ...] = ()
    kind: str | None = None
    file: bytes | None = None

    @property
    def request(self) -> dict[str, Any]:
        """Arguments of httpx's `request`."""
        place = {"method": self.method, "url": self.path, "params": self.params}
        if self.file is None:
            return {**place, "json": self.json}
        return {**place, "content": self.file, "headers": {"Content-Type": "application/octet-stream"}}


class Calls:
    """Every method of the clients: arguments -> `Call`."""

    @staticmethod
    def classify(
        image: Picture,
        labels: Sequence[str] = (),
        *,
        classifier: str | None = None,
        templates: Sequence[str] = (),
        top_k: int | None = None,
        temperature: float | None = None,
        none_below: float | None = None,
        attributes: Mapping[str, Sequence[str]] | None = None,
        tau: float | None = None,
        with_labels: bool | None = None,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        alpha: float | None = None,
        label_vectors: Mapping[str, Sequence[Sequence[float]]] | None = None,
        model: str | None = None,
    ) -> Call[Ranking]:
        """Rank labels for a picture. Default: the labels of the classifier, else of the bundle.

        ``label_vectors``: label -> vectors in place of sentences, for a bundle that reads vectors of another model.

        ``attributes``: name -> values, of which the picture's are inferred (``tau``, ``with_labels``).
        ``descriptions``: label -> sentences; with ``alpha`` they are looked for in regions of the picture.
        """
        fields = _present(
            labels=_texts(labels),
            classifier=classifier,
            templates=_texts(templates),
            top_k=top_k,
            temperature=temperature,
            none_below=none_below,
            attributes=_text_lists(attributes),
            tau=tau,
            with_labels=with_labels,
            descriptions=_text_lists(descriptions),
            alpha=alpha,
            label_vectors=_vector_lists(label_vectors),
            model=model,
        )
        return Call("POST", "/v1/classify", _reader(Ranking), {"image": _picture(image), **fields})

    @staticmethod
    def embed(
        *,
        texts: Sequence[str] = (),
        images: Sequence[Picture] = (),
        boxes: Sequence[Sequence[float]] = (),
        vectors: Sequence[Sequence[float]] = (),
        prompt_name: str | None = None,
        truncate: Truncate | None = None,
        stride: int | None = None,
        pooling: Literal["mean", "max"] | None = None,
        dimensions: int | None = None,
        model: str | None = None,
    ) -> Call[Embeddings]:
        """Texts, vectors and pictures -> unit vectors in one space, in this order. With ``boxes`` (x0, y0, x1, y1 in
        pixels) each picture has a vector for each box instead of one. ``vectors``: of the model that the bundle names,
        in place of texts. ``prompt_name``: the bundle's prompt before each text. ``truncate``: of a text that is too
        long; ``stride`` (tokens) and ``pooling``: of "chunk". ``dimensions``: the length of the answer's vectors, one
        of `Model.dimensions`."""
        inputs = [
            *({"text": text} for text in _texts(texts)),
            *({"vector": _numbers(vector)} for vector in vectors),
            *({"image": _picture(image), **_present(boxes=_boxes(boxes))} for image in _pictures(images)),
        ]
        how = _present(truncate=truncate, stride=stride, pooling=pooling)
        fields = _present(prompt_name=prompt_name, dimensions=dimensions, model=model) | how
        return Call("POST", "/v1/embed", _reader(Embeddings), {"inputs": inputs, **fields})

    @staticmethod
    def detect(
        image: Picture,
        labels: Sequence[str] = (),
        *,
        examples: Sequence[Example | Picture] = (),
        boxes: Sequence[Sequence[float]] = (),
        grid: Mapping[str, Any] | None = None,
        classifier: str | None = None,
        templates: Sequence[str] = (),
        method: Literal["hard", "linear", "gaussian"] | None = None,
        sigma: float | None = None,
        iou_threshold: float | None = None,
        min_score: float | None = None,
        max_output: int | None = None,
        per_class: bool | None = None,
        model: str | None = None,
    ) -> Call[Detections]:
        """Find labels, or the objects of examples, in a picture. Settings that are None have the bundle's default.

        ``boxes`` (x0, y0, x1, y1 in pixels) or the windows of ``grid`` ({} for the default) are searched instead of
        proposals.
        """
        pictures = [example if isinstance(example, Example) else Example(example) for example in _pictures(examples)]
        fields = _present(
            labels=_texts(labels),
            examples=[{"image": _picture(e.image), **_present(box=e.box, label=e.label)} for e in pictures],
            boxes=_boxes(boxes),
            grid=None if grid is None else dict(grid),
            classifier=classifier,
            templates=_texts(templates),
            method=method,
            sigma=sigma,
            iou_threshold=iou_threshold,
            min_score=min_score,
            max_output=max_output,
            per_class=per_class,
            model=model,
        )
        return Call("POST", "/v1/detect", _reader(Detections), {"image": _picture(image), **fields})

    @staticmethod
    def classify_many(
        images: Sequence[Picture], labels: Sequence[str] = (), **settings: Any
    ) -> Call[list[Result[Ranking]]]:
        """Rank labels for many pictures in one request: each has its own answer or problem, in their order.
        ``settings``: those of `classify`. `lines` gives each as soon as it is there."""
        return _many(Calls.classify(b"", labels, **settings), images, Ranking)

    @staticmethod
    def detect_many(
        images: Sequence[Picture], labels: Sequence[str] = (), **settings: Any
    ) -> Call[list[Result[Detections]]]:
        """Find labels, or the objects of examples, in many pictures. ``settings``: those of `detect`; else as
        `classify_many`."""
        return _many(Calls.detect(b"", labels, **settings), images, Detections)

    @staticmethod
    def tag_many(images: Sequence[Picture], words: Sequence[str] = (), **settings: Any) -> Call[list[Result[Tags]]]:
        """Words that fit many pictures. ``settings``: those of `tag`; else as `classify_many`."""
        return _many(Calls.tag(b"", words, **settings), images, Tags)

    @staticmethod
    def embed_many(**inputs: Any) -> Call[list[Result[Embeddings]]]:
        """The vectors of each input, or its own problem. ``inputs``: the arguments of `embed`; a picture with boxes is
        one input."""
        call = Calls.embed(**inputs)
        return Call(call.method, call.path, _results(Embeddings), {**call.json, "partial": True})

    @staticmethod
    def rank(
        images: Sequence[Picture],
        instruction: str | None = None,
        *,
        classifier: str | None = None,
        label: str | None = None,
        top: int | None = None,
        model: str | None = None,
    ) -> Call[Ranks]:
        """Order pictures by an instruction, or by a label of a classifier. Default: its first label."""
        fields = _present(instruction=instruction, classifier=classifier, label=label, top=top, model=model)
        pictures = [_picture(image) for image in _pictures(images)]
        return Call("POST", "/v1/rank", _reader(Ranks), {"images": pictures, **fields})

    @staticmethod
    def tag(
        image: Picture,
        words: Sequence[str] = (),
        *,
        templates: Sequence[str] = (),
        top: int | None = None,
        regions: bool | None = None,
        model: str | None = None,
    ) -> Call[Tags]:
        """Words that fit a picture and its regions. Default: of calmclip's vocabulary."""
        fields = _present(words=_texts(words), templates=_texts(templates), top=top, regions=regions, model=model)
        return Call("POST", "/v1/tag", _reader(Tags), {"image": _picture(image), **fields})

    @staticmethod
    def segment(
        image: Picture,
        labels: Sequence[str] = (),
        *,
        classifier: str | None = None,
        templates: Sequence[str] = (),
        method: str | None = None,
        params: Mapping[str, Any] | None = None,
        background: Sequence[str] | None = None,
        threshold: float | None = None,
        independent: bool | None = None,
        window: float | None = None,
        stride: float | None = None,
        format: Literal["rle", "png"] | None = None,
        model: str | None = None,
    ) -> Call[Segments]:
        """A mask for each label of a picture, as run lengths or as a PNG. Default: the labels of the classifier, else
        of the bundle. Settings that are None have the bundle's default; ``background`` [] means that there is none.

        ``window``: the side of overlapping windows, as a part of the picture's shorter side; ``stride``: between them.
        """
        fields = _present(
            labels=_texts(labels),
            classifier=classifier,
            templates=_texts(templates),
            method=method,
            params=dict(params) if params else None,
            threshold=threshold,
            independent=independent,
            window=window,
            stride=stride,
            format=format,
            model=model,
        )
        if background is not None:
            fields["background"] = _texts(background)
        return Call("POST", "/v1/segment", _reader(Segments), {"image": _picture(image), **fields})

    @staticmethod
    def segment_indexed(image: Picture, labels: Sequence[str] = (), **settings: Any) -> Call[bytes]:
        """One PNG file for all labels: a pixel is 0, or 1 + the index of its label. Its text `labels` is a JSON object:
        the value of a pixel -> its label. ``settings``: those of `segment`."""
        call = Calls.segment(image, labels, **settings)
        return Call(call.method, call.path, bytes, {**call.json, "format": "indexed"}, kind="image/png")

    @staticmethod
    def anomaly(
        image: Picture,
        thing: str | None = None,
        *,
        normal: Sequence[str] = (),
        damaged: Sequence[str] = (),
        templates: Sequence[str] = (),
        classifier: str | None = None,
        method: str | None = None,
        threshold: float | None = None,
        model: str | None = None,
    ) -> Call[Anomaly]:
        """How damaged a picture looks, and where. ``thing``: what it shows; ``normal``, ``damaged``: phrases with a
        {} for it. ``classifier``: fitted to normal pictures."""
        fields = _present(
            thing=thing,
            normal=_texts(normal),
            damaged=_texts(damaged),
            templates=_texts(templates),
            classifier=classifier,
            method=method,
            threshold=threshold,
            model=model,
        )
        return Call("POST", "/v1/anomaly", _reader(Anomaly), {"image": _picture(image), **fields})

    @staticmethod
    def explain(
        image: Picture,
        caption: str,
        *,
        method: Literal["auto", "leave_one_out", "gradient"] | None = None,
        threshold: float | None = None,
        model: str | None = None,
    ) -> Call[Explanation]:
        """How much each word of the caption fits the picture. A word with a margin below ``threshold`` is flagged."""
        fields = _present(caption=caption, method=method, threshold=threshold, model=model)
        return Call("POST", "/v1/explain", _reader(Explanation), {"image": _picture(image), **fields})

    @staticmethod
    def compress(
        texts: Sequence[str], *, budget: int | None = None, model: str | None = None
    ) -> Call[list[CompressedText]]:
        """For each text its sentences that stay near the vector of the whole, within ``budget`` tokens; None: as many
        as the model reads."""
        body = {"texts": _texts(texts), **_present(budget=budget, model=model)}
        return Call("POST", "/v1/compress", _reader(list[CompressedText], "texts"), body)

    @staticmethod
    def enhance(image: Picture, *, map_pixels: int | None = None, model: str | None = None) -> Call[bytes]:
        """The picture in better light: a PNG file. ``map_pixels``: of the picture that its map is computed on."""
        fields = _present(map_pixels=map_pixels, model=model)
        return Call("POST", "/v1/enhance", bytes, {"image": _picture(image), **fields}, kind="image/png")

    @staticmethod
    def collections() -> Call[list[Collection]]:
        """All collections."""
        return Call("GET", "/v1/collections", _reader(list[Collection], "collections"))

    @staticmethod
    def create_collection(
        collection: str,
        *,
        model: str | None = None,
        keep_originals: bool | None = None,
        dimensions: int | None = None,
    ) -> Call[Collection]:
        """Create a collection for the vectors of one bundle. If it exists, nothing changes.

        ``keep_originals``: it keeps the texts and pictures; None: as the service is set. ``dimensions``: the length of
        its vectors, one of `Model.dimensions`.
        """
        body = _present(model=model, keep_originals=keep_originals, dimensions=dimensions)
        return Call("PUT", _collection(collection), _reader(Collection), body)

    @staticmethod
    def collection(collection: str) -> Call[Collection]:
        """One collection: its bundle and size."""
        return Call("GET", _collection(collection), _reader(Collection))

    @staticmethod
    def delete_collection(collection: str) -> Call[None]:
        """Delete a collection and all its items."""
        return Call("DELETE", _collection(collection), _nothing)

    @staticmethod
    def upsert(collection: str, items: Sequence[Item], *, truncate: Truncate | None = None) -> Call[Count]:
        """Add or replace items: all or none. They are on disk when the call returns. ``truncate``: of a text that is
        too long."""
        sent = [
            {"id": item.id, **_query(item.text, item.image, item.vector), "meta": dict(item.meta)} for item in items
        ]
        body = {"items": sent, **_present(truncate=truncate)}
        return Call("POST", _collection(collection, "/items"), _reader(Count), body)

    @staticmethod
    def page(
        collection: str,
        *,
        after: str | None = None,
        limit: int = 100,
        vectors: bool = False,
        fields: Sequence[str] = (),
    ) -> Call[Page]:
        """Items ordered by id, from the first id after ``after``. ``fields``: only these of the metadata."""
        params = _present(after=after, limit=limit, vectors="true" if vectors else None, fields=_texts(fields))
        return Call("GET", _collection(collection, "/items"), _reader(Page), params=params)

    @staticmethod
    def item(collection: str, id: str, *, vectors: bool = False) -> Call[StoredItem]:
        """One item, with its vector if asked for."""
        params = _present(vectors="true" if vectors else None)
        return Call("GET", _collection(collection, f"/items/{quote(id, safe='')}"), _reader(StoredItem), params=params)

    @staticmethod
    def delete_items(collection: str, ids: Sequence[str]) -> Call[Count]:
        """Remove items. Ids that do not exist are ignored."""
        return Call("DELETE", _collection(collection, "/items"), _reader(Count), {"ids": _texts(ids)})

    @staticmethod
    def search(
        collection: str,
        text: str | None = None,
        *,
        image: Picture | None = None,
        vector: Sequence[float] | None = None,
        id: str | None = None,
        parts: Sequence[Part] = (),
        top_k: int = 10,
        min_relevance: float | None = None,
        filter: Mapping[str, Any] | None = None,
        prompt_name: str | None = None,
        truncate: Truncate | None = None,
        model: str | None = None,
    ) -> Call[Hits]:
        """The nearest items to a text, a picture, a ``vector`` in place of a text, or a stored item by its ``id``; or
        to the weighted sum of ``parts``. Hits of less than ``min_relevance`` are left out; None: the service's setting,
        0: none is. ``filter``: metadata field -> value or condition, as {"gte": 1}. ``prompt_name``: the bundle's
        prompt before a text; by default "query", if the bundle has it. ``truncate``: of a text that is too long."""
        fields = _present(
            min_relevance=min_relevance, filter=filter, prompt_name=prompt_name, truncate=truncate, model=model
        )
        alone = Part(text, image, vector, id)
        if parts and alone != Part():
            raise TypeError("expected one query, or `parts`, not both")
        query = [_part(part) for part in parts] if parts else _part(alone)
        return Call("POST", _collection(collection, "/search"), Hits.of, {"query": query, "top_k": top_k, **fields})

    @staticmethod
    def original(collection: str, id: str) -> Call[bytes]:
        """The text (as UTF-8) or the picture of one item, as it was sent. The collection needs ``keep_originals``."""
        return Call("GET", _collection(collection, f"/originals/{quote(id, safe='')}"), bytes, kind=ANY)

    @staticmethod
    def export_bank(collection: str) -> Call[bytes]:
        """All vectors, ids and metadata as an npz file: `numpy.load(io.BytesIO(...))`."""
        return Call("GET", _collection(collection, "/bank"), bytes, kind="application/x-npz")

    @staticmethod
    def import_bank(collection: str, bank: File, *, normalize: bool = True) -> Call[ImportedBank]:
        """A new collection of the vectors in an npz file (docs/texts.md), of a bundle or of another program's model.
        ``normalize``: make unit vectors of others; False: refuse them."""
        params = {"normalize": str(normalize).lower()}
        return Call("PUT", _collection(collection, "/bank"), _reader(ImportedBank), params=params, file=_bytes(bank))

    @staticmethod
    def classifiers() -> Call[list[Classifier]]:
        """All registered classifiers."""
        return Call("GET", "/v1/classifiers", _reader(list[Classifier], "classifiers"))

    @staticmethod
    def put_classifier(
        name: str,
        labels: Sequence[str] = (),
        templates: Sequence[str] = (),
        *,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        label_vectors: Mapping[str, Sequence[Sequence[float]]] | None = None,
        head: str | None = None,
        params: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        none_below: float | None = None,
    ) -> Call[Classifier]:
        """Register a classifier. A change increments its version. Settings that are None are the bundle's.

        ``label_vectors``: as in `classify`; the labels are then theirs, unless ``labels`` gives another order."""
        sentences = {label: _texts(lines) for label, lines in (descriptions or {}).items()}
        chosen = {"name": head, "params": dict(params or {})} if head else None
        given = {"descriptions": sentences or None, "label_vectors": _vector_lists(label_vectors), "head": chosen}
        optional = _present(**given, temperature=temperature, none_below=none_below)
        body = {"labels": _texts(labels), "templates": _texts(templates), **optional}
        return Call("PUT", _classifier(name), _reader(Classifier), body)

    @staticmethod
    def calibrate_classifier(
        name: str, items: Sequence[tuple[Picture, str]], *, model: str | None = None
    ) -> Call[Calibrated]:
        """Set a classifier's temperature from labelled pictures: at least 100 in all and 2 of each label."""
        body = {"items": _items(items), **_present(model=model)}
        return Call("POST", _classifier(name, "/calibrate"), _reader(Calibrated), body)

    @staticmethod
    def fit_classifier(
        name: str,
        method: str,
        items: Sequence[tuple[Picture, str] | tuple[Picture, str, str]] = (),
        *,
        collection: str | None = None,
        label: str | None = None,
        params: Mapping[str, Any] | None = None,
        labels: Sequence[str] = (),
        templates: Sequence[str] = (),
        descriptions: Mapping[str, Sequence[str]] | None = None,
        validation: Sequence[tuple[Picture, str]] = (),
        unlabelled: Sequence[Picture] = (),
        words: Sequence[str] = (),
        augment: int | None = None,
        replace: bool = False,
        model: str | None = None,
    ) -> Call[Fitted]:
        """Fit a classifier to pictures with their labels and, if the method reads them, captions; or to the vectors of
        a collection, whose metadata has the label under ``label``. It belongs to the family of the bundle ``model``."""
        fields = _present(
            items=_items(items),
            collection=collection,
            label=label,
            params=dict(params) if params else None,
            labels=_texts(labels),
            templates=_texts(templates),
            descriptions={key: _texts(lines) for key, lines in descriptions.items()} if descriptions else None,
            validation=_items(validation),
            unlabelled=[_picture(image) for image in _pictures(unlabelled)],
            words=_texts(words),
            augment=augment,
            replace=replace or None,
            model=model,
        )
        return Call("POST", _classifier(name, "/fit"), _reader(Fitted), {"method": method, **fields})

    @staticmethod
    def classifier(name: str) -> Call[Classifier]:
        """One classifier."""
        return Call("GET", _classifier(name), _reader(Classifier))

    @staticmethod
    def delete_classifier(name: str) -> Call[None]:
        """Delete a classifier."""
        return Call("DELETE", _classifier(name), _nothing)

    @staticmethod
    def models() -> Call[list[Model]]:
        """The loaded bundles. The first that serves a task is its default."""
        return Call("GET", "/v1/models", _reader(list[Model], "models"))

    @staticmethod
    def model(name: str) -> Call[ModelFiles]:
        """A bundle's manifest and report."""
        return Call("GET", f"/v1/models/{quote(name, safe='')}", _reader(ModelFiles))

    @staticmethod
    def ready() -> Call[Ready]:
        """Whether all bundles and collections are open, and why not."""
        return Call("GET", "/readyz", _reader(Ready), ok_statuses=(503,))


def _many(call: Call[T], images: Sequence[Picture], kind: type[T]) -> Call[list[Result[T]]]:
    """A call for one picture -> the call for many with the same settings."""
    fields = {name: value for name, value in call.json.items() if name != "image"}
    return Call(call.method, call.path, _results(kind), {"images": [*map(_picture, _pictures(images))], **fields})


def _results(kind: type[T]) -> Callable[[Any], list[Result[T]]]:
    def result(row: Mapping[str, Any]) -> Result[T]:
        if "problem" not in row:
            return Result(row["index"], _read(kind, row["answer"]))
        document = row["problem"]
        return Result(row["index"], None, _problem_of(document["status"], document, document.get("retry_after")))

    return lambda answer: [result(row) for row in answer["results"]]


def _classifier(name: str, tail: str = "") -> str:
    return f"/v1/classifiers/{quote(name, safe='')}{tail}"


def _items(items: Sequence[tuple[Picture, str] | tuple[Picture, str, str]]) -> list[dict[str, Any]]:
    return [
        {"image": _picture(picture), "label": label, **({"caption": caption[0]} if caption else {})}
        for picture, label, *caption in items
    ]


def _collection(name: str, tail: str = "") -> str:
    return f"/v1/collections/{quote(name, safe='')}{tail}"


def _present(**values: Any) -> dict[str, Any]:
    """The values that are neither None nor an empty list."""
    return {name: value for name, value in values.items() if value is not None and value != []}


def _texts(values: Sequence[str]) -> list[str]:
    if isinstance(values, str):
        raise TypeError(f"{values[:40]!r} is one text; expected a list of texts")
    return list(values)


def _text_lists(values: Mapping[str, Sequence[str]] | None) -> dict[str, list[str]] | None:
    return None if values is None else {name: _texts(texts) for name, texts in values.items()}


def _pictures(values: Sequence[V]) -> Sequence[V]:
    if isinstance(values, str | PathLike | bytes | bytearray | memoryview | Example) or hasattr(values, "read"):
        raise TypeError(f"one picture, a {type(values).__name__}, was given; expected a list of pictures")
    return values


def _picture(picture: Picture) -> dict[str, str]:
    """Raises as `_bytes`."""
    return {"b64": base64.b64encode(_bytes(picture, "a picture is", "the bytes of a picture")).decode()}


def _bytes(file: File, what: str = "a bank is", content: str = "the bytes of an npz file") -> bytes:
    """Raises `OSError` if a path cannot be read, `TypeError` for a value of another type."""
    if isinstance(file, str | PathLike):
        data: object = Path(file).read_bytes()
    else:
        data = file.read() if hasattr(file, "read") else file
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(
            f"{what} of the type {type(data).__name__}; expected a path, {content}, or a file opened in binary mode"
        )
    return bytes(data)


def _boxes(boxes: Sequence[Sequence[float]]) -> list[list[float]] | None:
    return [[*map(float, box)] for box in boxes] or None


def _numbers(vector: Sequence[float]) -> list[float]:
    return [float(number) for number in vector]


def _vector_lists(values: Mapping[str, Sequence[Sequence[float]]] | None) -> dict[str, list[list[float]]] | None:
    return {label: [_numbers(row) for row in rows] for label, rows in values.items()} if values else None


def _query(text: str | None, image: Picture | None, vector: Sequence[float] | None = None) -> dict[str, Any]:
    if [text is None, image is None, vector is None].count(False) != 1:
        raise TypeError("expected a text, a picture or a vector, exactly one of them")
    if vector is not None:
        return {"vector": _numbers(vector)}
    return {"text": text} if image is None else {"image": _picture(image)}


def _part(part: Part) -> dict[str, Any]:
    weight = {} if part.weight == 1 else {"weight": part.weight}
    if part.id is None:
        return _query(part.text, part.image, part.vector) | weight
    if part != Part(id=part.id, weight=part.weight):
        raise TypeError("expected a text, a picture, a vector or an id, exactly one of them")
    return {"id": part.id} | weight


def _line(call: Call[list[Result[T]]], line: str) -> list[Result[T]]:
    """The result in a line of a stream. Raises `Unreadable`."""
    try:
        return call.read({"results": [json.loads(line)]})
    except (ValueError, LookupError, TypeError) as error:
        raise Unreadable(f"a line of the answer is not one of calmclip: {error!r}") from None


def _nothing(answer: Any) -> None:
    return None


def _reader(kind: type[T], key: str | None = None) -> Callable[[Any], T]:
    """A function: JSON, or the value of its ``key`` -> ``kind``, a dataclass or a list of dataclasses."""

    def read(answer: Any) -> T:
        value: T = _read(kind, answer if key is None else answer[key])
        return value

    return read


def _read(kind: Any, value: Any) -> Any:
    """JSON -> the type ``kind``. Unknown fields, which a newer service may send, are ignored."""
    if types := _types(kind):
        return kind(**{name: _read(inner, value[name]) for name, inner in types.items()})
    if get_origin(kind) is list and _types(get_args(kind)[0]):
        return [_read(get_args(kind)[0], item) for item in value]
    if get_origin(kind) is UnionType and value is not None:
        return _read(get_args(kind)[0], value)
    return value


@cache
def _types(kind: Any) -> dict[str, Any]:
    """Name -> type of a dataclass's fields; empty for another type."""
    return get_type_hints(kind) if is_dataclass(kind) else {}


def _content(answer: httpx.Response, kind: str | None) -> Any:
    """JSON, None for an empty body; the bytes of a file of the content type ``kind`` or `ANY`. Raises `ValueError`."""
    if kind is None:
        return answer.json() if answer.content else None
    given = answer.headers.get("content-type")
    if kind not in (ANY, given):
        raise ValueError(f"the content type is {given!r}; expected {kind}")
    return answer.content


def _attempts(call: Call[T], retries: int, longest_wait: float) -> Generator[float, httpx.Response, T]:
    """Yields the seconds to wait before the request is sent, receives its response, and returns the value read."""
    wait = 0.0
    while True:
        answer = yield wait
        if answer.is_success or answer.status_code in call.ok_statuses:
            try:
                return call.read(_content(answer, call.kind))
            except (ValueError, LookupError, TypeError) as error:
                raise Unreadable(f"{answer.url} did not answer as calmclip does: {error!r}") from None
        problem = _problem(answer)
        after = problem.retry_after if isinstance(problem, Overloaded) and retries else None
        if after is None or after > longest_wait:
            if "results" not in problem.document:
                raise problem
            return call.read(problem.document)  # of many pictures, and none has an answer
        retries, wait = retries - 1, after


def _problem(answer: httpx.Response) -> Problem:
    try:
        document = answer.json()
    except ValueError:
        document = None
    after = answer.headers.get("retry-after", "")
    return _problem_of(
        answer.status_code,
        document if isinstance(document, dict) else {"title": answer.reason_phrase},
        float(after) if after.isascii() and after.isdigit() else None,
    )


def _problem_of(status: int, document: Mapping[str, Any], retry_after: float | None) -> Problem:
    kind = PROBLEMS.get(status, Failed if status >= 500 else Rejected)
    return kind(status, document, retry_after)


@contextmanager
def _reachable(url: httpx.URL) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise Unreachable(f"{url} does not answer: {error or type(error).__name__}") from error


def _describe(method: Any, make: Callable[..., Call[Any]]) -> None:
    """Copy name, docstring and signature of ``make`` to the method, for `help`."""
    method.__name__, method.__doc__ = make.__name__, make.__doc__
    signature = inspect.signature(make)
    self_ = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    (answer,) = get_args(signature.return_annotation)
    method.__signature__ = signature.replace(
        parameters=[self_, *signature.parameters.values()], return_annotation=answer
    )


def _sync(make: Callable[P, Call[T]]) -> "Callable[Concatenate[Client, P], T]":
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run(make(*args, **kwargs))

    _describe(method, make)
    return method


def _async(make: Callable[P, Call[T]]) -> "Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]":
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run(await asyncio.to_thread(make, *args, **kwargs))  # reads and encodes pictures

    _describe(method, make)
    return method


class _Options(Generic[H]):
    _http_client: Callable[..., H]

    def __init__(
        self,
        url: str = URL,
        *,
        timeout: float = 60.0,
        retries: int = 2,
        longest_wait: float = 30.0,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> None:
        auth = {"Authorization": f"Bearer {key}"} if key is not None else {}
        self._retry_limits = (retries, longest_wait)
        self._http = self._http_client(base_url=url, timeout=timeout, headers={**(headers or {}), **auth})


class Client(_Options[httpx.Client]):
    """Synchronous; threads may share it. Methods raise `ClientError`, and `OSError` for a path.

    ``retries``: how often a request that is answered 503 is sent again, after the seconds that the service asks for.
    It is not sent again if these are more than ``longest_wait``. Every request has the ``headers`` and the ``key``.
    """

    _http_client = httpx.Client

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def run(self, call: Call[T]) -> T:
        attempts = _attempts(call, *self._retry_limits)
        try:
            wait = next(attempts)
            while True:
                time.sleep(wait)
                with _reachable(self._http.base_url):
                    answer = self._http.request(**call.request)
                wait = attempts.send(answer)
        except StopIteration as done:
            value: T = done.value
            return value

    def lines(self, call: Call[list[Result[T]]]) -> Iterator[Result[T]]:
        """The results of a call of many pictures, each as soon as it is there, not in order::

            for result in client.lines(Calls.classify_many(pictures, labels)): ...

        Closing the iterator ends the rest of the request.
        """
        attempts = _attempts(call, *self._retry_limits)
        wait = next(attempts)
        while True:
            time.sleep(wait)
            with _reachable(self._http.base_url), self._http.stream(**call.request, headers=LINES) as answer:
                if answer.is_success:
                    for line in answer.iter_lines():
                        yield from _line(call, line)
                    return
                answer.read()
            try:
                wait = attempts.send(answer)
            except StopIteration as done:
                yield from done.value
                return

    classify = _sync(Calls.classify)
    classify_many = _sync(Calls.classify_many)
    detect_many = _sync(Calls.detect_many)
    embed_many = _sync(Calls.embed_many)
    tag_many = _sync(Calls.tag_many)
    embed = _sync(Calls.embed)
    detect = _sync(Calls.detect)
    rank = _sync(Calls.rank)
    tag = _sync(Calls.tag)
    segment = _sync(Calls.segment)
    segment_indexed = _sync(Calls.segment_indexed)
    anomaly = _sync(Calls.anomaly)
    explain = _sync(Calls.explain)
    compress = _sync(Calls.compress)
    enhance = _sync(Calls.enhance)
    collections = _sync(Calls.collections)
    create_collection = _sync(Calls.create_collection)
    collection = _sync(Calls.collection)
    delete_collection = _sync(Calls.delete_collection)
    upsert = _sync(Calls.upsert)
    page = _sync(Calls.page)
    item = _sync(Calls.item)
    delete_items = _sync(Calls.delete_items)
    search = _sync(Calls.search)
    original = _sync(Calls.original)
    export_bank = _sync(Calls.export_bank)
    import_bank = _sync(Calls.import_bank)
    classifiers = _sync(Calls.classifiers)
    put_classifier = _sync(Calls.put_classifier)
    calibrate_classifier = _sync(Calls.calibrate_classifier)
    fit_classifier = _sync(Calls.fit_classifier)
    classifier = _sync(Calls.classifier)
    delete_classifier = _sync(Calls.delete_classifier)
    models = _sync(Calls.models)
    model = _sync(Calls.model)
    ready = _sync(Calls.ready)

    def items(
        self, collection: str, *, page_size: int = 100, vectors: bool = False, fields: Sequence[str] = ()
    ) -> Iterator[StoredItem]:
        """All items ordered by id, page by page."""
        after: str | None = None
        while True:
            page = self.page(collection, after=after, limit=page_size, vectors=vectors, fields=fields)
            yield from page.items
            if (after := page.next) is None:
                return


class AsyncClient(_Options[httpx.AsyncClient]):
    """`Client` under asyncio."""

    _http_client = httpx.AsyncClient

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def run(self, call: Call[T]) -> T:
        attempts = _attempts(call, *self._retry_limits)
        try:
            wait = next(attempts)
            while True:
                await asyncio.sleep(wait)
                with _reachable(self._http.base_url):
                    answer = await self._http.request(**call.request)
                wait = attempts.send(answer)
        except StopIteration as done:
            value: T = done.value
            return value

    async def lines(self, call: Call[list[Result[T]]]) -> AsyncIterator[Result[T]]:
        """As `Client.lines`: ``async for result in client.lines(Calls.classify_many(pictures, labels))``. A loop that
        ends early closes the iterator by `contextlib.aclosing`."""
        attempts = _attempts(call, *self._retry_limits)
        wait = next(attempts)
        while True:
            await asyncio.sleep(wait)
            with _reachable(self._http.base_url):
                async with self._http.stream(**call.request, headers=LINES) as answer:
                    if answer.is_success:
                        async for line in answer.aiter_lines():
                            for result in _line(call, line):
                                yield result
                        return
                    await answer.aread()
            try:
                wait = attempts.send(answer)
            except StopIteration as done:
                for result in done.value:
                    yield result
                return

    classify = _async(Calls.classify)
    classify_many = _async(Calls.classify_many)
    detect_many = _async(Calls.detect_many)
    embed_many = _async(Calls.embed_many)
    tag_many = _async(Calls.tag_many)
    embed = _async(Calls.embed)
    detect = _async(Calls.detect)
    rank = _async(Calls.rank)
    tag = _async(Calls.tag)
    segment = _async(Calls.segment)
    segment_indexed = _async(Calls.segment_indexed)
    anomaly = _async(Calls.anomaly)
    explain = _async(Calls.explain)
    compress = _async(Calls.compress)
    enhance = _async(Calls.enhance)
    collections = _async(Calls.collections)
    create_collection = _async(Calls.create_collection)
    collection = _async(Calls.collection)
    delete_collection = _async(Calls.delete_collection)
    upsert = _async(Calls.upsert)
    page = _async(Calls.page)
    item = _async(Calls.item)
    delete_items = _async(Calls.delete_items)
    search = _async(Calls.search)
    original = _async(Calls.original)
    export_bank = _async(Calls.export_bank)
    import_bank = _async(Calls.import_bank)
    classifiers = _async(Calls.classifiers)
    put_classifier = _async(Calls.put_classifier)
    calibrate_classifier = _async(Calls.calibrate_classifier)
    fit_classifier = _async(Calls.fit_classifier)
    classifier = _async(Calls.classifier)
    delete_classifier = _async(Calls.delete_classifier)
    models = _async(Calls.models)
    model = _async(Calls.model)
    ready = _async(Calls.ready)

    async def items(
        self, collection: str, *, page_size: int = 100, vectors: bool = False, fields: Sequence[str] = ()
    ) -> AsyncIterator[StoredItem]:
        """All items ordered by id, page by page."""
        after: str | None = None
        while True:
            page = await self.page(collection, after=after, limit=page_size, vectors=vectors, fields=fields)
            for item in page.items:
                yield item
            if (after := page.next) is None:
                return
