"""POST /v1/enhance: a picture -> the same picture in better light, as PNG."""

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Flow, Work
from calmclip.models.tasks.enhance import MAP_PIXELS, EnhanceRequest, enhance
from calmclip.service.asked import Asked
from calmclip.service.endpoints import ENGINE, INPUT, PICTURE, PIXEL, Endpoint
from calmclip.service.openapi import PNG_FILE
from calmclip.service.schemas.enhance import EnhanceBody


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
    responses=PNG_FILE,
)
async def enhance_picture(asked: Asked[EnhanceBody]) -> bytes:
    body, most = asked.body, asked.limits.map_pixels
    loaded = asked.bundle(body.model)
    asked.check(body.image, whole=True)
    if body.map_pixels is not None and body.map_pixels > most:
        raise BadRequest(f"map_pixels is {body.map_pixels}; at most {most} are computed")
    request = EnhanceRequest(body.image, body.map_pixels or min(most, MAP_PIXELS))
    return await asked.run(loaded, _png(loaded.bundle, request))


def _png(bundle: Bundle, request: EnhanceRequest) -> Flow[bytes]:
    """The file is written in a thread of the pool: 12 megapixels take half a second."""
    enhanced = yield from enhance(bundle, request)
    png: bytes = yield Work("postprocess", enhanced.png)
    return png
