"""/v1/collections: store vectors of pictures and texts in collections, and search them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from io import BytesIO
from typing import Annotated, Any

import numpy as np
from fastapi import Query
from fastapi.responses import Response

from calmclip.models.bundle.manifest import unknown_prompt
from calmclip.models.errors import BadRequest, CollectionMismatch, Overloaded
from calmclip.models.files import check_name
from calmclip.models.flow import Array
from calmclip.models.preprocess.vectors import numbers
from calmclip.models.tasks.embed import EmbedRequest, document_prompt, embed, query_prompt
from calmclip.models.tasks.features import prefix
from calmclip.service import bank
from calmclip.service.asked import Asked
from calmclip.service.collections import Collection, unloaded
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.hub import Loaded
from calmclip.service.metadata import check_size
from calmclip.service.openapi import BINARY
from calmclip.service.routes import check_characters, check_count
from calmclip.service.schemas import NewName, round_score
from calmclip.service.schemas.collections import (
    BankAnswer,
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
EXISTS = "collection-exists"
STORE_DOWN = "store-unavailable"
DAMAGED = "collection-damaged"
STORE = ("overloaded", STORE_DOWN)
NPZ, BYTES = "application/x-npz", "application/octet-stream"
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
    problems=(*ENGINE, STORE_DOWN, *INPUT, WRONG_BUNDLE, EXISTS),
    responses={201: {"model": CollectionAnswer}},
)
async def make_collection(asked: Asked[CollectionBody], name: NewName) -> Response:
    body, loaded = asked.body, asked.parts.hub.get(asked.body.model, "embed")
    async with asked.context.deadline():
        collection, new = await asked.parts.collections.create(name, loaded, body.keep_originals, body.dimensions)
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
    collection, items = await open_collection(asked, name), asked.body.items
    loaded = filler_of(collection, asked)
    check_count(asked, len(items), "items")
    for item in items:
        check_size(item.meta, f"item {item.id!r}", asked.limits.meta_bytes)
    prompt = document_prompt(loaded.bundle) if loaded else None
    vectors = await _vectors(items, [f"item {item.id!r}" for item in items], collection, loaded, asked, prompt)
    keeps = collection.info.originals
    rows = [
        Row(item.id, vector, item.meta, item.original if keeps else None)
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
    "GET",
    "/v1/collections/{name}/bank",
    scope="read",
    summary="All vectors of a collection as an npz file",
    description="Arrays that numpy reads: ids, vectors, model, dim, normalized, meta, created, and digest.",
    responses={200: {"content": {NPZ: {"schema": BINARY}}}},
    problems=(MISSING, DAMAGED, *STORE, "invalid-request"),
)
async def get_bank(asked: Asked[None], name: str) -> Response:
    collection, most = await open_collection(asked, name), asked.limits.bank_bytes
    async with timed(asked, "search"):
        size = await collection.count() * 4 * collection.info.dim
        asked.context.reserve_bytes(min(size, most))
        return asked.respond(await asked.parts.collections.bank(collection, most), kind=NPZ)


@_endpoint(
    "PUT",
    "/v1/collections/{name}/bank",
    task="index",
    summary="A new collection of the vectors in an npz file",
    description="Of a bundle, or of another program's model: then a search sends a `vector`. All items or none.",
    kinds=(NPZ, BYTES),
    answer=BankAnswer,
    status=201,
    problems=(*INPUT, *STORE, EXISTS, WRONG_BUNDLE, DAMAGED),
)
async def put_bank(
    asked: Asked[bytes],
    name: NewName,
    normalize: Annotated[bool, Query(description="make unit vectors of others; false: refuse others")] = True,
) -> BankAnswer:
    limits = asked.limits
    check_name("collection", name)
    file = await asyncio.to_thread(
        bank.read, BytesIO(asked.body), name, normalize=normalize, meta_bytes=limits.meta_bytes, most=limits.bank_bytes
    )
    async with timed(asked, "write"):
        collection = await asked.parts.collections.add(file)
        return BankAnswer(**vars(collection.info), items=await collection.count(), scaled=file.scaled)


@_endpoint(
    "POST",
    "/v1/collections/{name}/search",
    task="search",
    scope="read",
    summary="Nearest items to a text, a picture, or a vector in place of a text",
    body=SearchBody,
    example={"query": {"text": "sand in the evening"}, "top_k": 3, "filter": {"year": {"gte": 2020}}},
    answer=SearchAnswer,
    problems=(*ENGINE, STORE_DOWN, *INPUT, *PICTURE, MISSING, DAMAGED, WRONG_BUNDLE, "text-too-long"),
)
async def search_collection(asked: Asked[SearchBody], name: str) -> SearchAnswer:
    body, collection = asked.body, await open_collection(asked, name)
    loaded = filler_of(collection, asked, body.model)
    _check_top_k(body.top_k, asked, "top_k")
    prompt = query_prompt(loaded.bundle) if loaded and body.prompt_name is None else body.prompt_name
    (vector,) = await _vectors([body.query], ["the query"], collection, loaded, asked, prompt)
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


async def _vectors(
    inputs: Sequence[EmbedInput],
    names: list[str],
    collection: Collection,
    loaded: Loaded | None,
    asked: Asked[Any],
    prompt: str | None,
) -> Array:
    """float32 [N, dim], unit rows: of the loaded bundle, or without one, of vectors that the caller has.

    Raises `InputError`s that begin with the input's name; `CollectionMismatch` for a text or picture without a bundle.
    """
    if loaded is None:
        if prompt is not None:
            raise unknown_prompt(prompt, ())
        return np.stack([_own(item, name, collection) for item, name in zip(inputs, names, strict=True)])
    for item, name in zip(inputs, names, strict=True):
        if item.image is not None:
            asked.check(item.image, name)
    values = [item.value for item in inputs]
    request = EmbedRequest(values, prompt=prompt, truncation=asked.body.truncation)
    check_characters(asked, loaded.bundle, values, request.truncation)
    embedded = await asked.run(loaded, embed(loaded.bundle, request))
    return prefix(embedded.vectors, collection.info.dim)


def _own(item: EmbedInput, name: str, collection: Collection) -> Array:
    """float32 [dim], a unit vector: of the model that made the collection's, which no bundle is."""
    info = collection.info
    if item.vector is None:
        raise CollectionMismatch(f"{name} is no vector: {unloaded(info)}")
    row = numbers(item.vector, name)
    if len(row) != info.dim:
        raise BadRequest(
            f"{name} has {len(row)} numbers; the collection {info.name!r} holds vectors of {info.model!r}, which have "
            f"{info.dim}"
        )
    if not (length := np.linalg.norm(row)):
        raise BadRequest(f"{name} has the length 0 and no direction; expected a vector that is not all zeros")
    unit: Array = (row / length).astype(np.float32)
    return unit


