"""/v1/collections: fill collections with vectors of pictures and texts, and search them."""

from collections.abc import Sequence
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response

from calmclip.models.errors import BadRequest, CollectionMismatch
from calmclip.models.flow import Array
from calmclip.models.tasks.embed import EmbedRequest, embed
from calmclip.service.collections import Collection
from calmclip.service.context import Context, Own, Parts, Service
from calmclip.service.hub import Loaded
from calmclip.service.openapi import ENGINE, INPUT, PICTURE, PIXEL, answers, takes
from calmclip.service.routes import respond
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
from calmclip.service.uploads import body_of, check_picture

router = APIRouter(tags=["collections"])
MISSING = "collection-not-found"
WRONG = "collection-bundle-mismatch"
DOWN = "store-unavailable"
STORE = ("overloaded", DOWN)
MAX_DEPTH = 16  # of metadata; what is read back is nested deeper still, and JSON writers have limits


@router.get(
    "/v1/collections",
    summary="All collections",
    responses=answers(CollectionsAnswer, *STORE),
)
async def list_collections(own: Own, parts: Parts) -> Response:
    async with own.deadline():
        found = [await _describe(collection) for collection in await parts.collections.all()]
    return respond(own, CollectionsAnswer(collections=found))


@router.put(
    "/v1/collections/{name}",
    summary="Make a collection",
    description="201 when it is new, 200 when it is there already.",
    openapi_extra=takes(CollectionBody, {"model": "mini-int8"}),
    responses=answers(CollectionAnswer, *ENGINE, DOWN, *INPUT, WRONG) | answers(CollectionAnswer, status=201),
)
async def make_collection(
    name: NewName, body: Annotated[CollectionBody, Depends(body_of(CollectionBody))], own: Own, parts: Parts
) -> Response:
    loaded = parts.hub.get(body.model, "embed")
    async with own.deadline():
        collection, new = await parts.collections.create(name, loaded)
        return respond(own, await _describe(collection), 201 if new else 200)


@router.get(
    "/v1/collections/{name}",
    summary="One collection",
    responses=answers(CollectionAnswer, MISSING, *STORE),
)
async def get_collection(name: str, own: Own, parts: Parts) -> Response:
    async with own.deadline():
        return respond(own, await _describe(await parts.collections.get(name)))


@router.delete(
    "/v1/collections/{name}",
    summary="Delete a collection and all in it",
    status_code=204,
    responses=answers(None, MISSING, *STORE, status=204),
)
async def delete_collection(name: str, own: Own, parts: Parts) -> Response:
    async with own.deadline():
        await parts.collections.drop(name)
    return Response(status_code=204)


