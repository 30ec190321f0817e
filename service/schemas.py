"""Request and response models: the words of the HTTP surface.

A request model is filled from JSON, from a multipart form, or from the query beside a raw picture; see
`calmclip.service.uploads`. Responses are rendered by orjson, vectors straight from numpy.
"""

import base64
import binascii
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictStr,
    WithJsonSchema,
    model_validator,
)

from calmclip.models.classifier import Classifier
from calmclip.models.flow import Array
from calmclip.models.tasks.classify import Ranking
from calmclip.models.tasks.detect import Detections, Example, Suppression
from calmclip.models.tasks.embed import Embeddings
from calmclip.service.settings import MAX_TEXTS
from calmclip.service.stores import Condition

if TYPE_CHECKING:
    from calmclip.service.classifiers import Registered

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
# In a path, where it is the route that checks it.
NewName = Annotated[str, WithJsonSchema({"type": "string", "pattern": NAME})]
Template = Annotated[str, WithJsonSchema({"type": "string", "pattern": r"\{\}"})]


def _picture(value: object) -> object:
    """Bytes of a form or raw body stay; JSON says ``{"b64": "..."}``."""
    if isinstance(value, bytes):
        return value
    if not (isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str)):
        raise ValueError('expected a picture as {"b64": "<base64 of a JPEG, PNG or WebP file>"}')
    try:
        return base64.b64decode(value["b64"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"`b64` is not base64: {error}") from None


Picture = Annotated[
    bytes,
    BeforeValidator(_picture),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "b64": {"type": "string", "minLength": 1, "description": "base64 of a JPEG, PNG or WebP file"},
                "url": {"type": "string", "description": "or its address, where the service fetches pictures"},
            },
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
        }
    ),
]
Vectors = Annotated[
    Any, WithJsonSchema({"type": "array", "items": {"type": "array", "items": {"type": "number"}}})
]  # numpy goes to orjson as it is
Scalar = str | int | float | bool
Bound = StrictFloat | StrictStr  # true is no number here
MIB = 1 << 20
MAX_KEYS = 64  # of one object: each unknown one would be an error of its own
MAX_FIELDS = 32  # of a filter: the engine's parser recurses, and thousands overflow its stack
MAX_IN = 1000  # values of all the filter's `in` together