async def _describe(collection: Collection) -> CollectionAnswer:
    return CollectionAnswer(**vars(collection.info), items=await collection.count())


def filler_of(collection: Collection, asked: Asked[Any], model: str | None = None) -> Loaded | None:
    """`bundle_of`; None if the collection holds vectors of another program's model, which ``model`` may name."""
    if collection.info.foreign and model in (None, collection.info.model):
        return None
    return bundle_of(collection, asked, model)


def bundle_of(collection: Collection, asked: Asked[Any], model: str | None = None) -> Loaded:
    """The loaded bundle that filled the collection. Raises `CollectionMismatch` if it is not loaded, or if the bundle
    ``model`` embeds differently."""
    info, hub = collection.info, asked.parts.hub
    if model is not None:
        named = hub.get(model, "embed")
        collection.require(named.name, named.embedding_digest)
    loaded = hub.by_embedding(info.digest)
    if loaded is None:
        if hub.loading and not info.foreign:
            raise Overloaded("the bundles are still loading; try again in a second", reason="loading")
        raise CollectionMismatch(
            f"the collection {info.name!r} is not served: {unloaded(info)}",
            known=[bundle.name for bundle in hub.all()],
        )
    if info.dim > (dim := loaded.bundle.dim):  # a bank may claim any digest
        raise CollectionMismatch(
            f"the collection {info.name!r} holds vectors of {info.dim} numbers with the digest of {loaded.name!r}, "
            f"which makes {dim}; import its bank without `digest`"
        )
    asked.context.model = loaded.name
    return loaded


def _check_top_k(value: int, asked: Asked[Any], name: str) -> None:
    if value > (limit := asked.limits.top_k):
        raise BadRequest(f"{name} is {value}; at most {limit} is allowed")
