"""The table of endpoints: lookup by verb and path, and refused tables."""

import pytest

from calmclip.models.errors import CalmclipError
from calmclip.service.app import create_app
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENDPOINTS, Endpoint, Table
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