class Body(BaseModel):
    """What a caller sends: unknown fields are errors, and so are NaN and infinity.

    Lists stop at their first fault (``fail_fast``): millions of wrong elements must not become millions of errors.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    max_bytes: ClassVar[int | None] = None  # of the JSON, where the limit of all bodies is far too much

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_KEYS:
            raise ValueError(f"{len(value)} fields were given; no object here has more than {MAX_KEYS}")
        return value


_TEMPERATURE = "divides the logits, 0.01 to 100: over 1, scores are less sure of themselves"
_NONE_BELOW = "`none_of_these` is true when no score reaches it"


class PictureBody(Body):
    """One picture, and fields that a form and a query can say too: such a body comes in any of the three shapes."""

    model: str | None = Field(None, description="a loaded bundle; else the first that serves the task")
    image: Picture


class LabelledPicture(PictureBody):
    labels: list[str] = Field([], fail_fast=True, description="else the classifier's, else the bundle's own")
    classifier: str | None = Field(None, description="a registered one; with labels too, these are some of its own")
    templates: list[Template] = Field(
        [], fail_fast=True, description="sentences with a {}, instead of the classifier's or the bundle's"
    )


class ClassifyBody(LabelledPicture):
    top_k: int | None = Field(None, ge=1, description="how many labels to answer; all by default")
    temperature: float | None = Field(
        None, ge=0.01, le=100, description=f"{_TEMPERATURE}; else the classifier's, else 1"
    )
    none_below: float | None = Field(
        None, gt=0, le=1, description=f"{_NONE_BELOW}; else the classifier's, if it has one"
    )


_DEFAULT = Suppression()


class ExampleBody(Body):
    """A picture of what is wanted; in a form it is a file."""

    image: Picture
    box: Annotated[list[StrictFloat], Field(min_length=4, max_length=4, fail_fast=True)] | None = Field(
        None, description="where in it: x0, y0, x1, y1 in pixels of the upright picture; else what it shows"
    )
    label: str | None = Field(None, min_length=1, description="its name in the answer; else 'example N'")

    @model_validator(mode="before")
    @classmethod
    def _file(cls, value: Any) -> Any:
        if isinstance(value, bytes):
            return {"image": value}
        if not isinstance(value, dict):
            raise ValueError('expected {"image": {"b64": …}} with or without `box` and `label`, in a form a file')
        return value


class DetectBody(LabelledPicture):
    """Ranges of the thresholds are the task's own; their defaults those of a bundle that brings none along."""

    examples: list[ExampleBody] = Field([], fail_fast=True, description="what to look for, beside labels or instead")

    method: Literal["hard", "linear", "gaussian"] = _DEFAULT.method
    sigma: float = Field(_DEFAULT.sigma, description="gaussian: a larger one suppresses less")
    iou_threshold: float = Field(_DEFAULT.iou_threshold, description="hard and linear: overlap that counts")
    min_score: float = Field(_DEFAULT.min_score, description="boxes under it go, before and after suppression")
    max_output: int = Field(_DEFAULT.max_output, description="at most this many boxes")
    per_class: bool = Field(_DEFAULT.per_class, description="boxes of different labels leave each other alone")

    def suppression(self, default: Suppression) -> Suppression:
        """``default``, but for what was sent."""
        sent = vars(default).keys() & self.model_fields_set
        return replace(default, **{name: getattr(self, name) for name in sent})

    def shown(self) -> list[Example]:
        return [Example(one.image, one.box, one.label) for one in self.examples]


_TEXT: dict[str, Any] = {"required": ["text"], "properties": {"text": {"type": "string"}, "image": {"type": "null"}}}
_IMAGE: dict[str, Any] = {"required": ["image"], "properties": {"image": {"type": "object"}, "text": {"type": "null"}}}


class EmbedInput(Body):
    """One of the two."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_TEXT, _IMAGE]})

    text: str | None = None
    image: Picture | None = None

    @model_validator(mode="after")
    def _one(self) -> "EmbedInput":
        if (self.text is None) == (self.image is None):
            raise ValueError("expected `text` or `image`, one of them")
        return self

    @property
    def value(self) -> str | bytes:
        value = self.text if self.image is None else self.image
        assert value is not None
        return value


class EmbedBody(Body):
    model: str | None = Field(None, description="a loaded bundle; else the first that embeds")
    inputs: list[EmbedInput] = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)


DATA_URI = "data:image/"


def _openai_inputs(value: object) -> object:
    """One text or several -> texts and, where a text is a data URI of a picture, its bytes; those fetched stay."""
    given = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | bytes) for one in given):
        raise ValueError(
            "expected a text or a list of texts; tokens are of another model's vocabulary, so send the text"
        )
    return [
        _data_uri(one, index) if isinstance(one, str) and one[: len(DATA_URI)].lower() == DATA_URI else one
        for index, one in enumerate(given)
    ]


def _data_uri(text: str, index: int) -> bytes:
    head, _, data = text.partition(",")
    try:
        if not head.lower().endswith(";base64"):
            raise ValueError("expected data:image/…;base64,…")
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise ValueError(f"input {index} is no data URI of a picture: {error}") from None


class EmbeddingsBody(Body):
    """What OpenAI's `POST /v1/embeddings` takes; a text that is a data URI of a picture is that picture.

    So is, where the service fetches pictures, a text that is nothing but an https address.
    """

    model: str = Field(description="a loaded bundle")
    input: Annotated[
        list[str | bytes],
        BeforeValidator(_openai_inputs),
        Field(min_length=1, max_length=MAX_TEXTS),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
    ]
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of little-endian float32")
    dimensions: int | None = Field(
        None, ge=1, description="the bundle's own, where given: its vectors cannot be cut short"
    )
    user: str | None = Field(None, description="read and forgotten")


class CollectionBody(Body):
    max_bytes = MIB

    model: str | None = Field(None, description="the bundle whose vectors it will hold; else the first that embeds")


class Item(EmbedInput):
    id: str = Field(min_length=1, max_length=512)
    meta: dict[str, Any] = Field({}, description="anything JSON; search filters on its top-level fields")


class ItemsBody(Body):
    items: list[Item] = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)


class DeleteItemsBody(Body):
    ids: list[str] = Field(min_length=1, fail_fast=True)


Values = Annotated[list[Scalar], Field(min_length=1, max_length=MAX_IN, fail_fast=True)]


class Range(Body):
    """All that are given must hold. Numbers compare with numbers, strings with strings."""

    model_config = ConfigDict(populate_by_name=True)

    in_: Values | None = Field(None, alias="in")
    gt: Bound | None = None
    gte: Bound | None = None
    lt: Bound | None = None
    lte: Bound | None = None


def _few_fields(value: Any) -> Any:
    """Before they are looked at; pydantic's own ``max_length`` counts afterwards."""
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"{len(value)} fields were given; at most {MAX_FIELDS} are read")
    return value


