"""`calmclip index` against a service whose answers are written here; tests/service/test_cli.py has a real one."""

import asyncio
import json

import httpx
import pytest

from calmclip.models.errors import CalmclipError
from calmclip.service.indexing import TRIES, _Service


def asked(*statuses: int) -> list[tuple[str, str, object]]:
    """The requests that one call sends if their answers have these statuses."""
    requests: list[tuple[str, str, object]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        status = statuses[len(requests)]
        requests.append((request.method, request.url.path, json.loads(request.content)))
        return httpx.Response(status, headers={"retry-after": "0"}, json={"detail": f"number {len(requests)}"})

    async def ask() -> None:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            await _Service(client, "a b").ask("POST", "/items", {"items": []})

    try:
        asyncio.run(ask())
    except CalmclipError as error:
        requests.append(("error", str(error), None))
    return requests


POSTED = ("POST", "/v1/collections/a b/items", {"items": []})


@pytest.mark.parametrize(
    ("statuses", "requests"),
    [
        ([200], [POSTED]),
        ([503, 503, 200], [POSTED] * 3),
        ([500], [POSTED, ("error", "500 number 1", None)]),
        ([503] * TRIES, [POSTED] * TRIES + [("error", f"503 number {TRIES}", None)]),
    ],
)
def test_a_request_is_repeated_while_the_service_is_overloaded(statuses: list[int], requests: list[object]):
    assert asked(*statuses, 200) == requests
