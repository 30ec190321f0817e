"""/v1/models, the health probes, the metrics and the page."""

import hashlib
import json
import mimetypes
from functools import partial
from pathlib import Path

from fastapi.responses import Response

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BundleNotFound, TaskNotServed, suggestion
from calmclip.models.segmenters import default, fitting
from calmclip.models.tasks import explain
from calmclip.models.tasks.detect import default_suppression
from calmclip.models.tasks.segment import SegmentRequest, background_of, threshold_of
from calmclip.service.asked import Asked
from calmclip.service.dialects import OPENAI
from calmclip.service.endpoints import CATALOG, Endpoint
from calmclip.service.hub import Loaded
from calmclip.service.schemas.catalog import (
    ExplanationAsked,
    HealthAnswer,
    ModelAnswer,
    ModelsAnswer,
    ModelSummary,
    OpenAIModel,
    ReadyAnswer,
    SegmentationAsked,
)
from calmclip.service.schemas.detect import SuppressionAsked

_endpoint = partial(Endpoint, task=CATALOG, tags=("catalog",))
EXPOSITIONS = ("text/plain", "application/openmetrics-text")
WEB = Path(__file__).parent.parent / "web"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@_endpoint(
    "GET",
    "/v1/models",
    scope="read",
    summary="Loaded bundles",
    description="`object` and `data` are the same bundles in OpenAI's format.",
    dialect=OPENAI,
    answer=ModelsAnswer,
)
async def list_models(asked: Asked[None]) -> ModelsAnswer:
    loaded = asked.parts.hub.all()
    return ModelsAnswer(
        models=[_summary(entry, asked.limits.examples) for entry in loaded],
        data=[OpenAIModel.of(entry.bundle) for entry in loaded],
    )


@_endpoint(
    "GET",
    "/v1/models/{name}",
    scope="read",
    summary="Manifest and report",
    description="`id`, `object`, `created` and `owned_by` are those of OpenAI's format.",
    dialect=OPENAI,
    answer=ModelAnswer,
    problems=("model-not-found",),
)
async def get_model(asked: Asked[None], name: str) -> ModelAnswer:
    loaded = {entry.name: entry for entry in asked.parts.hub.all()}
    if name not in loaded:
        raise BundleNotFound(f"no bundle named {name!r} is loaded; {suggestion(name, loaded)}", known=loaded)
    bundle = loaded[name].bundle
    report = bundle.directory / "report.json"
    return ModelAnswer(
        **vars(OpenAIModel.of(bundle)),
        name=name,
        digest=bundle.digest,
        manifest=bundle.manifest.model_dump(mode="json", exclude_none=True),
        report=json.loads(report.read_bytes()) if report.is_file() else None,
    )


@_endpoint("GET", "/healthz", scope="health", summary="The process is alive", answer=HealthAnswer, head=True)
async def healthz(asked: Asked[None]) -> Response:
    return Response(b'{"status":"ok"}', media_type="application/json")


@_endpoint(
    "GET",
    "/readyz",
    scope="health",
    summary="Bundles are loaded",
    description="`degraded` lists the collections that are not served; the service is ready for all other requests.",
    answer=ReadyAnswer,
    responses={503: {"model": ReadyAnswer, "description": "Not ready"}},
    head=True,
)
async def readyz(asked: Asked[None]) -> Response:
    parts = asked.parts
    ready = parts.ready
    loaded = [entry.name for entry in parts.hub.all()]
    answer = ReadyAnswer(ready=ready, loaded=loaded, failed=parts.failed, degraded=parts.degraded)
    return asked.respond(answer, 200 if ready else 503)


@_endpoint(
    "GET",
    "/metrics",
    scope="metrics",
    summary="Prometheus text",
    responses={
        200: {"description": "Metrics", "content": {kind: {"schema": {"type": "string"}} for kind in EXPOSITIONS}}
    },
)
async def metrics(asked: Asked[None]) -> Response:
    body, kind = await asked.parts.metrics.render(",".join(asked.request.headers.getlist("accept")))
    return Response(body, headers={"Vary": "Accept"}, media_type=kind)


def page(folder: Path = WEB) -> list[Endpoint]:
    """One endpoint per file of ``folder``: `/` for index.html, `/docs` for docs.html. Each file is read once, at the
    start. A browser asks for all of them again at each visit, so an unchanged file is answered with 304 and no body."""

    def endpoint(file: Path) -> Endpoint:
        path = "/" if file.name == "index.html" else f"/{file.name.removesuffix('.html')}"
        data, kind = file.read_bytes(), mimetypes.guess_type(file.name)[0]
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = PAGE_HEADERS | {"ETag": tag}

        async def send(asked: Asked[None]) -> Response:
            known = ",".join(asked.request.headers.getlist("if-none-match"))
            if tag in [entry.strip().removeprefix("W/") for entry in known.split(",")]:
                return Response(status_code=304, headers=headers)
            return Response(data, headers=headers, media_type=kind)

        return Endpoint("GET", path, task=CATALOG, scope="open", head=True, listed=False, handler=send)

    return [endpoint(file) for file in sorted(folder.iterdir()) if file.is_file()]


def _summary(loaded: Loaded, max_examples: int) -> ModelSummary:
    """``max_examples``: the service's limit per request."""
    bundle = loaded.bundle
    detects = "detect" in bundle.tasks
    try:
        dim = bundle.dim
    except TaskNotServed:
        dim = None
    return ModelSummary(
        name=bundle.name,
        digest=bundle.digest,
        embedding_digest=loaded.embedding_digest,
        family=bundle.family,
        tasks=list(bundle.tasks),
        languages=list(bundle.manifest.languages),
        precision=bundle.manifest.precision,
        dim=dim,
        dimensions=[] if dim is None else [*bundle.dimensions],
        labels=len(bundle.classifier.labels),
        suppression=SuppressionAsked(**vars(default_suppression(bundle))) if detects else None,
        segmentation=_segmentation(bundle) if "segment" in bundle.tasks else None,
        explanation=_explanation(bundle) if "explain" in bundle.tasks else None,
        examples=max_examples if detects else 0,
    )


def _segmentation(bundle: Bundle) -> SegmentationAsked:
    usual, others = default(bundle.manifest), fitting(bundle.manifest)
    return SegmentationAsked(
        methods=sorted(others, key=lambda name: name != usual),
        background=[*background_of(bundle, None)],
        threshold=threshold_of(bundle, SegmentRequest(b"")),
    )


def _explanation(bundle: Bundle) -> ExplanationAsked:
    usual = explain.chosen(bundle.manifest, explain.AUTO)
    others = [name for name, method in explain.METHODS.items() if method.fits(bundle.manifest)]
    return ExplanationAsked(
        methods=sorted(others, key=lambda name: name != usual),
        threshold=explain.threshold_of(bundle.manifest, usual, None),
    )
