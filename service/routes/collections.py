"""/v1/collections: fill collections with vectors of pictures and texts, and search them."""

from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from fastapi import Query
from fastapi.responses import Response

from calmclip.models.errors import BadRequest, CollectionMismatch
from calmclip.models.flow import Array
from calmclip.models.tasks.embed import EmbedRequest, embed
from calmclip.service.asked import Asked
from calmclip.service.collections import Collection
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.hub import Loaded
from calmclip.service.schemas import (
    CollectionAnswer,
    CollectionBody,
    CollectionsAnswer,
    CountAnswer,
    DeleteItemsBody,
    EmbedInput,
    Hit,
    ItemsAnswer,
    ItemsBody,
    NewName,
    SearchAnswer,
    SearchBody,
    StoredItem,
    tidy,
)
from calmclip.service.stores import Row

MISSING = "collection-not-found"
WRONG = "collection-bundle-mismatch"
DOWN = "store-unavailable"
STORE = ("overloaded", DOWN)
TAGS = ("collections",)
MAX_DEPTH = 16  # of metadata; what is read back is nested deeper still, and JSON writers have limits


@Endpoint(
    "GET",
    "/v1/collections",
    task="collections",
    scope="read",
    summary="All collections",
    tags=TAGS,
    answer=CollectionsAnswer,
    problems=STORE,
)
async def list_collections(asked: Asked[None]) -> CollectionsAnswer:
    async with asked.own.deadline():
        return CollectionsAnswer(collections=[await _describe(one) for one in await asked.parts.collections.all()])


@Endpoint(
    "PUT",
    "/v1/collections/{name}",
    task="collections",
    scope="write",
    summary="Make a collection",
    description="201 when it is new, 200 when it is there already.",
    tags=TAGS,
    body=CollectionBody,
    example={"model": "mini-int8"},
    answer=CollectionAnswer,
    problems=(*ENGINE, DOWN, *INPUT, WRONG),
    responses={201: {"model": CollectionAnswer}},
)
async def make_collection(asked: Asked[CollectionBody], name: NewName) -> Response:
    loaded = asked.parts.hub.get(asked.body.model, "embed")
    async with asked.own.deadline():
        collection, new = await asked.parts.collections.create(name, loaded)
        return asked.respond(await _describe(collection), 201 if new else 200)


@Endpoint(
    "GET",
    "/v1/collections/{name}",
    task="collections",
    scope="read",
    summary="One collection",
    tags=TAGS,
    answer=CollectionAnswer,
    problems=(MISSING, *STORE),
)
async def get_collection(asked: Asked[None], name: str) -> CollectionAnswer:
    async with asked.own.deadline():
        return await _describe(await asked.parts.collections.get(name))


@Endpoint(
    "DELETE",
    "/v1/collections/{name}",
    task="collections",
    scope="write",
    summary="Delete a collection and all in it",
    tags=TAGS,
    status=204,
    problems=(MISSING, *STORE),
)
async def delete_collection(asked: Asked[None], name: str) -> None:
    async with asked.own.deadline():
        await asked.parts.collections.drop(name)


