"""Draws docs/detect.jpg: what `detect` returns at its default settings, wrong boxes included.

    python -m tests.bench.detect_picture models/bundles/mini-int8 --out docs/detect.jpg

The photographs are the first eight of export/samples in alphabetical order that are neither a texture nor the sky, and
all are asked for the same names. Nothing is left out after looking.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from calmclip import open_bundle

SAMPLES = Path(__file__).parents[2] / "export" / "samples"
NO_THINGS = ("brick", "galaxies", "grass", "gravel")  # textures and the sky
NAMES = (
    "a person", "a cat", "a dog", "an otter", "a cup", "a spoon", "a bowl", "a clock", "a flower", "a fig", "a flag",
    "a bottle", "a chair", "an ancient amphitheatre", "a toy space shuttle",
)  # fmt: skip
COLUMNS, ROWS, SIDE = 4, 2, 320
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("pictures", type=Path, nargs="*", help="others than the rule's")
    options.add_argument("--names", nargs="+", default=list(NAMES))
    arguments = options.parse_args()
    runner = open_bundle(arguments.bundle)
    files = [path for path in sorted(SAMPLES.glob("*.jpg")) if path.stem not in NO_THINGS]
    files = arguments.pictures if arguments.pictures else files[: COLUMNS * ROWS]
    sheet = Image.new("RGB", (COLUMNS * SIDE, -(-len(files) // COLUMNS) * SIDE), "white")
    for place, path in enumerate(files):
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
        tile = ImageOps.contain(upright, (SIDE - 4, SIDE - 4))
        draw, scale = ImageDraw.Draw(tile), tile.width / upright.width
        font = ImageFont.load_default(12)
        (answer,) = runner.detect_many([path], arguments.names)
        for detection in reversed(answer.detections):
            x0, y0, x1, y1 = (float(number) * scale for number in detection.box)
            colour, text = COLOURS[detection.index % len(COLOURS)], f"{detection.label} {detection.score:.2f}"
            draw.rectangle((x0, y0, x1, y1), outline=colour, width=2)
            label = draw.textbbox((x0 + 2, y0 + 1), text, font=font)
            draw.rectangle(label, fill=colour)
            draw.text((x0 + 2, y0 + 1), text, fill="white", font=font)
        sheet.paste(tile, (place % COLUMNS * SIDE + 2, place // COLUMNS * SIDE + 2))
    sheet.save(arguments.out, quality=80, optimize=True)


if __name__ == "__main__":
    main()