Filter = Annotated[
    dict[Annotated[str, Field(pattern=r"^[\w][\w .:-]{0,63}$")], Scalar | Range],
    BeforeValidator(_few_fields),
    Field(max_length=MAX_FIELDS),
]


class SearchBody(Body):
    query: EmbedInput
    model: str | None = Field(None, description="must be the bundle that filled the collection, where given")
    top_k: int = Field(10, ge=1)
    filter: Filter = Field({}, description='meta field -> value, {"in": [...]}, or {"gte": 1, "lt": 2}; all must hold')

    @model_validator(mode="after")
    def _few_values(self) -> "SearchBody":
        count = sum(len(one.in_ or ()) for one in self.filter.values() if isinstance(one, Range))
        if count > MAX_IN:
            raise ValueError(f"the filter lists {count} values; at most {MAX_IN} are read, over all its fields")
        return self

    def where(self) -> list[Condition]:
        found: list[Condition] = []
        for name, wanted in self.filter.items():
            if not isinstance(wanted, Range):
                found.append(Condition(name, "in", (wanted,)))
                continue
            if wanted.in_ is not None:
                found.append(Condition(name, "in", tuple(wanted.in_)))
            for op in ("gt", "gte", "lt", "lte"):
                if (value := getattr(wanted, op)) is not None:
                    found.append(Condition(name, op, value))
        return found


class KnownPicture(Body):
    image: Picture
    label: str = Field(description="which of the classifier's labels is right")


class CalibrateBody(Body):
    model: str | None = Field(None, description="the bundle to calibrate with; else the first that classifies")
    items: list[KnownPicture] = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)


class FitBody(CalibrateBody):
    head: str = Field(description="a plug-in of the family heads that can be fitted")
    params: dict[str, Any] = Field({}, description="the head's own")


class HeadBody(Body):
    name: str = Field(description="a plug-in of the family heads")
    params: dict[str, Any] = Field({}, description="the head's own")


Descriptions = Annotated[
    dict[str, Annotated[list[str], Field(min_length=1, fail_fast=True)]],
    Field(description="label -> sentences that take the place of the templates"),
]


class ClassifierBody(Body):
    max_bytes = MIB

    labels: list[str] = Field(min_length=1, fail_fast=True)
    templates: list[Template] = Field([], fail_fast=True, description="else the bundle's")
    descriptions: Descriptions = {}
    head: HeadBody | None = Field(None, description="else the bundle's; one with arrays of its own is fitted, not sent")
    temperature: float = Field(1.0, ge=0.01, le=100, description=_TEMPERATURE)
    none_below: float | None = Field(None, gt=0, le=1, description=_NONE_BELOW)

    def classifier(self) -> Classifier:
        """Raises `BadRequest`."""
        head: dict[str, Any] = {"head": self.head.name, "params": self.head.params} if self.head else {}
        return Classifier(
            tuple(self.labels),
            tuple(self.templates),
            {label: tuple(lines) for label, lines in self.descriptions.items()},
            temperature=self.temperature,
            none_below=self.none_below,
            **head,
        )