@Endpoint(
    "GET",
    "/v1/collections/{name}/items",
    task="collections",
    scope="read",
    summary="Items, by id",
    tags=TAGS,
    answer=ItemsAnswer,
    problems=(MISSING, *STORE, "invalid-request"),
)
async def list_items(
    asked: Asked[None],
    name: str,
    after: Annotated[str | None, Query(description="the last id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, description="at most CALMCLIP_LIMITS__TOP_K")] = 100,
) -> ItemsAnswer:
    collection = await _collection(asked, name)
    _at_most(limit, asked, "limit")
    with asked.own.clock.stage("search"):
        async with asked.own.deadline():
            found = await collection.page(after, limit)
    items = [StoredItem(id=one.id, meta=one.meta) for one in found]
    more = found[-1].id if len(found) == limit else None
    return ItemsAnswer(collection=name, items=items, next=more)


@Endpoint(
    "POST",
    "/v1/collections/{name}/items",
    task="index",
    scope="write",
    summary="Add or replace items",
    description="All of them or none. On disk when answered.",
    tags=TAGS,
    body=ItemsBody,
    example={"items": [{"id": "a1", "image": {"b64": PIXEL}, "meta": {"title": "dunes"}}]},
    answer=CountAnswer,
    problems=(*ENGINE, DOWN, *INPUT, *PICTURE, MISSING, WRONG, "text-too-long"),
)
async def add_items(asked: Asked[ItemsBody], name: str) -> CountAnswer:
    collection = await _collection(asked, name)
    loaded = _filler(collection, asked)
    items, limits = asked.body.items, asked.limits
    if len(items) > limits.texts:
        raise BadRequest(f"{len(items)} items were given; at most {limits.texts} are read at once")
    for item in items:
        if "\0" in item.id:
            raise BadRequest(f"the id {item.id!r} holds a NUL character")
        if not _within(item.meta, MAX_DEPTH):
            raise BadRequest(f"the meta of item {item.id!r} is nested deeper than {MAX_DEPTH} levels")
        if (size := len(orjson.dumps(item.meta))) > limits.meta_bytes:
            raise BadRequest(f"the meta of item {item.id!r} has {size} bytes; at most {limits.meta_bytes} are kept")
    vectors = await _vectors(items, [f"item {item.id!r}" for item in items], loaded, asked)
    rows = [Row(item.id, vector, item.meta) for item, vector in zip(items, vectors, strict=True)]
    with asked.own.clock.stage("write"):
        async with asked.own.deadline():
            count = await collection.upsert(rows)
            return CountAnswer(collection=name, count=count, items=await collection.count())


@Endpoint(
    "DELETE",
    "/v1/collections/{name}/items",
    task="index",
    scope="write",
    summary="Remove items",
    description="Ids that are not there are passed over.",
    tags=TAGS,
    body=DeleteItemsBody,
    example={"ids": ["a1"]},
    answer=CountAnswer,
    problems=(*INPUT, MISSING, *STORE),
)
async def delete_items(asked: Asked[DeleteItemsBody], name: str) -> CountAnswer:
    collection = await _collection(asked, name)
    _at_most(len(asked.body.ids), asked, "the number of ids")
    with asked.own.clock.stage("write"):
        async with asked.own.deadline():
            count = await collection.delete(asked.body.ids)
            return CountAnswer(collection=name, count=count, items=await collection.count())


@Endpoint(
    "POST",
    "/v1/collections/{name}/search",
    task="search",
    scope="read",
    summary="Nearest items to a text or picture",
    tags=TAGS,
    body=SearchBody,
    example={"query": {"text": "sand in the evening"}, "top_k": 3, "filter": {"year": {"gte": 2020}}},
    answer=SearchAnswer,
    problems=(*ENGINE, DOWN, *INPUT, *PICTURE, MISSING, WRONG, "text-too-long"),
)
async def search_collection(asked: Asked[SearchBody], name: str) -> SearchAnswer:
    body, collection = asked.body, await _collection(asked, name)
    if body.model is not None:
        named = asked.parts.hub.get(body.model, "embed")
        collection.require(named.name, named.digest)
    loaded = _filler(collection, asked)
    _at_most(body.top_k, asked, "top_k")
    (vector,) = await _vectors([body.query], ["the query"], loaded, asked)
    with asked.own.clock.stage("search"):
        async with asked.own.deadline():
            found = await collection.search(vector, body.top_k, body.where())
    return SearchAnswer(collection=name, hits=[Hit(id=one.id, score=tidy(one.score), meta=one.meta) for one in found])


async def _collection(asked: Asked[Any], name: str) -> Collection:
    async with asked.own.deadline():
        return await asked.parts.collections.get(name)


async def _vectors(inputs: Sequence[EmbedInput], names: list[str], loaded: Loaded, asked: Asked[Any]) -> Array:
    """float32 [N, D] of the loaded bundle. Raises what a picture or text is wrong with, naming it."""
    for one, name in zip(inputs, names, strict=True):
        if one.image is not None:
            asked.check(one.image, name)
    return (await asked.run(loaded, embed(loaded.bundle, EmbedRequest([one.value for one in inputs])))).vectors


async def _describe(collection: Collection) -> CollectionAnswer:
    return CollectionAnswer(**vars(collection.info), items=await collection.count())


def _filler(collection: Collection, asked: Asked[Any]) -> Loaded:
    """The loaded bundle that filled the collection. Raises `CollectionMismatch` when it is not among them."""
    info, hub = collection.info, asked.parts.hub
    loaded = hub.by_digest(info.digest)
    if loaded is None:
        if hub.loading:
            hub.get(info.model, "embed")  # says that bundles are still loading
        raise CollectionMismatch(
            f"collection {info.name!r} was filled by {info.model!r} with digest {info.digest[:12]}…, "
            "which is not loaded; load that bundle, or fill a new collection",
            known=[one.name for one in hub.all()],
        )
    asked.own.model = loaded.name
    return loaded


def _within(value: object, levels: int) -> bool:
    """Whether JSON ``value`` is nested no deeper than that."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_within(one, levels - 1) for one in inner)


def _at_most(value: int, asked: Asked[Any], name: str) -> None:
    if value > (most := asked.limits.top_k):
        raise BadRequest(f"{name} is {value}; at most {most}")
