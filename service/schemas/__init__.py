"""Request and response models of the HTTP API, one module per task. Here is what the tasks share.

`calmclip.service.uploads` fills a request model from JSON, from a multipart form, or from a raw picture and the query.
orjson renders the answers; it writes numpy arrays directly.
"""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar, get_args, get_origin

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo

from calmclip.models import labels
from calmclip.models.bundle.manifest import MAX_DIM
from calmclip.models.errors import BadRequest, InputError
from calmclip.models.files import NAME
from calmclip.models.preprocess.formats import NAMES
from calmclip.service.settings import MAX_TEXTS
from calmclip.service.strict_json import parse

A = TypeVar("A")

NewName = Annotated[str, WithJsonSchema({"type": "string", "pattern": NAME})]  # a path parameter that the route checks
# `check_texts` applies the rule, because its error says more than pydantic's
Template = Annotated[str, WithJsonSchema(TypeAdapter(labels.Template).json_schema())]
MIB = 1 << 20
MAX_TEXT_LISTS = 10_000  # more labels than a request has
MAX_BOXES = 1000  # of one picture: more than any picture has things
_PLAIN = bytes.maketrans(b"-_", b"+/")
MAX_KEYS = 64  # per object: each unknown key would be a validation error of its own


def _picture(value: object) -> object:
    """The picture's bytes. A form or a raw body has them already; JSON has ``{"b64": "..."}``."""
    if isinstance(value, bytes):
        return value
    if not (isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str)):
        raise ValueError(f'expected a picture as {{"b64": "<base64 of a {NAMES} file>"}}')
    try:
        return of_base64(value["b64"])
    except ValueError as error:
        raise ValueError(f"`b64` is not base64: {error}") from None


def of_base64(text: str) -> bytes:
    """The bytes of base64 (RFC 4648), in the plain or the URL-safe alphabet, with or without padding and line breaks,
    or of a data URI (RFC 2397) in base64. Memory: three times the text. Raises `ValueError`."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError("expected data:image/…;base64,…")
    code = text.encode("ascii").translate(_PLAIN, b" \t\r\n")
    return base64.b64decode(code + b"=" * (-len(code) % 4), validate=True)


_B64 = f"base64 of a {NAMES} file; line breaks, the URL-safe alphabet, no padding and data URIs are read too"
Picture = Annotated[
    bytes,
    BeforeValidator(_picture),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "b64": {"type": "string", "minLength": 1, "description": _B64},
                "url": {"type": "string", "description": "its address, if the service fetches pictures"},
            },
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
        }
    ),
]


def _text_lists(value: object) -> object:
    """Stops at the first fault, see `Body`."""
    if isinstance(value, dict):
        if len(value) > MAX_TEXT_LISTS:
            raise ValueError(f"{len(value)} lists were given; at most {MAX_TEXT_LISTS} are read")
        for name, texts in value.items():
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name[:200]!r} has no list of texts; expected one")
    return value


TextLists = Annotated[dict[str, list[str]], BeforeValidator(_text_lists)]  # in a form or a query it is JSON
# x0, y0, x1, y1 in pixels of the upright picture
PixelBox = Annotated[list[StrictFloat], Field(min_length=4, max_length=4, fail_fast=True)]
PixelBoxes = Annotated[list[PixelBox], Field(min_length=1, max_length=MAX_BOXES, fail_fast=True)]
# what another model made of a text, for a bundle that reads its vectors
VectorNumbers = Annotated[list[StrictFloat], Field(min_length=1, max_length=MAX_DIM, fail_fast=True)]


def _vector_lists(value: object) -> object:
    """Stops at the first fault, see `Body`. Numbers are checked where the rows are made."""
    if isinstance(value, dict):
        if len(value) > MAX_TEXT_LISTS:
            raise ValueError(f"vectors of {len(value)} labels were given; at most {MAX_TEXT_LISTS} are read")
        for name, rows in value.items():
            if not isinstance(rows, list) or not all(isinstance(row, list) and _numbers(row) for row in rows):
                raise ValueError(f"{name[:200]!r} has no list of vectors; expected one, such as [[0.1, 0.2]]")
    return value


def _numbers(row: list[object]) -> bool:
    return all(type(number) in (int, float) for number in row)


VectorLists = Annotated[
    dict[str, Any],
    BeforeValidator(_vector_lists),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        }
    ),
]


class Body(BaseModel):
    """What a caller sends. Unknown fields, NaN and infinity are errors.

    Validation of a list stops at its first error (``fail_fast``): millions of wrong elements must not become millions
    of errors.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    max_bytes: ClassVar[int | None] = None  # of the JSON, if the service's limit for all bodies is far too high
    form: ClassVar[bool] = False  # whether a multipart form may be the body,
    raw: ClassVar[bool] = False  # and a picture alone, so that the query holds the other fields

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_KEYS:
            raise ValueError(f"{len(value)} fields were given; at most {MAX_KEYS} are read")
        return value

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        """The fields of a form or a query, a picture as bytes. A list takes every pair of its name, another field one;
        a field that is an object is JSON.

        Raises `BadRequest`, `InvalidRequest`.
        """
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in cls.model_fields and is_list(cls.model_fields[key]):
                fields.setdefault(key, []).append(value)
            elif key in fields:
                raise BadRequest(f"the field {key!r} is given twice; expected one")
            elif key in cls.model_fields and is_object(cls.model_fields[key]):
                text = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
                fields[key] = parse(text, f"the field {key!r}")
            else:
                fields[key] = value
        return fields


