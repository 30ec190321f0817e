"""Draws the generated pictures of the calibration set: dead leaves.

    python -m calmclip.export.samples.leaves FOLDER

Source: Lee, Mumford & Huang 2001 (IJCV 41), the model: shapes of random places and sizes cover each other, and the
density of their sizes is r^-3, as in photographs; Baradad et al. 2021 (arXiv 2106.05963), section 3.1, pictures of it
with several shapes, colours and textures, on which encoders learn nearly as well as on photographs.

Each picture has its own colours, shapes and strength of texture, drawn by its number. Equal numbers give equal pixels.
"""

import argparse
import colorsys
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

COUNT = 27
SIDE = 224  # pixels
_DETAIL = 2  # a picture is drawn this many times larger
_LEAVES = 700
_RADII = 0.02, 0.45  # the smallest and the largest, of the side


def draw(number: int) -> Image.Image:
    """The picture ``number``, RGB, `SIDE` x `SIDE`."""
    chance = random.Random(number)
    side = SIDE * _DETAIL
    hue, spread, grey = chance.random(), chance.uniform(0.05, 0.5), chance.random()
    corners = chance.choice(((0,), (4,), (3,), (0, 3, 4, 6)))
    strength = chance.uniform(0.0, 0.6)
    textures = [_texture(chance, side) for _ in range(3)]
    picture = Image.new("RGB", (side, side))
    for _ in range(_LEAVES):
        tone = colorsys.hsv_to_rgb((hue + chance.gauss(0, spread)) % 1, chance.random() * grey, chance.random())
        leaf = Image.new("RGB", (side, side), tuple(round(255 * part) for part in tone))
        mask = _shape(chance, side, chance.choice(corners))
        if (box := mask.getbbox()) is None:
            continue
        leaf = Image.blend(leaf.crop(box), chance.choice(textures).crop(box), strength * chance.random())
        picture.paste(leaf, box, mask.crop(box))
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def _shape(chance: random.Random, side: int, corners: int) -> Image.Image:
    """A mask with a disc (0 corners) or a polygon. The inverse of the distribution of radii gives density r^-3."""
    low, high = (part * side for part in _RADII)
    radius = (low**-2 - chance.random() * (low**-2 - high**-2)) ** -0.5
    x, y, turn = chance.random() * side, chance.random() * side, chance.random() * math.tau
    mask = Image.new("L", (side, side))
    if corners:
        angles = [turn + math.tau * corner / corners for corner in range(corners)]
        ImageDraw.Draw(mask).polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], 255)
    else:
        ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), 255)
    return mask


def _texture(chance: random.Random, side: int) -> Image.Image:
    """Noise in three colours: random pixels of a random size, enlarged."""
    cells = chance.choice((8, 24, 64, 224))
    small = Image.frombytes("RGB", (cells, cells), chance.randbytes(3 * cells * cells))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def main() -> None:
    options = argparse.ArgumentParser(description="Draw the generated calibration pictures.")
    options.add_argument("folder", type=Path)
    folder = options.parse_args().folder
    for number in range(COUNT):
        draw(number).save(folder / f"leaves-{number:02d}.jpg", quality=75, optimize=True)


if __name__ == "__main__":
    main()
