"""`create_app(settings)`: creates the parts, routes and handlers of one app. It may be called more than once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import calmclip
from calmclip.models.errors import CalmclipError
from calmclip.service import openapi, problems
from calmclip.service.access import Access
from calmclip.service.admission import Admission
from calmclip.service.asked import serve
from calmclip.service.classifiers import Classifiers
from calmclip.service.collections import Collections
from calmclip.service.connections import Connections
from calmclip.service.endpoints import CATALOG, Endpoint, Table, registered
from calmclip.service.engine import Engine
from calmclip.service.fetching import Fetcher
from calmclip.service.hub import Hub
from calmclip.service.metrics import Metrics
from calmclip.service.middleware import RequestContext
from calmclip.service.parts import Service, check_replicas
from calmclip.service.relevance import MAX_COLLECTIONS, Relevance
from calmclip.service.routes.catalog import page
from calmclip.service.routes.inference import unlisted
from calmclip.service.settings import Settings, from_environment
from calmclip.service.tracing import open_tracing

CORS_METHODS = ("GET", "POST", "PUT", "DELETE")
CORS_EXPOSED = ("Server-Timing", "X-Request-Id", "Retry-After", "WWW-Authenticate")
SPECIFICATION = "/openapi.json"  # FastAPI's own route


def create_app(settings: Settings | None = None, *, read_only: bool = False, measures: bool = True) -> FastAPI:
    """``read_only``: the store is read beside the process that writes to it. ``measures``: the collections are measured
    for relevance when they are opened; else when one is asked for. Raises `BadRequest` for settings that contradict
    each other."""
    settings = settings or from_environment()
    check_replicas(settings, settings.replicas)
    metrics = Metrics(settings.slo)
    admission = Admission(settings)
    access = Access(settings)
    specification = Endpoint("GET", SPECIFICATION, task=CATALOG, scope="read", listed=False)
    endpoints = Table([*registered(), *page(), *unlisted(), specification])
    engine = Engine(settings, metrics)
    hub = Hub(settings, metrics, admission.concurrent)
    parts = Service(
        settings=settings,
        metrics=metrics,
        admission=admission,
        hub=hub,
        engine=engine,
        collections=Collections(settings, metrics, read_only),
        relevance=Relevance(hub.by_embedding),
        classifiers=Classifiers(settings.data_dir / "classifiers", settings.limits),
        fetcher=Fetcher(settings.url_hosts, settings.limits),
        connections=Connections(settings.connections, metrics.connections_crowded.inc),
    )
    parts.watch()
    tracing = open_tracing(settings.otlp_endpoint)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # In the background, so that probes are answered while bundles load.
        loading = asyncio.create_task(_load(parts, measures), name="load")
        try:
            yield
        finally:  # `calmclip index` may leave with an error, and an open store holds its folder's lock
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await parts.relevance.close()
            await parts.collections.close()
            await parts.hub.close()
            engine.close()
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="calmclip",
        version=calmclip.__version__,
        summary="CLIP-family models over HTTP: classify, embed, search, detect",
        lifespan=lifespan,
        openapi_url=SPECIFICATION,
        docs_url=None,  # FastAPI's documentation pages fetch third-party scripts
        redoc_url=None,
        redirect_slashes=False,  # to the host that the client names, and to http:// behind a TLS proxy
        # Newer FastAPI versions would trace too, queries included, and send that elsewhere; only `tracing` shall.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service = parts
    app.add_middleware(
        RequestContext,
        settings=settings,
        metrics=metrics,
        admission=admission,
        access=access,
        endpoints=endpoints,
        tracing=tracing,
    )
    if settings.cors_origins:  # outside of `RequestContext`: a preflight has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=CORS_METHODS,
            allow_headers=["*"],  # of clients such as openai's; no cookie is ever read, so credentials stay off
            expose_headers=CORS_EXPOSED,
        )
    problems.install(app)
    for endpoint in endpoints.all:
        if endpoint.handler:
            serve(app, endpoint)
    openapi.install(app, access, endpoints)
    return app


async def _load(parts: Service, measures: bool) -> None:
    await asyncio.gather(parts.collections.load(), parts.hub.load())
    if measures:
        with suppress(CalmclipError):  # a store that does not answer; a search looks again
            for collection in (await parts.collections.all())[:MAX_COLLECTIONS]:
                parts.relevance.wake(collection)
    await asyncio.gather(parts.hub.tend(), parts.collections.tend())
