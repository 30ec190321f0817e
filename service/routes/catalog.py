"""What is loaded and how it is: /v1/models, the probes, the metrics, the page."""

import json
import mimetypes
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from calmclip.models.errors import BundleNotFound, TaskNotServed, suggestion
from calmclip.models.tasks.detect import default_suppression
from calmclip.service.context import Own, Parts
from calmclip.service.hub import Loaded
from calmclip.service.openapi import answers
from calmclip.service.routes import respond
from calmclip.service.schemas import (
    HealthAnswer,
    ModelAnswer,
    ModelsAnswer,
    ModelSummary,
    ReadyAnswer,
    SuppressionAsked,
)

router = APIRouter(tags=["catalog"])

EXPOSITIONS = ("text/plain", "application/openmetrics-text")
WEB = Path(__file__).parent.parent / "web"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/v1/models", summary="Loaded bundles", responses=answers(ModelsAnswer))
async def list_models(own: Own, parts: Parts) -> Response:
    return respond(
        own, ModelsAnswer(models=[_summary(loaded, parts.settings.limits.examples) for loaded in parts.hub.all()])
    )


@router.get("/v1/models/{name}", summary="Manifest and report", responses=answers(ModelAnswer, "model-not-found"))
async def get_model(name: str, own: Own, parts: Parts) -> Response:
    loaded = {one.name: one for one in parts.hub.all()}
    if name not in loaded:
        raise BundleNotFound(f"no bundle named {name!r} is loaded; {suggestion(name, loaded)}", known=loaded)
    bundle = loaded[name].bundle
    report = bundle.directory / "report.json"
    return respond(
        own,
        ModelAnswer(
            name=name,
            digest=bundle.digest,
            manifest=bundle.manifest.model_dump(mode="json", exclude_none=True),
            report=json.loads(report.read_bytes()) if report.is_file() else None,
        ),
    )


@router.get("/healthz", summary="The process answers", responses=answers(HealthAnswer))
@router.head("/healthz", include_in_schema=False)
async def healthz() -> Response:
    return Response(b'{"status":"ok"}', media_type="application/json")


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    summary="Bundles and collections are loaded",
    responses=answers(ReadyAnswer) | {503: {"model": ReadyAnswer, "description": "Not ready"}},
)
async def readyz(own: Own, parts: Parts) -> Response:
    ready = parts.ready
    loaded = [one.name for one in parts.hub.all()]
    return respond(own, ReadyAnswer(ready=ready, loaded=loaded, failed=parts.failed), 200 if ready else 503)


@router.get(
    "/metrics",
    summary="Prometheus text",
    response_class=Response,
    responses=answers(None)
    | {200: {"description": "Metrics", "content": {kind: {"schema": {"type": "string"}} for kind in EXPOSITIONS}}},
)
async def metrics(request: Request, parts: Parts) -> Response:
    body, kind = await parts.metrics.render(",".join(request.headers.getlist("accept")))
    return Response(body, headers={"Vary": "Accept"}, media_type=kind)


def page(folder: Path = WEB) -> APIRouter:
    """A route per file of ``folder``, read once, and `/` for its index.html: what is not there cannot be asked for."""
    router = APIRouter()

    def serve(path: str, file: Path) -> None:
        data, kind = file.read_bytes(), mimetypes.guess_type(file.name)[0]

        @router.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
        async def send() -> Response:
            return Response(data, headers=PAGE_HEADERS, media_type=kind)

    for file in sorted(folder.iterdir()):
        if file.is_file():
            serve("/" if file.name == "index.html" else f"/{file.name}", file)
    return router


def _summary(loaded: Loaded, most: int) -> ModelSummary:
    """``most``: examples that a request may hold."""
    bundle = loaded.bundle
    detects = "detect" in bundle.manifest.tasks
    try:
        dim = bundle.dim
    except TaskNotServed:
        dim = None
    return ModelSummary(
        name=bundle.name,
        digest=bundle.digest,
        tasks=list(bundle.manifest.tasks),
        precision=bundle.manifest.precision,
        dim=dim,
        labels=len(bundle.labels),
        suppression=SuppressionAsked(**vars(default_suppression(bundle))) if detects else None,
        examples=most if detects else 0,
    )
