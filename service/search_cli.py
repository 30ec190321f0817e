"""`calmclip search`: the nearest items of a collection, of a running service or of the store itself.

Both answer by the same route: without `--url` an app in this process opens the store for reading, beside a service that
may write to it. It measures the collection once for the hits' relevance, which takes some seconds.
"""

import argparse
import asyncio
import json
from dataclasses import asdict
from time import monotonic
from typing import Any

from calmclip.models.errors import BadRequest
from calmclip.service.client import AsyncClient, Hits, Part
from calmclip.service.collection_cli import bundle_of, reported
from calmclip.service.local import Local, transport
from calmclip.service.relevance import MEASURING
from calmclip.service.settings import Settings

AGAIN_S = 0.05
LESS = -1.25  # weight of a text to leave out: the least that removes four of five hits that name it, see docs/using.md
LONGEST_S = 60.0  # for the measurement; then the hits have no relevance


def search(given: argparse.Namespace, settings: Settings, key: str | None) -> dict[str, Any]:
    """Raises `BadRequest`, and `CalmclipError` with the service's error."""
    query = _query(given)
    if given.url is not None:
        with reported():
            hits = asyncio.run(_ask(AsyncClient(given.url, key=key), query))
    else:
        hits = asyncio.run(_in_process(settings, given.collection, query))
    return {
        "collection": given.collection,
        "hits": [asdict(hit) for hit in hits],
        "min_relevance": hits.min_relevance,
        "below": hits.below,
        "uncalibrated": hits.uncalibrated,
    }


async def _ask(client: AsyncClient, query: dict[str, Any]) -> Hits:
    async with client:
        return await client.search(**query)


async def _in_process(settings: Settings, collection: str, query: dict[str, Any]) -> Hits:
    """It searches again until the collection is measured, which no other process does here."""
    bundle = bundle_of(settings, collection)
    async with transport(settings, model=bundle, read_only=True) as reached, Local(reached) as client:
        with reported():
            until = monotonic() + LONGEST_S
            while (hits := await client.search(**query)).uncalibrated == MEASURING and monotonic() < until:
                await asyncio.sleep(AGAIN_S)
            return hits


def _query(given: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the client's `search`."""
    parts = [
        *(Part(text=text) for text in given.text),
        *(Part(image=path) for path in given.image),
        *(Part(id=id_) for id_ in given.id),
        *(Part(text=text, weight=LESS) for text in given.without),
    ]
    if not parts:
        raise BadRequest("there is no query; give a text, --image FILE, --id ID or --without TEXT")
    more = {"top_k": given.top_k, "min_relevance": given.min_relevance, "filter": _filter(given.filter)}
    alone = len(parts) == 1 and parts[0].weight == 1
    return {
        "collection": given.collection,
        **({"text": parts[0].text, "image": parts[0].image, "id": parts[0].id} if alone else {"parts": parts}),
        **more,
    }


def _filter(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BadRequest(f"--filter is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest('--filter is no JSON object; expected one, such as \'{"year": {"gte": 2020}}\'')
    return value


def show(result: dict[str, Any]) -> None:
    for hit in result["hits"]:
        relevance = "     " if hit["relevance"] is None else f"{hit['relevance']:.3f}"
        print(f"{relevance}  {hit['score']:6.3f}  {hit['id']}")
    if not result["hits"]:
        print(f"nothing in {result['collection']} fits")
    if result["below"]:
        print(f"{result['below']} more of less relevance than {result['min_relevance']}; --min-relevance 0 shows them")
    if result["uncalibrated"]:
        print(f"without relevance: {result['uncalibrated']}")