def is_list(field: FieldInfo) -> bool:
    """A list, or a list or null."""
    kinds = (field.annotation, *(() if is_object(field) else get_args(field.annotation)))
    return any(get_origin(kind) is list for kind in kinds)


def is_object(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict


class PictureBody(Body):
    """One picture, and fields that a form or a query can also carry. The body may have any of the three shapes."""

    form: ClassVar[bool] = True
    raw: ClassVar[bool] = True

    model: str | None = Field(None, description="a loaded bundle; default: the first that serves the task")
    image: Picture


def _picture_or_fault(value: object) -> object:
    """The bytes of a picture, or what is wrong with it: it must not spoil the others. `Fetcher` gives its errors."""
    if isinstance(value, InputError):
        return value
    try:
        return _PICTURE.validate_python(value)
    except ValidationError as error:
        return BadRequest(error.errors()[0]["msg"].removeprefix("Value error, "))


_PICTURE: TypeAdapter[bytes] = TypeAdapter(Picture)
GivenPicture = Annotated[
    Any, BeforeValidator(_picture_or_fault), WithJsonSchema(TypeAdapter(Picture).json_schema())
]  # bytes | InputError


class PicturesBody(PictureBody):
    """One picture, or many that share the other fields; in a form, many files with the name `image`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["image"], "properties": {"images": {"type": "null"}}},
                {"required": ["images"], "properties": {"image": {"type": "null"}}},
            ]
        }
    )

    image: Picture | None = None  # type: ignore[assignment]  # one of both
    images: list[GivenPicture] | None = Field(
        None,
        min_length=1,
        max_length=MAX_TEXTS,
        description="many pictures in place of `image`: `results` of the answer has an answer or a problem for each",
    )

    @model_validator(mode="after")
    def _one_or_many(self) -> Self:
        if (self.image is None) == (self.images is None):
            raise ValueError("expected `image`, for one picture, or `images`, for a list of pictures")
        return self

    @property
    def pictures(self) -> Sequence[bytes | InputError]:
        return [self.picture] if self.images is None else self.images

    @property
    def picture(self) -> bytes:
        """The one; nothing if there are many, whose requests are made from one request."""
        return self.image or b""

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        files = [value for key, value in pairs if key == "image"]
        if len(files) < 2:
            return super().of_pairs(pairs)
        return super().of_pairs(
            [*(("images", file) for file in files), *(pair for pair in pairs if pair[0] != "image")]
        )


class Labelled(Body):
    labels: list[str] = Field([], fail_fast=True, description="default: the classifier's labels, else the bundle's")
    classifier: str | None = Field(
        None,
        min_length=1,
        description="a registered classifier; if `labels` are given too, they are a selection of its labels",
    )
    templates: list[Template] = Field(
        [], fail_fast=True, description="sentences with a {}; default: the classifier's templates, else the bundle's"
    )


class LabelledPicture(Labelled, PictureBody): ...


class LabelledPictures(Labelled, PicturesBody): ...


class Answer(BaseModel):
    """What the service sends."""

    model_config = ConfigDict(arbitrary_types_allowed=True)


class OpenAIError(Answer):
    message: str = Field(description="`detail`")
    type: str = Field(description="invalid_request_error, or server_error from status 500 on")
    param: str | None = Field(description="the field of the request that is wrong; null: not known")
    code: str | None = Field(description="the kind of problem, as OpenAI names it, else our slug with underscores")


class ProblemDocument(Answer):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    error: OpenAIError | str | None = Field(
        None,
        description="for clients of other protocols: on OpenAI's routes its object, under /v2 `detail` as the Open "
        "Inference Protocol names it; other routes have none",
    )
    known: list[str] | None = Field(None, description="the names that exist")
    errors: list[dict[str, str]] | None = Field(None, description="where the body does not match the schema")
    retry_after: int | None = Field(None, description="of one result: seconds until a retry is likely to succeed")


class Faulty(Answer):
    index: int = Field(description="position of the picture or input in the request, from 0")
    problem: ProblemDocument = Field(description="why it has no answer")


class ProblemAnswer(ProblemDocument):
    """A problem document (RFC 9457), of a whole request."""

    model: str | None = Field(None, description="beside `results`: the bundle")
    results: list[Faulty] | None = Field(
        None, description="of many pictures without a single answer: the problem of each, of which this is the first"
    )


class Answered(Answer, Generic[A]):
    index: int = Field(description="position of the picture or input in the request, from 0")
    answer: A = Field(description="what a request with this picture or input alone gets")


class Results(Answer, Generic[A]):
    """The answer to many pictures or inputs."""

    model: str
    results: list[Answered[A] | Faulty] = Field(description="one for each, in the order of the request")


def round_score(score: float) -> float:
    """Six decimals: a float32 between 0 and 1 has no more precision, and people read the JSON."""
    return round(score, 6)


def encode(answer: object) -> bytes:
    """JSON. ``vars`` gives orjson the fields as they are, because no field of an answer has an alias."""
    return orjson.dumps(answer, vars, orjson.OPT_SERIALIZE_NUMPY)