class Answer(BaseModel):
    """What the service sends."""

    model_config = ConfigDict(arbitrary_types_allowed=True)


class RankedLabel(Answer):
    label: str
    index: int = Field(description="place among the labels sent")
    score: float = Field(description="of the bundle's head: softmax over the labels, or a sigmoid for each")
    cosine: float = Field(description="of picture and label, before temperature")


class ClassifyAnswer(Answer):
    model: str
    temperature: float = Field(description="the one that the scores were made with")
    labels: list[RankedLabel] = Field(description="best first")
    none_of_these: bool | None = Field(description="whether no score reaches `none_below`; null where it is not given")

    @classmethod
    def of(cls, model: str, ranking: Ranking) -> "ClassifyAnswer":
        return cls.model_construct(
            model=model,
            temperature=ranking.temperature,
            labels=[
                RankedLabel.model_construct(
                    label=one.label, index=one.index, score=tidy(one.score), cosine=tidy(one.cosine)
                )
                for one in ranking
            ],
            none_of_these=ranking.none,
        )


def tidy(score: float) -> float:
    """Six decimals: a float32 between 0 and 1 has no more to say, and JSON should be read."""
    return round(score, 6)


class EmbedAnswer(Answer):
    model: str
    dim: int
    normalized: bool
    embeddings: Vectors = Field(description="unit vectors, in the order of the inputs")

    @classmethod
    def of(cls, model: str, vectors: Array) -> "EmbedAnswer":
        return cls.model_construct(model=model, dim=vectors.shape[1], normalized=True, embeddings=vectors)


class Embedding(Answer):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: Annotated[
        Any, WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]})
    ] = Field(description="a unit vector, or the base64 of its little-endian float32 numbers")


class Usage(Answer):
    prompt_tokens: int = Field(description="of the texts; pictures have none")
    total_tokens: int


class EmbeddingsAnswer(Answer):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding] = Field(description="in the order of the inputs")
    usage: Usage

    @classmethod
    def of(cls, model: str, found: Embeddings, encoding: str) -> "EmbeddingsAnswer":
        rows: Iterable[Any] = found.vectors
        if encoding == "base64":
            rows = (base64.b64encode(row.astype("<f4").tobytes()).decode() for row in found.vectors)
        return cls.model_construct(
            model=model,
            data=[Embedding.model_construct(index=index, embedding=row) for index, row in enumerate(rows)],
            usage=Usage.model_construct(prompt_tokens=found.tokens, total_tokens=found.tokens),
        )


class Box(Answer):
    """Pixels of the original upright picture; x1 and y1 are outside by nothing: x1 - x0 is the width."""

    x0: float
    y0: float
    x1: float
    y1: float


class DetectedBox(Answer):
    label: str
    index: int = Field(description="place among the labels sent, examples counted on behind them")
    score: float = Field(description="after suppression")
    raw_score: float = Field(description="before")
    box: Box


class Size(Answer):
    width: int
    height: int


class SuppressionAsked(Answer):
    """How overlapping boxes are thinned out, as a detect request says it."""

    method: str
    sigma: float
    iou_threshold: float
    min_score: float
    max_output: int
    per_class: bool


class SuppressionUsed(SuppressionAsked):
    candidates: int = Field(description="box-label pairs that went in")
    kept: int


