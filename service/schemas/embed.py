"""Requests and responses of /v1/embed, and of /v1/embeddings in OpenAI's format."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import PromptName
from calmclip.models.preprocess.truncation import Method, Pooling, Truncation
from calmclip.models.preprocess.vectors import Vector
from calmclip.models.tasks.embed import Boxed, Embeddings
from calmclip.service.schemas import Answer, Body, Picture, PixelBoxes, VectorNumbers, of_base64
from calmclip.service.settings import MAX_TEXTS

# pydantic has no type for a numpy array; orjson writes it
Vectors = Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "array", "items": {"type": "number"}}})]
_KINDS = ("text", "image", "vector")


def one_of(*more: str, owned: Mapping[str, str] = MappingProxyType({})) -> list[Any]:
    """A schema for each of `_KINDS` and ``more``, without the others. ``owned``: field -> the kind that may have it."""
    schemas, kinds = [], (*_KINDS, *more)
    for kind in kinds:
        absent = [*({*kinds} - {kind}), *(field for field, owner in owned.items() if owner != kind)]
        # not the type that it has: generators of clients would take it for a type of its own
        properties = {kind: {"not": {"type": "null"}}, **{field: {"type": "null"} for field in sorted(absent)}}
        schemas.append({"required": [kind], "properties": properties})
    return schemas


DATA_URI = "data:image/"
PROMPT = "the bundle's prompt that goes before each text; default: the bundle's own default"
DIMENSIONS = "keep the first so many numbers, as unit vectors: one of the bundle's `dimensions`; default: all"


class EmbedInput(Body):
    """A text, a picture, or a vector in place of a text."""

    kinds: ClassVar[tuple[str, ...]] = _KINDS
    model_config = ConfigDict(json_schema_extra={"oneOf": one_of()})

    text: str | None = None
    image: Picture | None = None
    vector: VectorNumbers | None = Field(
        None, description="in place of a text, for a bundle that reads vectors of another model"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "EmbedInput":
        if sum(getattr(self, kind) is not None for kind in self.kinds) != 1:
            *others, last = (f"`{kind}`" for kind in self.kinds)
            raise ValueError(f"expected {', '.join(others)} or {last}, one of them")
        return self

    @property
    def value(self) -> str | bytes | Vector:
        if self.vector is not None:
            return Vector(self.vector)
        value = self.text if self.image is None else self.image
        assert value is not None
        return value

    @property
    def original(self) -> str | bytes | None:
        """What a collection can keep of it: a vector of another model is no text that another bundle could embed."""
        return self.text if self.image is None else self.image


class BoxedInput(EmbedInput):
    """A text, a picture, boxes in a picture, or a vector in place of a text."""

    model_config = ConfigDict(json_schema_extra={"oneOf": one_of(owned={"boxes": "image"})})

    boxes: PixelBoxes | None = Field(
        None,
        description="embed these parts instead of the whole picture: x0, y0, x1, y1 in pixels of the upright picture",
    )

    @model_validator(mode="after")
    def _of_a_picture(self) -> "BoxedInput":
        if self.boxes is not None and self.image is None:
            raise ValueError("`boxes` belong to an `image`; a text and a vector have none")
        return self

    @property
    def part(self) -> str | bytes | Boxed | Vector:
        value = self.value
        return Boxed(value, self.boxes) if isinstance(value, bytes) and self.boxes else value


def _no_number(value: object) -> object:
    """A form has words, among them true; JSON's 0 and 1 are no booleans."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("expected true, false or the name of a choice, not a number")
    return value


class Truncating(Body):
    """The fields of a request with texts that may be too long."""

    truncate: Annotated[bool | Method | None, BeforeValidator(_no_number)] = Field(
        None,
        description="of a text with more tokens than the model reads: none or false (an error), end or true (cut), "
        "compress (its sentences nearest to the whole), chunk (windows, pooled); default: the bundle's",
    )
    stride: int | None = Field(None, ge=1, description="chunk: tokens between the starts of two windows; default: all")
    pooling: Pooling | None = Field(None, description="chunk: mean (default, weighted by tokens) or max of the windows")

    @property
    def truncation(self) -> Truncation | None:
        """None: the bundle's. Raises `BadRequest` for options without ``chunk``."""
        if self.truncate is None and self.stride is None and self.pooling is None:
            return None
        return Truncation(Truncation.of(self.truncate or False).method, self.stride, self.pooling or "mean")


class EmbedBody(Truncating):
    form: ClassVar[bool] = True
    raw: ClassVar[bool] = True

    model: str | None = Field(None, description="a loaded bundle; default: the first that embeds")
    prompt_name: PromptName | None = Field(None, description=PROMPT)
    inputs: list[BoxedInput] = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)
    dimensions: int | None = Field(None, ge=1, description=DIMENSIONS)
    partial: bool = Field(
        False, description="`results` with an answer or a problem for each input, instead of one problem for all"
    )

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
            "expected a text or a list of texts; token ids belong to another model's vocabulary, so send the text: "
            "LangChain does with check_embedding_ctx_length=False"
        )
    return [
        _data_uri(item, index) if isinstance(item, str) and item[: len(DATA_URI)].lower() == DATA_URI else item
        for index, item in enumerate(inputs)
    ]


def _data_uri(text: str, index: int) -> bytes:
    try:
        return of_base64(text)
    except ValueError as error:
        raise ValueError(f"input {index} is not a data URI of a picture: {error}") from None


class EmbeddingsBody(Truncating):
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
    dimensions: int | None = Field(None, ge=1, description=DIMENSIONS)
    user: str | None = Field(None, description="ignored")
    prompt_name: PromptName | None = Field(None, description=PROMPT)


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
