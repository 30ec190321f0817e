"""Requests and responses of /v1/embed, and of /v1/embeddings in OpenAI's format."""

import base64
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.tasks.embed import Boxed, Embeddings
from calmclip.service.schemas import Answer, Body, Picture, PixelBoxes
from calmclip.service.settings import MAX_TEXTS

# pydantic has no type for a numpy array; orjson writes it
Vectors = Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "array", "items": {"type": "number"}}})]
_TEXT: dict[str, Any] = {"required": ["text"], "properties": {"text": {"type": "string"}, "image": {"type": "null"}}}
_IMAGE: dict[str, Any] = {"required": ["image"], "properties": {"image": {"type": "object"}, "text": {"type": "null"}}}
_WITHOUT_BOXES = {**_TEXT, "properties": {**_TEXT["properties"], "boxes": {"type": "null"}}}
DATA_URI = "data:image/"


class EmbedInput(Body):
    """A text or a picture."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_TEXT, _IMAGE]})

    text: str | None = None
    image: Picture | None = None

    @model_validator(mode="after")
    def _text_or_image(self) -> "EmbedInput":
        if (self.text is None) == (self.image is None):
            raise ValueError("expected `text` or `image`, one of them")
        return self

    @property
    def value(self) -> str | bytes:
        value = self.text if self.image is None else self.image
        assert value is not None
        return value


class BoxedInput(EmbedInput):
    """A text, a picture, or boxes in a picture."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_WITHOUT_BOXES, _IMAGE]})

    boxes: PixelBoxes | None = Field(
        None,
        description="embed these parts instead of the whole picture: x0, y0, x1, y1 in pixels of the upright picture",
    )

    @model_validator(mode="after")
    def _of_a_picture(self) -> "BoxedInput":
        if self.boxes is not None and self.image is None:
            raise ValueError("`boxes` belong to an `image`; a text has none")
        return self

    @property
    def part(self) -> str | bytes | Boxed:
        value = self.value
        return Boxed(value, self.boxes) if isinstance(value, bytes) and self.boxes else value


class EmbedBody(Body):
    form: ClassVar[bool] = True
    raw: ClassVar[bool] = True

    model: str | None = Field(None, description="a loaded bundle; default: the first that embeds")
    inputs: list[BoxedInput] = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        """Each ``text`` and each ``image`` is one input, in order."""
        inputs = [{key: value} for key, value in pairs if key in ("text", "image")]
        return {**super().of_pairs([pair for pair in pairs if pair[0] not in ("text", "image")]), "inputs": inputs}


class EmbedAnswer(Answer):
    model: str
    dim: int
    normalized: bool
    embeddings: Vectors = Field(description="unit vectors, in the order of the inputs and their boxes")

    @classmethod
    def of(cls, body: EmbedBody, bundle: Bundle, embeddings: Embeddings) -> "EmbedAnswer":
        vectors = embeddings.vectors
        return cls.model_construct(model=bundle.name, dim=vectors.shape[1], normalized=True, embeddings=vectors)


def _openai_inputs(value: object) -> object:
    """One text or a list of texts -> a list. A data URI of a picture becomes its bytes; fetched bytes stay."""
    inputs = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | bytes) for item in inputs):
        raise ValueError(
            "expected a text or a list of texts; token ids belong to another model's vocabulary, so send the text"
        )
    return [
        _data_uri(item, index) if isinstance(item, str) and item[: len(DATA_URI)].lower() == DATA_URI else item
        for index, item in enumerate(inputs)
    ]


def _data_uri(text: str, index: int) -> bytes:
    head, _, data = text.partition(",")
    try:
        if not head.lower().endswith(";base64"):
            raise ValueError("expected data:image/…;base64,…")
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise ValueError(f"input {index} is not a data URI of a picture: {error}") from None


class EmbeddingsBody(Body):
    """The body of OpenAI's `POST /v1/embeddings`. A text that is a data URI of a picture stands for that picture.

    If the service fetches pictures, a text that is only an https address stands for the picture at that address.
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
        None, ge=1, description="must be the bundle's dimension: its vectors cannot be shortened"
    )
    user: str | None = Field(None, description="ignored")


class Embedding(Answer):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: Annotated[
        Any, WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]})
    ] = Field(description="a unit vector, or the base64 of its little-endian float32 numbers")


class Usage(Answer):
    prompt_tokens: int = Field(description="tokens of the texts; a picture has none")
    total_tokens: int


class EmbeddingsAnswer(Answer):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding] = Field(description="in the order of the inputs")
    usage: Usage

    @classmethod
    def of(cls, body: EmbeddingsBody, bundle: Bundle, embeddings: Embeddings) -> "EmbeddingsAnswer":
        rows: Iterable[Any] = embeddings.vectors
        if body.encoding_format == "base64":
            rows = (base64.b64encode(row.astype("<f4").tobytes()).decode() for row in embeddings.vectors)
        return cls.model_construct(
            model=bundle.name,
            data=[Embedding.model_construct(index=index, embedding=row) for index, row in enumerate(rows)],
            usage=Usage.model_construct(prompt_tokens=embeddings.tokens, total_tokens=embeddings.tokens),
        )
