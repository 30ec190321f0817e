"""The service in this process, for the command line: the same routes, limits and problems without a socket.

A caller may hand over the fields of a body as they are, pictures as bytes, so nothing is written as base64 and JSON and
read again.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from calmclip.models.bundle.store import find
from calmclip.models.errors import CollectionError
from calmclip.service.app import create_app
from calmclip.service.client import AsyncClient
from calmclip.service.parts import Service
from calmclip.service.settings import Settings
from calmclip.service.uploads import HANDED

URL = "http://in-process"
POLL_S = 0.01
NO_LIMIT = 1 << 62

_fields: ContextVar[Mapping[str, Any] | None] = ContextVar("fields", default=None)


@contextmanager
def handing(fields: Mapping[str, Any]) -> Iterator[None]:
    """The next request of this task to `transport` has these fields as its body."""
    token = _fields.set(fields)
    try:
        yield
    finally:
        _fields.reset(token)


@asynccontextmanager
async def transport(
    settings: Settings, *, model: str | None = None, read_only: bool = False
) -> AsyncIterator[httpx.ASGITransport]:
    """What httpx needs to reach an app of its own, which has opened the store and loaded its bundles: ``model`` alone,
    if it is named. ``read_only``: the store stays as it is, and may be in use; only then relevance is measured.

    Keys are not asked for, because no other client reaches the app. Raises `BundleNotFound`, `CollectionError` for a
    store that does not open, and `BadRequest` for settings that contradict each other.
    """
    alone = {"max_pixels": NO_LIMIT, "max_bytes": NO_LIMIT}  # no other requests to share with
    more: dict[str, Any] = {"keys": None, "queue": settings.queue.model_copy(update=alone)}
    if model is not None:
        find(model, settings.bundles_dir)  # its error names the nearest
        more["load"] = (model,)
    if read_only:
        more["copy_bytes"] = 0  # pays for itself after many searches
    app = create_app(settings.model_copy(update=more), read_only=read_only, measures=False)
    parts: Service = app.state.service
    if not read_only:
        await parts.relevance.close()  # it would embed its references beside the caller's pictures

    async def handed(scope: Scope, receive: Receive, send: Send) -> None:
        if (fields := _fields.get()) is not None:
            scope = {**scope, HANDED: fields}
        await app(scope, receive, send)

    application: ASGIApp = handed
    with _silent():
        async with app.router.lifespan_context(app):
            while parts.hub.loading or parts.collections.loading:
                await asyncio.sleep(POLL_S)
            if why := parts.collections.failed.get("collections"):
                raise CollectionError(why)
            yield httpx.ASGITransport(application)


class Local(AsyncClient):
    """The typed client of an app in this process."""

    def __init__(self, reached: httpx.ASGITransport) -> None:
        self._retry_limits = (0, 0.0)
        self._http = httpx.AsyncClient(transport=reached, base_url=URL, timeout=None)


@contextmanager
def _silent() -> Iterator[None]:
    """No lines of the app's log: the command line says itself what fails."""
    log = logging.getLogger("calmclip")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
