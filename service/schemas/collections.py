"""Requests and responses of /v1/collections."""

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, StrictFloat, StrictStr, model_validator

from calmclip.service.schemas import MIB, Answer, Body
from calmclip.service.schemas.embed import EmbedInput
from calmclip.service.settings import MAX_TEXTS
from calmclip.service.stores import Condition

MAX_FIELDS = 32  # of a filter: the engine's parser is recursive, and thousands of fields overflow its stack
MAX_IN = 1000  # values of all `in` lists of a filter together
Scalar = str | int | float | bool
Bound = StrictFloat | StrictStr  # strict: true is not a number


class CollectionBody(Body):
    max_bytes = MIB

    model: str | None = Field(
        None, description="the bundle whose vectors the collection holds; default: the first that embeds"
    )


class Item(EmbedInput):
    id: str = Field(min_length=1, max_length=512)
    meta: dict[str, Any] = Field({}, description="any JSON object; a search can filter by its top-level fields")


class ItemsBody(Body):
    items: list[Item] = Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)


class DeleteItemsBody(Body):
    ids: list[str] = Field(min_length=1, fail_fast=True)


Values = Annotated[list[Scalar], Field(min_length=1, max_length=MAX_IN, fail_fast=True)]


class Range(Body):
    """All given conditions must hold. Numbers are compared with numbers, strings with strings."""

    model_config = ConfigDict(populate_by_name=True)

    in_: Values | None = Field(None, alias="in")
    gt: Bound | None = None
    gte: Bound | None = None
    lt: Bound | None = None
    lte: Bound | None = None


def _few_fields(value: Any) -> Any:
    """Counts the fields before they are validated; pydantic's own ``max_length`` counts afterwards."""
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
    model: str | None = Field(None, description="if given, it must be the bundle that filled the collection")
    top_k: int = Field(10, ge=1)
    filter: Filter = Field({}, description='meta field -> value, {"in": [...]}, or {"gte": 1, "lt": 2}; all must hold')

    @model_validator(mode="after")
    def _few_values(self) -> "SearchBody":
        count = sum(len(wanted.in_ or ()) for wanted in self.filter.values() if isinstance(wanted, Range))
        if count > MAX_IN:
            raise ValueError(f"the filter lists {count} values in all its fields; at most {MAX_IN} are read")
        return self

    def conditions(self) -> list[Condition]:
        conditions: list[Condition] = []
        for name, wanted in self.filter.items():
            if not isinstance(wanted, Range):
                conditions.append(Condition(name, "in", (wanted,)))
                continue
            if wanted.in_ is not None:
                conditions.append(Condition(name, "in", tuple(wanted.in_)))
            for op in ("gt", "gte", "lt", "lte"):
                if (value := getattr(wanted, op)) is not None:
                    conditions.append(Condition(name, op, value))
        return conditions


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
