"""Request of /v1/enhance; the answer is a PNG file."""

from pydantic import Field

from calmclip.models.tasks.enhance import LEAST_PIXELS, MAP_PIXELS
from calmclip.service.schemas import PictureBody


class EnhanceBody(PictureBody):
    map_pixels: int | None = Field(
        None,
        ge=LEAST_PIXELS,
        description=f"a larger picture is scaled down for its map; default {MAP_PIXELS}, or the limit if that is lower",
    )
