"""POST /v1/enhance: a picture -> the same picture in better light, as PNG."""

from time import perf_counter

from fastapi.responses import Response

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Flow, Work
from calmclip.models.tasks.enhance import MAP_PIXELS, EnhanceRequest, enhance
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.openapi import BINARY
from calmclip.service.schemas.enhance import EnhanceBody

PNG = "image/png"


@Endpoint(
    "POST",
    "/v1/enhance",
    task="enhance",
    scope="read",
    summary="The picture in better light, as PNG",
    description="It is as large as the upright picture, and has at most 3 bytes for each pixel.",
    body=EnhanceBody,
    example={"image": {"b64": PIXEL}},
    problems=(*ENGINE, *INPUT, *PICTURE),
    responses={200: {"content": {PNG: {"schema": BINARY}}}},
)
async def enhance_picture(asked: Asked[EnhanceBody]) -> Response:
    body, most = asked.body, asked.limits.map_pixels
    loaded = asked.bundle(body.model)
    asked.check(body.image)
    if body.map_pixels is not None and body.map_pixels > most:
        raise BadRequest(f"map_pixels is {body.map_pixels}; at most {most} are computed")
    png = await asked.run(
        loaded, _png(loaded.bundle, EnhanceRequest(body.image, body.map_pixels or min(most, MAP_PIXELS)))
    )
    asked.context.answered = perf_counter()
    return Response(png, media_type=PNG)


def _png(bundle: Bundle, request: EnhanceRequest) -> Flow[bytes]:
    """The file is written in a thread of the pool: 12 megapixels take half a second."""
    enhanced = yield from enhance(bundle, request)
    png: bytes = yield Work("postprocess", enhanced.png)
    return png
