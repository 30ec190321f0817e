"""Request and response models of the HTTP API, one module per task. Here is what the tasks share.

`calmclip.service.uploads` fills a request model from JSON, from a multipart form, or from a raw picture and the query.
orjson renders the answers; it writes numpy arrays directly.
"""

import base64
import binascii
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, WithJsonSchema, model_validator

from calmclip.models import labels
from calmclip.service.files import NAME

NewName = Annotated[str, WithJsonSchema({"type": "string", "pattern": NAME})]  # a path parameter that the route checks
# `check_texts` applies the rule, because its error says more than pydantic's
Template = Annotated[str, WithJsonSchema(TypeAdapter(labels.Template).json_schema())]
MIB = 1 << 20
MAX_KEYS = 64  # per object: each unknown key would be a validation error of its own


def _picture(value: object) -> object:
    """The picture's bytes. A form or a raw body has them already; JSON has ``{"b64": "..."}``."""
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
                "url": {"type": "string", "description": "its address, if the service fetches pictures"},
            },
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
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

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_KEYS:
            raise ValueError(f"{len(value)} fields were given; at most {MAX_KEYS} are read")
        return value


class PictureBody(Body):
    """One picture, and fields that a form or a query can also carry. The body may have any of the three shapes."""

    model: str | None = Field(None, description="a loaded bundle; default: the first that serves the task")
    image: Picture


class LabelledPicture(PictureBody):
    labels: list[str] = Field([], fail_fast=True, description="default: the classifier's labels, else the bundle's")
    classifier: str | None = Field(
        None,
        min_length=1,
        description="a registered classifier; if `labels` are given too, they are a selection of its labels",
    )
    templates: list[Template] = Field(
        [], fail_fast=True, description="sentences with a {}; default: the classifier's templates, else the bundle's"
    )


class Answer(BaseModel):
    """What the service sends."""

    model_config = ConfigDict(arbitrary_types_allowed=True)


class ProblemAnswer(Answer):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    error: str | None = Field(None, description="under /v2 alone: `detail`, as the Open Inference Protocol names it")
    known: list[str] | None = Field(None, description="the names that exist")
    errors: list[dict[str, str]] | None = Field(None, description="where the body does not match the schema")


def round_score(score: float) -> float:
    """Six decimals: a float32 between 0 and 1 has no more precision, and people read the JSON."""
    return round(score, 6)


def encode(answer: Answer) -> bytes:
    """JSON. ``vars`` gives orjson the fields as they are, because no field of an answer has an alias."""
    return orjson.dumps(answer, vars, orjson.OPT_SERIALIZE_NUMPY)
