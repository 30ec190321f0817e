"""/v1/collections: store vectors of pictures and texts in collections, and search them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from io import BytesIO
from typing import Annotated, Any

import numpy as np
from fastapi import Path, Query
from fastapi.responses import Response

from calmclip.models.bundle.manifest import unknown_prompt
from calmclip.models.errors import BadRequest, CollectionMismatch, ItemNotFound, Overloaded
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
from calmclip.service.relevance import OTHER_PROMPT, Part
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
    Item,
    ItemsAnswer,
    ItemsBody,
    PlainText,
    QueryInput,
    SearchAnswer,
    SearchBody,
    StoredItem,
)
from calmclip.service.schemas.embed import EmbedInput
from calmclip.service.stores import Row
from calmclip.service.thumbnails import Thumbnailed

MISSING = "collection-not-found"
WRONG_BUNDLE = "collection-bundle-mismatch"
EXISTS = "collection-exists"
STORE_DOWN = "store-unavailable"
DAMAGED = "collection-damaged"
STORE = ("overloaded", STORE_DOWN)
LEAST_LENGTH = 1e-3  # of a composed query, beside the sum of its weights
SHOWN = 100  # characters of an id, in an error
VECTORS = "give the vectors: at most 15 bytes a number"
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
    example={"model": "mini-int8", "keep_originals": True},
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
    vectors: Annotated[bool, Query(description=VECTORS)] = False,
    fields: Annotated[
        tuple[str, ...], Query(description="give these fields of the metadata alone; repeat it; default: all")
    ] = (),
) -> ItemsAnswer:
    collection = await open_collection(asked, name)
    _check_top_k(limit, asked, "limit")
    async with timed(asked, "search"):
        rows = await collection.page(after, limit, vectors)
    items = [StoredItem.model_construct(id=row.id, meta=_chosen(row.meta, fields), vector=row.vector) for row in rows]
    following = rows[-1].id if len(rows) == limit else None
    return ItemsAnswer.model_construct(collection=name, items=items, next=following)


@_endpoint(
    "GET",
    "/v1/collections/{name}/items/{id}",
    rest=True,
    scope="read",
    summary="One item",
    description="The id is the rest of the path, percent-encoded; a slash in it may stay as it is.",
    answer=StoredItem,
    problems=(MISSING, "item-not-found", DAMAGED, *STORE, "invalid-request"),
)
async def get_item(
    asked: Asked[None],
    name: str,
    id: Annotated[PlainText, Path(description="the item's id")],
    vectors: Annotated[bool, Query(description=VECTORS)] = False,
) -> StoredItem:
    collection = await open_collection(asked, name)
    async with timed(asked, "search"):
        rows = await collection.get([id])
    if not rows:
        raise ItemNotFound(f"the collection {name!r} has no item {id[:SHOWN]!r}; GET …/items lists its ids")
    (row,) = rows
    return StoredItem.model_construct(id=row.id, meta=row.meta, vector=row.vector if vectors else None)


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
    names = [f"item {item.id!r}" for item in items]
    for item, called in zip(items, names, strict=True):
        check_size(item.meta, called, asked.limits.meta_bytes)
        if asked.body.thumbnails and item.image is not None:
            item.image = Thumbnailed(item.image)
    prompt = document_prompt(loaded.bundle) if loaded else None
    vectors = await _vectors(items, names, collection, loaded, asked, prompt)
    keeps = collection.info.originals
    rows = [
        Row(item.id, vector, _meta(item, called, asked), item.original if keeps else None)
        for item, called, vector in zip(items, names, vectors, strict=True)
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
    summary="Nearest items to texts, pictures, stored items, or vectors in place of texts",
    description="The weighted sum of the parts of a query is searched for. A stored item is no hit of its own query.",
    body=SearchBody,
    example={"query": {"text": "sand in the evening"}, "top_k": 3, "filter": {"year": {"gte": 2020}}},
    answer=SearchAnswer,
    problems=(*ENGINE, STORE_DOWN, *INPUT, *PICTURE, MISSING, "item-not-found", DAMAGED, WRONG_BUNDLE, "text-too-long"),
)
async def search_collection(asked: Asked[SearchBody], name: str) -> SearchAnswer:
    body, collection = asked.body, await open_collection(asked, name)
    stored = [part.id for part in body.query if part.id is not None]
    loaded, prompt = None, body.prompt_name
    if len(stored) < len(body.query) or body.model or prompt is not None:
        loaded = filler_of(collection, asked, body.model)
    if loaded and prompt is None:
        prompt = query_prompt(loaded.bundle)
    _check_top_k(body.top_k, asked, "top_k")
    vector = composed(
        await _query_vectors(body.query, collection, loaded, asked, prompt), [part.weight for part in body.query]
    )
    async with timed(asked, "search"):
        matches = await collection.search(vector, body.top_k + len({*stored}), body.filter)
        matches = [match for match in matches if match.id not in stored][: body.top_k]
        texts = any(part.text is not None for part in body.query)
        if loaded and texts and prompt != query_prompt(loaded.bundle):
            relevance: list[float] | str = OTHER_PROMPT
        else:
            parts = [Part(part.kind, part.weight) for part in body.query]
            matching = len(matches) if body.filter and len(matches) < body.top_k else None
            relevance = await asked.parts.relevance.of(collection, [m.score for m in matches], parts, matching)
    least = asked.parts.settings.min_relevance if body.min_relevance is None else body.min_relevance
    known = [None] * len(matches) if isinstance(relevance, str) else [round_score(value) for value in relevance]
    hits = [
        Hit(id=match.id, score=round_score(match.score), relevance=value, meta=match.meta)
        for match, value in zip(matches, known, strict=True)
        if value is None or value >= least
    ]
    return SearchAnswer(
        collection=name,
        hits=hits,
        min_relevance=least,
        below=len(matches) - len(hits),
        uncalibrated=relevance if isinstance(relevance, str) else None,
    )


def _chosen(meta: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    return {field: meta[field] for field in fields if field in meta} if fields else meta


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
        count = await write
        asked.parts.relevance.wake(collection)
        return CountAnswer(collection=collection.info.name, count=count, items=await collection.count())


def _meta(item: Item, name: str, asked: Asked[Any]) -> dict[str, Any]:
    """The item's metadata, with its thumbnail. Raises `BadRequest` if there is no room for that."""
    if not isinstance(item.image, Thumbnailed):
        return item.meta
    meta = item.meta | item.image.meta
    check_size(meta, f"{name} with its thumbnail", asked.limits.meta_bytes)
    return meta