@router.get(
    "/v1/collections/{name}/items",
    summary="Items, by id",
    responses=answers(ItemsAnswer, MISSING, *STORE, "invalid-request"),
)
async def list_items(
    name: str,
    own: Own,
    parts: Parts,
    after: Annotated[str | None, Query(description="the last id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, description="at most CALMCLIP_LIMITS__TOP_K")] = 100,
) -> Response:
    async with own.deadline():
        collection = await parts.collections.get(name)
    _at_most(limit, parts, "limit")
    with own.clock.stage("search"):
        async with own.deadline():
            found = await collection.page(after, limit)
    items = [StoredItem(id=one.id, meta=one.meta) for one in found]
    more = found[-1].id if len(found) == limit else None
    return respond(own, ItemsAnswer(collection=name, items=items, next=more))


@router.post(
    "/v1/collections/{name}/items",
    summary="Add or replace items",
    description="All of them or none. On disk when answered.",
    openapi_extra=takes(ItemsBody, {"items": [{"id": "a1", "image": {"b64": PIXEL}, "meta": {"title": "dunes"}}]}),
    responses=answers(CountAnswer, *ENGINE, DOWN, *INPUT, *PICTURE, MISSING, WRONG, "text-too-long"),
)
async def add_items(
    name: str, body: Annotated[ItemsBody, Depends(body_of(ItemsBody))], own: Own, parts: Parts
) -> Response:
    limits = parts.settings.limits
    async with own.deadline():
        collection = await parts.collections.get(name)
    loaded = _filler(collection, parts, own)
    if len(body.items) > limits.texts:
        raise BadRequest(f"{len(body.items)} items were given; at most {limits.texts} are read at once")
    for item in body.items:
        if "\0" in item.id:
            raise BadRequest(f"the id {item.id!r} holds a NUL character")
        if not _within(item.meta, MAX_DEPTH):
            raise BadRequest(f"the meta of item {item.id!r} is nested deeper than {MAX_DEPTH} levels")
        if (size := len(orjson.dumps(item.meta))) > limits.meta_bytes:
            raise BadRequest(f"the meta of item {item.id!r} has {size} bytes; at most {limits.meta_bytes} are kept")
    vectors = await _vectors(body.items, [f"item {item.id!r}" for item in body.items], loaded, parts, own)
    rows = [Row(item.id, vector, item.meta) for item, vector in zip(body.items, vectors, strict=True)]
    with own.clock.stage("write"):
        async with own.deadline():
            count = await collection.upsert(rows)
            return respond(own, CountAnswer(collection=name, count=count, items=await collection.count()))


@router.delete(
    "/v1/collections/{name}/items",
    summary="Remove items",
    description="Ids that are not there are passed over.",
    openapi_extra=takes(DeleteItemsBody, {"ids": ["a1"]}),
    responses=answers(CountAnswer, *INPUT, MISSING, *STORE),
)
async def delete_items(
    name: str, body: Annotated[DeleteItemsBody, Depends(body_of(DeleteItemsBody))], own: Own, parts: Parts
) -> Response:
    async with own.deadline():
        collection = await parts.collections.get(name)
    _at_most(len(body.ids), parts, "the number of ids")
    with own.clock.stage("write"):
        async with own.deadline():
            count = await collection.delete(body.ids)
            return respond(own, CountAnswer(collection=name, count=count, items=await collection.count()))


@router.post(
    "/v1/collections/{name}/search",
    summary="Nearest items to a text or picture",
    openapi_extra=takes(
        SearchBody, {"query": {"text": "sand in the evening"}, "top_k": 3, "filter": {"year": {"gte": 2020}}}
    ),
    responses=answers(SearchAnswer, *ENGINE, DOWN, *INPUT, *PICTURE, MISSING, WRONG, "text-too-long"),
)
async def search_collection(
    name: str, body: Annotated[SearchBody, Depends(body_of(SearchBody))], own: Own, parts: Parts
) -> Response:
    async with own.deadline():
        collection = await parts.collections.get(name)
    if body.model is not None:
        asked = parts.hub.get(body.model, "embed")
        collection.require(asked.name, asked.digest)
    loaded = _filler(collection, parts, own)
    _at_most(body.top_k, parts, "top_k")
    (vector,) = await _vectors([body.query], ["the query"], loaded, parts, own)
    with own.clock.stage("search"):
        async with own.deadline():
            found = await collection.search(vector, body.top_k, body.where())
    hits = [Hit(id=one.id, score=tidy(one.score), meta=one.meta) for one in found]
    return respond(own, SearchAnswer(collection=name, hits=hits))


async def _vectors(
    inputs: Sequence[EmbedInput], names: list[str], loaded: Loaded, parts: Service, own: Context
) -> Array:
    """float32 [N, D] of the loaded bundle. Raises what a picture or text is wrong with, naming it."""
    for one, name in zip(inputs, names, strict=True):
        if one.image is not None:
            check_picture(one.image, own, parts.settings.limits, name)
    flow = embed(loaded.bundle, EmbedRequest([one.value for one in inputs]))
    return (await parts.engine.answer(loaded, flow, own)).vectors


async def _describe(collection: Collection) -> CollectionAnswer:
    return CollectionAnswer(**vars(collection.info), items=await collection.count())


def _filler(collection: Collection, parts: Service, own: Context) -> Loaded:
    """The loaded bundle that filled the collection. Raises `CollectionMismatch` when it is not among them."""
    info = collection.info
    loaded = parts.hub.by_digest(info.digest)
    if loaded is None:
        if parts.hub.loading:
            parts.hub.get(info.model, "embed")  # says that bundles are still loading
        raise CollectionMismatch(
            f"collection {info.name!r} was filled by {info.model!r} with digest {info.digest[:12]}…, "
            "which is not loaded; load that bundle, or fill a new collection",
            known=[one.name for one in parts.hub.all()],
        )
    own.model = loaded.name
    return loaded


def _within(value: object, levels: int) -> bool:
    """Whether JSON ``value`` is nested no deeper than that."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_within(one, levels - 1) for one in inner)


def _at_most(value: int, parts: Service, name: str) -> None:
    if value > (most := parts.settings.limits.top_k):
        raise BadRequest(f"{name} is {value}; at most {most}")
