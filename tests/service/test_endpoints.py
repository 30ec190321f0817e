"""The table of endpoints: lookup by verb and path, and refused tables."""

import re

import pytest

from calmclip.models.errors import CalmclipError
from calmclip.service.app import create_app
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENDPOINTS, Endpoint, Table
from calmclip.service.openapi import ANY_QUERY
from calmclip.service.schemas import Body


async def handler(asked: Asked[None]) -> None: ...


def an(method: str, path: str, **more: object) -> Endpoint:
    return Endpoint(method, path, task="t", handler=handler, **more)


def test_a_fixed_path_wins_over_a_placeholder_and_no_path_is_registered_twice():
    paths = ("/a/{x}", "/a/b", "/a/{x}/c", "/f/{all:path}", "/a/~")
    table = Table([an("GET", path) for path in paths])
    assert [endpoint.path for endpoint in table.all][:2] == ["/a/b", "/a/~"]  # the router takes the first match
    urls = ("/a/b", "/a/c", "/a/b/c", "/f/g/h", "/a/b\n")
    assert [table.find("GET", path).path for path in urls] == ["/a/b", "/a/{x}", "/a/{x}/c", "/f/{all:path}", "/a/b"]
    assert table.find("GET", "/a/b/d").scope == table.find("HEAD", "/a/b/d").scope == "read"
    assert table.find("POST", "/a/b/d").scope == table.find("POST", "/a/b").scope == "write"
    with pytest.raises(ValueError, match=r"/a/\{x\} and GET /a/\{y\}|/a/\{y\} and GET /a/\{x\}"):
        Table([an("GET", "/a/{x}"), an("POST", "/a/{z}"), an("GET", "/a/{y}")])
    with pytest.raises(ValueError, match="example"):
        an("POST", "/a", body=Body)


def test_a_service_with_a_broken_endpoint_does_not_start(settings, monkeypatch):
    monkeypatch.setitem(ENDPOINTS.broken, "entry point x = y", ImportError("gone"))
    with pytest.raises(CalmclipError, match=r"entry point x = y did not import.*gone"):
        create_app(settings())


def test_every_endpoint_refuses_a_query_field_that_it_does_not_know(client):
    """Else a misspelt field gives a broader answer than was asked for. Probes, scrapes and the page read none."""
    asked = 0
    for name in ENDPOINTS.names():
        endpoint = ENDPOINTS.get(name)
        if endpoint.scope in ANY_QUERY:
            continue
        path = re.sub(r"{\w+}", "x", endpoint.path)
        for query in ("limt=1", "x=1&x=2", "%00=", "limit%20=1"):
            kinds = {"content": b"", "headers": {"content-type": endpoint.kinds[0]}} if endpoint.kinds else {}
            body = {"json": endpoint.example} if endpoint.body else kinds
            answer = client.request(endpoint.method, f"{path}?{query}", **body)
            assert answer.status_code in (400, 422), (name, query, answer.text)
            assert "unknown" in answer.text, (name, query, answer.text)
        asked += 1
    assert asked > 30
    with_picture = client.post("/v1/classify?labels=red&topk=1", content=b"x", headers={"content-type": "image/png"})
    assert (with_picture.status_code, "there is no such field" in with_picture.text) == (422, True)
