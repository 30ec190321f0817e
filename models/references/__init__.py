"""Reference texts and pictures, which are about no collection: what a query without an answer looks like.

`README.md` names the sources of the pictures. `service.relevance` says what the references are for.
"""

from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import Image

TILE = 128  # pixels of a side, in `pictures.jpg`
PART = 64  # two corners of a tile are a picture each: a part shows less than the whole, and so resembles less


@cache
def texts() -> tuple[str, ...]:
    """Some two hundred distinct texts: things of many kinds, notions, letters, code, other languages, nonsense."""
    return tuple(Path(__file__).with_name("texts.txt").read_text(encoding="utf-8").splitlines())


@cache
def pictures() -> tuple[bytes, ...]:
    """64 pictures of 64 x 64 pixels, as PNG files."""
    parts = []
    with Image.open(Path(__file__).with_name("pictures.jpg")) as sheet:
        for top in range(0, sheet.height, TILE):
            for left in range(0, sheet.width, TILE):
                for shift in (0, TILE - PART):
                    x, y = left + shift, top + shift
                    file = BytesIO()
                    sheet.crop((x, y, x + PART, y + PART)).save(file, "PNG")
                    parts.append(file.getvalue())
    return tuple(parts)
