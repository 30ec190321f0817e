"""/v1/collections: store vectors of pictures and texts in collections, and search them."""

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

import orjson
from fastapi import Query
from fastapi.responses import Response

from calmclip.models.errors import BadRequest, CollectionMismatch, Overloaded
from calmclip.models.flow import Array
from calmclip.models.tasks.embed import EmbedRequest, embed
from calmclip.service.asked import Asked
from calmclip.service.collections import Collection, unloaded
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.hub import Loaded
from calmclip.service.routes import check_count
from calmclip.service.schemas import NewName, round_score
from calmclip.service.schemas.collections import (
    CollectionAnswer,
    CollectionBody,
    CollectionsAnswer,
    CountAnswer,
    DeleteItemsBody,
    Hit,
    ItemsAnswer,
    ItemsBody,
    PlainText,
    SearchAnswer,
    SearchBody,
    StoredItem,
)
from calmclip.service.schemas.embed import EmbedInput
from calmclip.service.stores import Row

MISSING = "collection-not-found"
WRONG_BUNDLE = "collection-bundle-mismatch"
STORE_DOWN = "store-unavailable"
DAMAGED = "collection-damaged"
STORE = ("overloaded", STORE_DOWN)
MAX_DEPTH = 16  # of metadata: an answer nests it deeper, and JSON writers have limits
_endpoint = partial(Endpoint, task="collections", tags=("collections",))


@_endpoint("GET", "/v1/collections", scope="read", summary="All collections", answer=CollectionsAnswer, problems=STORE)
async def list_collections(asked: Asked[None]) -> CollectionsAnswer:
    async with asked.context.deadline():
        return CollectionsAnswer(collections=[await _describe(c) for c in await asked.parts.collections.all()])


@_endpoint(
    "PUT",
    "/v1/collections/{name}",
    summary="Create a collection",
    description="201 if it is new, 200 if it exists.",
    body=CollectionBody,
    example={"model": "mini-int8", "keep_originals": False},
    answer=CollectionAnswer,
    problems=(*ENGINE, STORE_DOWN, *INPUT, WRONG_BUNDLE),
    responses={201: {"model": CollectionAnswer}},
)
async def make_collection(asked: Asked[CollectionBody], name: NewName) -> Response:
    loaded = asked.parts.hub.get(asked.body.model, "embed")
    async with asked.context.deadline():
        collection, new = await asked.parts.collections.create(name, loaded, asked.body.keep_originals)
        return asked.respond(await _describe(collection), 201 if new else 200)


@_endpoint(
    "GET",
    "/v1/collections/{name}",
    scope="read",
    summary="One collection",
    answer=CollectionAnswer,
    problems=(MISSING, DAMAGED, *STORE),
)
async def get_collection(asked: Asked[None], name: str) -> CollectionAnswer:
    async with asked.context.deadline():
        return await _describe(await asked.parts.collections.get(name))


@_endpoint(
    "DELETE",
    "/v1/collections/{name}",
    summary="Delete a collection and all its items",
    status=204,
    problems=(MISSING, DAMAGED, *STORE),
)
async def delete_collection(asked: Asked[None], name: str) -> None:
    async with asked.context.deadline():
        await asked.parts.collections.drop(name)


@_endpoint(
    "GET",
    "/v1/collections/{name}/items",
    scope="read",
    summary="Items, ordered by id",
    answer=ItemsAnswer,
    problems=(MISSING, DAMAGED, *STORE, "invalid-request"),
)
async def list_items(
    asked: Asked[None],
    name: str,
    after: Annotated[PlainText | None, Query(description="the last id of the previous page")] = None,
    limit: Annotated[int, Query(ge=1, description="at most CALMCLIP_LIMITS__TOP_K")] = 100,
) -> ItemsAnswer:
    collection = await open_collection(asked, name)
    _check_top_k(limit, asked, "limit")
    async with timed(asked, "search"):
        rows = await collection.page(after, limit)
    items = [StoredItem(id=row.id, meta=row.meta) for row in rows]
    return ItemsAnswer(collection=name, items=items, next=rows[-1].id if len(rows) == limit else None)


@_endpoint(
    "POST",
    "/v1/collections/{name}/items",
    task="index",
    summary="Add or replace items",
    description="All items or none. They are on disk when the answer is sent.",
    body=ItemsBody,
    example={"items": [{"id": "a1", "image": {"b64": PIXEL}, "meta": {"title": "dunes"}}]},
    answer=CountAnswer,
    problems=(*ENGINE, STORE_DOWN, *INPUT, *PICTURE, MISSING, DAMAGED, WRONG_BUNDLE, "text-too-long"),
)
async def add_items(asked: Asked[ItemsBody], name: str) -> CountAnswer:
    collection = await open_collection(asked, name)
    loaded = bundle_of(collection, asked)
    items, limits = asked.body.items, asked.limits
    check_count(asked, len(items), "items")
    for item in items:
        if not _is_within(item.meta, MAX_DEPTH):
            raise BadRequest(f"the meta of item {item.id!r} is nested deeper than {MAX_DEPTH} levels")
        if (size := len(orjson.dumps(item.meta))) > limits.meta_bytes:
            raise BadRequest(f"the meta of item {item.id!r} has {size} bytes; at most {limits.meta_bytes} are stored")
    vectors = await _vectors(items, [f"item {item.id!r}" for item in items], loaded, asked)
    keeps = collection.info.originals
    rows = [
        Row(item.id, vector, item.meta, item.value if keeps else None)
        for item, vector in zip(items, vectors, strict=True)
    ]
    return await _write(asked, collection, collection.upsert(rows))


