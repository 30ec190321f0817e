"""Requests and responses of /v1/collections."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, WithJsonSchema

from calmclip.models.bundle.manifest import PromptName
from calmclip.service import filters
from calmclip.service.metadata import no_nul, storable
from calmclip.service.schemas import MIB, Answer, Body
from calmclip.service.schemas.embed import EmbedInput, Truncating
from calmclip.service.settings import MAX_TEXTS
from calmclip.service.stores import Condition

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
        None, ge=1, description="length of its vectors, one of the bundle's `dimensions`; default: all that it makes"
    )


class Item(EmbedInput):
    id: PlainText = Field(min_length=1, max_length=512)
    meta: Annotated[dict[str, Any], AfterValidator(storable)] = Field(
        {}, description="any JSON object; a search can filter by its top-level fields"
    )


class ItemsBody(Truncating):
    items: list[Item] = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)


class DeleteItemsBody(Body):
    ids: list[PlainText] = Field(min_length=1, fail_fast=True)


class SearchBody(Truncating):
    query: EmbedInput
    model: str | None = Field(None, description="if given, it must be the bundle that filled the collection")
    prompt_name: PromptName | None = Field(
        None, description="the bundle's prompt before a text; default: 'query', else the bundle's own default"
    )
    top_k: int = Field(10, ge=1)
    filter: Annotated[list[Condition], BeforeValidator(filters.parse), WithJsonSchema(filters.SCHEMA)] = Field(
        default_factory=list,
        description='field of the metadata -> value, {"in": [...]} or {"gte": 1, "lt": 2}; all must hold',
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
    id: str
    meta: dict[str, Any]


class ItemsAnswer(Answer):
    collection: str
    items: list[StoredItem] = Field(description="ordered by id")
    next: str | None = Field(description="`after` of the next page; null on the last page")


class Hit(Answer):
    id: str
    score: float = Field(description="cosine")
    meta: dict[str, Any]


class SearchAnswer(Answer):
    collection: str
    hits: list[Hit] = Field(description="nearest first")
