"""Draws docs/segment.jpg: what `segment` answers with its defaults, wrong masks included.

    python -m tests.bench.segment_picture models/bundles/mini-int8 --out docs/segment.jpg [--method maskclip]

The photographs are all of export/samples that are neither a texture nor the sky, in alphabetical order; all are asked
for the names of `tests.bench.detect_picture`. Nothing is left out after looking. Below each photograph stand the names
of its masks, the largest first, and their parts of the picture.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from calmclip import open_bundle
from calmclip.models.preprocess.image import MAX_PIXELS, load
from calmclip.models.tasks.masks import palette
from calmclip.models.tasks.segment import Segments
from tests.bench.detect_picture import NAMES, NO_THINGS, SAMPLES

COLUMNS, SIDE = 4, 256
OPACITY = 0.55
LINES, LINE = 4, 15  # names below a photograph, and the height of one in pixels
SMALLEST = 0.005  # of the picture: a smaller mask is drawn, but not named


def overlay(picture: Image.Image, segments: Segments) -> Image.Image:
    """The upright picture with its masks in colours, each with a white edge."""
    colours = palette(len(NAMES) + 1)
    pixels = np.asarray(picture, np.float32).copy()
    for each in reversed(segments.segments):
        mask = each.mask.pixels()
        pixels[mask] = (1 - OPACITY) * pixels[mask] + OPACITY * colours[each.index]
        inner = mask.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                inner &= np.roll(mask, step, axis)
        pixels[mask & ~inner] = 255
    return Image.fromarray(pixels.round().astype(np.uint8))


def tile(picture: Image.Image, segments: Segments) -> Image.Image:
    small = overlay(picture, segments)
    small.thumbnail((SIDE - 4, SIDE - 4))
    whole = segments.width * segments.height
    named = [each for each in segments if each.area >= SMALLEST * whole]
    named = sorted(named, key=lambda each: -each.area)[:LINES]
    sheet = Image.new("RGB", (SIDE, small.height + len(named) * LINE + 8), "white")
    sheet.paste(small, (2, 2))
    pen, font, colours = ImageDraw.Draw(sheet), ImageFont.load_default(12), palette(len(NAMES) + 1)
    for place, each in enumerate(named):
        y = small.height + 4 + place * LINE
        pen.rectangle((4, y + 2, 16, y + LINE - 2), fill=tuple(colours[each.index].tolist()))
        pen.text((20, y), f"{each.label}, {each.area / whole:.0%}", fill="black", font=font)
    return sheet


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--method", help="of the family segmenters; else the bundle's")
    options.add_argument("pictures", type=Path, nargs="*", help="others than the rule's")
    options.add_argument("--names", nargs="+", default=list(NAMES))
    arguments = options.parse_args()
    runner = open_bundle(arguments.bundle)
    files = [path for path in sorted(SAMPLES.glob("*.jpg")) if path.stem not in NO_THINGS]
    tiles = []
    for path in arguments.pictures or files:
        segments = runner.segment(path, arguments.names, method=arguments.method)
        print(path.stem, ", ".join(f"{each.label} {each.score:.2f} {each.area}" for each in segments))
        tiles.append(tile(load(path, max_pixels=MAX_PIXELS), segments))
    rows = [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]
    heights = [max(each.height for each in row) for row in rows]
    sheet = Image.new("RGB", (COLUMNS * SIDE, sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, each in enumerate(row):
            sheet.paste(each, (column * SIDE, sum(heights[:number])))
    sheet.save(arguments.out, quality=80, optimize=True)


if __name__ == "__main__":
    main()