@_endpoint(
    "DELETE",
    "/v1/collections/{name}/items",
    task="index",
    summary="Remove items",
    description="Ids that do not exist are ignored.",
    body=DeleteItemsBody,
    example={"ids": ["a1"]},
    answer=CountAnswer,
    problems=(*INPUT, MISSING, DAMAGED, *STORE),
)
async def delete_items(asked: Asked[DeleteItemsBody], name: str) -> CountAnswer:
    collection = await open_collection(asked, name)
    _check_top_k(len(asked.body.ids), asked, "the number of ids")
    return await _write(asked, collection, collection.delete(asked.body.ids))


@_endpoint(
    "POST",
    "/v1/collections/{name}/search",
    task="search",
    scope="read",
    summary="Nearest items to a text or picture",
    body=SearchBody,
    example={"query": {"text": "sand in the evening"}, "top_k": 3, "filter": {"year": {"gte": 2020}}},
    answer=SearchAnswer,
    problems=(*ENGINE, STORE_DOWN, *INPUT, *PICTURE, MISSING, DAMAGED, WRONG_BUNDLE, "text-too-long"),
)
async def search_collection(asked: Asked[SearchBody], name: str) -> SearchAnswer:
    body, collection = asked.body, await open_collection(asked, name)
    loaded = bundle_of(collection, asked, body.model)
    _check_top_k(body.top_k, asked, "top_k")
    (vector,) = await _vectors([body.query], ["the query"], loaded, asked)
    async with timed(asked, "search"):
        matches = await collection.search(vector, body.top_k, body.filter)
    return SearchAnswer(
        collection=name, hits=[Hit(id=match.id, score=round_score(match.score), meta=match.meta) for match in matches]
    )


async def open_collection(asked: Asked[Any], name: str) -> Collection:
    async with asked.context.deadline():
        return await asked.parts.collections.get(name)


@asynccontextmanager
async def timed(asked: Asked[Any], stage: str) -> AsyncIterator[None]:
    """Within the request's deadline, timed as ``stage``."""
    with asked.context.clock.stage(stage):
        async with asked.context.deadline():
            yield


async def _write(asked: Asked[Any], collection: Collection, write: Awaitable[int]) -> CountAnswer:
    """``write`` answers with the number of items that it wrote or removed."""
    async with timed(asked, "write"):
        return CountAnswer(collection=collection.info.name, count=await write, items=await collection.count())


async def _vectors(inputs: Sequence[EmbedInput], names: list[str], loaded: Loaded, asked: Asked[Any]) -> Array:
    """float32 [N, D] of the loaded bundle. Raises `InputError`s that begin with the input's name."""
    for item, name in zip(inputs, names, strict=True):
        if item.image is not None:
            asked.check(item.image, name)
    return (await asked.run(loaded, embed(loaded.bundle, EmbedRequest([item.value for item in inputs])))).vectors


async def _describe(collection: Collection) -> CollectionAnswer:
    return CollectionAnswer(**vars(collection.info), items=await collection.count())


def bundle_of(collection: Collection, asked: Asked[Any], model: str | None = None) -> Loaded:
    """The loaded bundle that filled the collection. Raises `CollectionMismatch` if it is not loaded, or if the bundle
    ``model`` embeds differently."""
    info, hub = collection.info, asked.parts.hub
    if model is not None:
        named = hub.get(model, "embed")
        collection.require(named.name, named.embedding_digest)
    loaded = hub.by_embedding(info.digest)
    if loaded is None:
        if hub.loading:
            raise Overloaded("the bundles are still loading; try again in a second", reason="loading")
        raise CollectionMismatch(
            f"the collection {info.name!r} is not served: {unloaded(info)}",
            known=[bundle.name for bundle in hub.all()],
        )
    asked.context.model = loaded.name
    return loaded


def _is_within(value: object, levels: int) -> bool:
    """Whether JSON ``value`` has at most ``levels`` levels of nesting."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_is_within(child, levels - 1) for child in inner)


def _check_top_k(value: int, asked: Asked[Any], name: str) -> None:
    if value > (limit := asked.limits.top_k):
        raise BadRequest(f"{name} is {value}; at most {limit} is allowed")
