"""Requests and responses of /v1/collections."""

from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    RootModel,
    StrictBool,
    StrictFloat,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema

from calmclip.models.bundle.manifest import PromptName
from calmclip.service import filters
from calmclip.service.metadata import no_nul, storable
from calmclip.service.schemas import MIB, Answer, Body
from calmclip.service.schemas.embed import EmbedInput, Truncating, one_of
from calmclip.service.settings import MAX_TEXTS
from calmclip.service.stores import Part

Vector = Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "number"}})]  # float32 [dim]
PlainText = Annotated[str, AfterValidator(no_nul)]


class CollectionBody(Body):
    max_bytes = MIB

    model: str | None = Field(
        None, description="the bundle whose vectors the collection holds; default: the first that embeds"
    )
    keep_originals: StrictBool | None = Field(
        None, description="keep the texts and pictures, so that another bundle can embed them; default: the setting"
    )
    dimensions: int | None = Field(
        None,
        ge=1,
        strict=True,
        description="length of its vectors, one of the bundle's `dimensions`; default: all that it makes",
    )


class Item(EmbedInput):
    id: PlainText = Field(min_length=1, max_length=512)
    meta: Annotated[dict[str, Any], AfterValidator(storable)] = Field(
        {}, description="any JSON object; a search can filter by its top-level fields"
    )


class ItemsBody(Truncating):
    items: list[Item] = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)
    thumbnails: StrictBool = Field(
        False,
        description="write a small JPEG of each picture into its metadata, as the data URI `thumbnail`",
    )


class DeleteItemsBody(Body):
    ids: list[PlainText] = Field(min_length=1, fail_fast=True)


MAX_PARTS = 16  # of a query
MAX_WEIGHT = 100.0


class QueryInput(EmbedInput):
    """A text, a picture, a vector in place of a text, or the id of a stored item; with a weight."""

    kinds: ClassVar[tuple[str, ...]] = (*EmbedInput.kinds, "id")
    model_config = ConfigDict(json_schema_extra={"oneOf": one_of("id")})

    id: PlainText | None = Field(None, min_length=1, max_length=512, description="of an item, whose vector is meant")
    weight: StrictFloat = Field(
        1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT, description="of its unit vector in the sum; a negative number subtracts it"
    )

    @property
    def kind(self) -> str:
        return next(kind for kind in self.kinds if getattr(self, kind) is not None)

    @model_validator(mode="after")
    def _weighs(self) -> "QueryInput":
        if self.weight == 0:
            raise ValueError("`weight` is 0; expected another number, or leave this part of the query out")
        return self


def _listed(value: object) -> object:
    parts = value if isinstance(value, list) else [value]
    if not 1 <= len(parts) <= MAX_PARTS:  # before they are read
        raise ValueError(f"{len(parts)} parts were given; expected 1 to {MAX_PARTS}")
    return parts


class _OneOrMore:
    """The JSON schema of a list that may also be one element."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        many = handler(schema) | {"minItems": 1, "maxItems": MAX_PARTS}
        return {"anyOf": [many["items"], many]}


class Filter(RootModel[dict[str, list["Filter"]]]):
    """For the JSON Schema of what `filters.parse` reads: pydantic knows how it refers to itself."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return filters.schema(handler(core)["additionalProperties"]["items"])


class SearchBody(Truncating):
    query: Annotated[list[QueryInput], BeforeValidator(_listed), _OneOrMore()] = Field(
        description="one input, or several whose weighted unit vectors are added"
    )
    min_relevance: StrictFloat | None = Field(
        None, ge=0, le=1, description="leave out hits of less relevance; 0: none; default: CALMCLIP_MIN_RELEVANCE"
    )
    model: str | None = Field(None, description="if given, it must be the bundle that filled the collection")
    prompt_name: PromptName | None = Field(
        None, description="the bundle's prompt before a text; default: 'query', else the bundle's own default"
    )
    top_k: int = Field(10, ge=1, strict=True)
    filter: Annotated[list[Part], PlainValidator(filters.parse, json_schema_input_type=Filter)] = Field(
        default_factory=list,
        description="of the items that are searched: conditions on fields of the metadata; all must hold",
    )


class CollectionAnswer(Answer):
    name: str
    model: str = Field(description="the bundle that fills it, or the model of another program that made its vectors")
    digest: str = Field(
        description="sha256 of what embeds in that bundle: `embedding_digest` of /v1/models; empty: it is no bundle"
    )
    dim: int = Field(description="length of its vectors, which are unit vectors")
    created: str
    originals: bool = Field(description="whether it keeps the texts and pictures")
    items: int


class BankAnswer(CollectionAnswer):
    scaled: int = Field(description="vectors of the bank that were no unit vectors, and have become such")


class CollectionsAnswer(Answer):
    collections: list[CollectionAnswer]


class CountAnswer(Answer):
    collection: str
    count: int = Field(description="number of items written or removed")
    items: int = Field(description="number of items in the collection afterwards")


class StoredItem(Answer):
    id: str = Field(description="as it was given when the item was added")
    meta: dict[str, Any] = Field(description="as it was given; with `fields`, of these fields alone")
    vector: Vector | None = Field(
        None, description="a unit vector; each number reads as the float32 that is stored; null unless asked for"
    )


class ItemsAnswer(Answer):
    collection: str = Field(description="its name")
    items: list[StoredItem] = Field(description="ordered by id")
    next: str | None = Field(description="`after` of the next page; null on the last page")


class Hit(Answer):
    id: str
    score: float = Field(description="cosine")
    relevance: float | None = Field(
        description="probability that the best hit of a query without an answer here scores less; null: see "
        "`uncalibrated`"
    )
    meta: dict[str, Any]


class SearchAnswer(Answer):
    collection: str
    hits: list[Hit] = Field(description="nearest first")
    min_relevance: float = Field(description="what was asked for, or the setting")
    below: int = Field(description="hits among the `top_k` nearest that were left out, for their relevance is less")
    uncalibrated: str | None = Field(description="why no hit has a relevance, and none was left out; else null")
