"""Thumbnails of indexed pictures, made of the pixels that are decoded for the vector: no picture is decoded twice."""

import base64
import io
from typing import Any

from PIL import Image

from calmclip.models.preprocess.image import Watched

KEY = "thumbnail"  # in an item's metadata
SIDE, LEAST_SIDE = 128, 96  # pixels of the long side: at most, and at least if the picture has so many


class Thumbnailed(Watched):
    """The bytes of a picture that is about to be embedded. ``meta`` is empty until they are decoded."""

    meta: dict[str, Any]

    def __new__(cls, data: bytes) -> "Thumbnailed":
        made = super().__new__(cls, data)
        made.meta = {}
        return made

    def see(self, image: Image.Image) -> None:
        self.meta = {KEY: thumbnail(image)}


def thumbnail(image: Image.Image) -> str:
    """A small JPEG of an upright RGB picture, as a data URI: 2 to 8 kB for photographs.

    It fits an item's metadata (16 KiB) even if the picture is noise. Time grows with the pixels of the picture.
    """
    long = max(image.size)
    if long > SIDE:
        factor = -(-long // SIDE)
        if long // factor >= LEAST_SIDE:
            image = image.reduce(factor)  # the mean of each factor x factor pixels, which is quick
        else:
            width, height = (max(1, round(side * SIDE / long)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