class DetectAnswer(Answer):
    model: str
    image: Size
    detections: list[DetectedBox] = Field(description="best first")
    suppression: SuppressionUsed

    @classmethod
    def of(cls, model: str, found: Detections, used: Suppression) -> "DetectAnswer":
        sides = ("x0", "y0", "x1", "y1")
        return cls.model_construct(
            model=model,
            image=Size.model_construct(width=found.width, height=found.height),
            detections=[
                DetectedBox.model_construct(
                    label=one.label,
                    index=one.index,
                    score=tidy(one.score),
                    raw_score=tidy(one.raw_score),
                    box=Box.model_construct(
                        **{side: round(x, 2) for side, x in zip(sides, one.box.tolist(), strict=True)}
                    ),
                )
                for one in found
            ],
            suppression=SuppressionUsed.model_construct(
                **vars(used), candidates=found.candidates, kept=len(found.detections)
            ),
        )


class CollectionAnswer(Answer):
    name: str
    model: str = Field(description="the bundle that fills it")
    digest: str = Field(description="sha256 of that bundle's manifest")
    dim: int
    created: str
    items: int


class CollectionsAnswer(Answer):
    collections: list[CollectionAnswer]


class CountAnswer(Answer):
    collection: str
    count: int = Field(description="items written, or removed")
    items: int = Field(description="items it now holds")


class StoredItem(Answer):
    id: str
    meta: dict[str, Any]


class ItemsAnswer(Answer):
    collection: str
    items: list[StoredItem] = Field(description="by id")
    next: str | None = Field(description="`after` of the next page; null on the last")


class Hit(Answer):
    id: str
    score: float = Field(description="cosine")
    meta: dict[str, Any]


class SearchAnswer(Answer):
    collection: str
    hits: list[Hit] = Field(description="nearest first")


class ClassifierAnswer(Answer):
    name: str
    version: int = Field(description="counts the changes")
    labels: list[str]
    templates: list[str]
    descriptions: dict[str, list[str]]
    head: str | None = Field(description="null: the bundle's")
    params: dict[str, Any] = Field(description="of the head")
    temperature: float = Field(description=_TEMPERATURE)
    none_below: float | None = Field(description=_NONE_BELOW)
    family: str | None = Field(
        description="of the bundles that it was fitted or calibrated for, as /v1/models has it; null: for any"
    )
    fitted: bool = Field(description="whether its head holds arrays of its own, and so is asked with its family alone")

    @classmethod
    def of(cls, one: "Registered") -> "ClassifierAnswer":
        said = {key: value for key, value in one.said().items() if key != "assets"}
        return cls.model_construct(version=one.version, fitted=bool(one.assets), **said)


class ClassifiersAnswer(Answer):
    classifiers: list[ClassifierAnswer]


class ModelSummary(Answer):
    name: str
    digest: str
    family: str = Field(description="the float and the INT8 bundle of one export have the same")
    tasks: list[str]
    precision: str
    dim: int | None
    labels: int = Field(description="labels the bundle brings along")
    suppression: SuppressionAsked | None = Field(
        description="of a detect request that says nothing else; null: no detect"
    )
    examples: int = Field(description="example pictures that a detect request may hold; 0 where the bundle takes none")


class ModelsAnswer(Answer):
    models: list[ModelSummary] = Field(description="in load order: the first that serves a task is its default")


class ModelAnswer(Answer):
    name: str
    digest: str
    manifest: dict[str, Any] = Field(description="bundle.json")
    report: dict[str, Any] | None = Field(description="report.json: what was measured when it was exported")


class HealthAnswer(Answer):
    status: Literal["ok"]


class ReadyAnswer(Answer):
    ready: bool
    loaded: list[str]
    failed: dict[str, str] = Field(description="bundle or collection -> why it did not load")


class ProblemAnswer(Answer):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    error: str | None = Field(None, description="under /v2: the detail, as the Open Inference Protocol calls it")
    known: list[str] | None = Field(None, description="names that would have worked")
    errors: list[dict[str, str]] | None = Field(None, description="where the body does not fit the schema")


def encode(answer: Answer) -> bytes:
    """``vars``: the fields, which need no more than to be written. A field of an answer has no other name outside."""
    return orjson.dumps(answer, vars, orjson.OPT_SERIALIZE_NUMPY)