async def _vectors(
    inputs: Sequence[EmbedInput],
    names: list[str],
    collection: Collection,
    loaded: Loaded | None,
    asked: Asked[Any],
    prompt: str | None,
) -> Array:
    """float32 [N, dim], unit rows: of the loaded bundle; a vector is taken as it is, unless the bundle reads vectors in
    place of texts.

    Raises `InputError`s that begin with the input's name; `CollectionMismatch` for a text or picture without a bundle.
    """
    if loaded is None and prompt is not None:
        raise unknown_prompt(prompt, ())
    vectors, rest = np.empty((len(inputs), collection.info.dim), np.float32), list[int]()
    for index, (item, name) in enumerate(zip(inputs, names, strict=True)):
        if loaded is None or (item.vector is not None and not loaded.bundle.reads_vectors):
            vectors[index] = _own(item, name, collection)
            continue
        rest.append(index)
        if item.image is not None:
            asked.check(item.image, name)
    if loaded and rest:
        values = [inputs[index].value for index in rest]
        request = EmbedRequest(values, prompt=prompt, truncation=asked.body.truncation)
        check_characters(asked, loaded.bundle, values, request.truncation)
        embedded = await asked.run(loaded, embed(loaded.bundle, request))
        vectors[rest] = prefix(embedded.vectors, collection.info.dim)
    return vectors


def _own(item: EmbedInput, name: str, collection: Collection) -> Array:
    """float32 [dim], a unit vector: of the model that made the collection's, a bundle or another program's."""
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


async def _query_vectors(
    query: Sequence[QueryInput],
    collection: Collection,
    loaded: Loaded | None,
    asked: Asked[SearchBody],
    prompt: str | None,
) -> Array:
    """float32 [N, dim], unit rows. Raises as `_vectors`, and `ItemNotFound`."""
    names = ["the query"] if len(query) == 1 else [f"part {index} of the query" for index in range(len(query))]
    given = [(part, where) for part, where in zip(query, names, strict=True) if part.id is None]
    stored = {part.id: where for part, where in zip(query, names, strict=True) if part.id is not None}
    known: dict[str, Array] = {}
    if stored:
        async with asked.context.deadline():
            known = {row.id: row.vector for row in await collection.get([*stored])}
        for id_, where in stored.items():
            if id_ not in known:
                raise ItemNotFound(
                    f"{where} is the id {id_[:SHOWN]!r}, which the collection {collection.info.name!r} does not have"
                )
    made: Iterator[Array] = iter(())
    if given:
        inputs, places = [part for part, _ in given], [where for _, where in given]
        made = iter(await _vectors(inputs, places, collection, loaded, asked, prompt))
    vectors: Array = np.stack([next(made) if part.id is None else known[part.id] for part in query])
    return vectors


def composed(vectors: Array, weights: Sequence[float]) -> Array:
    """The unit vector of the weighted sum of unit ``vectors``, float32 [N, dim] -> float32 [dim]. One vector with a
    positive weight stays as it is. Raises `BadRequest` if nothing is left of it."""
    if len(weights) == 1 and weights[0] > 0:
        same: Array = vectors[0]
        return same
    total = np.asarray(weights) @ vectors.astype(np.float64)
    length = np.linalg.norm(total)
    if length < LEAST_LENGTH * np.abs(weights).sum():
        raise BadRequest("the parts of the query cancel each other out; change their weights, or leave one out")
    unit: Array = (total / length).astype(np.float32)
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
