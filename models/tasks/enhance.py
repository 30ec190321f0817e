"""Picture -> the same picture in better light: divided by the map of its light, and clipped to 0 to 255.

Source: CLIP-LIT, Liang et al. 2023 (arXiv 2303.17569), section 3.2: enhanced = clip(picture / light map); RAVE,
Gaintseva et al. 2024 (arXiv 2404.01889).

The graphs `levels` and `enhance` read strips of a picture (`calmclip.export.nets.light_map`). Their pyramid averages
over parts of the whole picture: `averages` cuts one axis into parts, as torch's AdaptiveAvgPool2d does, and `between`
interpolates between them, as F.interpolate with align_corners does. A strip comes with the rows around it that its map
depends on, so the strips together are the map of the whole picture.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Manifest
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays, Call, Flow, Work
from calmclip.models.preprocess.image import Picture, load
from calmclip.models.tasks import TASKS, Command, Task, exactly
from calmclip.models.tasks.features import Driver, each

LEVELS = (1, 2, 3, 6)  # of the pyramid: the parts of an axis
PARTS = sum(LEVELS)
HALO = 17  # rows above and below that a row of the map depends on: one for each 3 x 3 convolution in a row
STRIP = 1 << 17  # pixels of a strip with its halo; the graphs need about 2.1 KB for each
MAP_PIXELS = 1 << 18  # by default; as many as the pictures that the authors trained on
LEAST_PIXELS = 1 << 10
DARKEST = np.float32(1e-9)  # of the map: the constant that the authors' training adds to it
_BAND = 1 << 20  # pixels that are divided at once


@dataclass(frozen=True)
class EnhanceRequest:
    """``map_pixels``: a picture of more pixels is scaled down for the map, and the map is enlarged. The time grows with
    these pixels. The authors infer at full size: give width * height for that."""

    image: Picture
    map_pixels: int = MAP_PIXELS


@dataclass(frozen=True)
class Enhanced:
    """``picture``: RGB, as large as the upright picture. ``map_size``: width and height of its map."""

    picture: Image.Image
    map_size: tuple[int, int]

    def png(self) -> bytes:
        file = BytesIO()
        self.picture.save(file, "PNG", compress_level=1)  # the default takes four times as long for a fifth fewer bytes
        return file.getvalue()


def enhance(bundle: Bundle, request: EnhanceRequest) -> Flow[Enhanced]:
    """Raises `TaskNotServed`, `BadRequest` (map_pixels) and the `InputError`s of pictures."""
    bundle.require("enhance")
    if request.map_pixels < LEAST_PIXELS:
        raise BadRequest(f"map_pixels is {request.map_pixels}; expected at least {LEAST_PIXELS}")
    picture = yield Work("decode", lambda: load(request.image, max_pixels=bundle.max_pixels, whole=True))
    pixels = yield Work("preprocess", lambda: scaled(picture, request.map_pixels))
    light = yield from light_map(pixels)
    divided = yield Work("postprocess", lambda: divide(picture, light))
    return Enhanced(divided, (pixels.shape[1], pixels.shape[0]))


def scaled(picture: Image.Image, most: int) -> Array:
    """uint8 [height, width, 3] of at most ``most`` pixels, in the picture's proportions; each side has at least 2,
    because borders are reflected."""
    ratio = min(1.0, (most / (picture.width * picture.height)) ** 0.5)
    size = tuple(max(2, int(side * ratio)) for side in picture.size)
    if size != picture.size:
        picture = picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)
    return np.asarray(picture, np.uint8)


@dataclass(frozen=True)
class Strip:
    """Rows ``top`` to ``bottom`` of a picture, and those from ``first`` to ``last`` that the graphs read for them."""

    first: int
    top: int
    bottom: int
    last: int


def strips(height: int, width: int) -> list[Strip]:
    """The whole picture if it has at most `STRIP` pixels; else so many rows that a strip with its halo has about as
    many, and at least `HALO` rows."""
    if height * width <= STRIP:
        return [Strip(0, 0, height, height)]
    rows = max(HALO, STRIP // width - 2 * HALO)
    return [
        Strip(max(0, top - HALO), top, bottom, min(height, bottom + HALO))
        for top in range(0, height, rows)
        for bottom in [min(height, top + rows)]
    ]


def light_map(pixels: Array) -> Flow[Array]:
    """uint8 [height, width, 3] -> float32 [1 or 3, height, width]."""
    height, width = pixels.shape[:2]
    cut = strips(height, width)
    levels = np.zeros((), np.float64)
    for strip in cut:
        outputs = yield Call("levels", level_feeds(pixels, strip))
        levels = levels + outputs["sums"]
    maps = []
    for strip in cut:
        outputs = yield Call("enhance", map_feeds(pixels, strip, levels.astype(np.float32)))
        maps.append(outputs["light_map"][0, :, strip.top - strip.first : strip.bottom - strip.first])
    return np.concatenate(maps, axis=1)


def level_feeds(pixels: Array, strip: Strip) -> Arrays:
    """Of the graph `levels`, whose sums over all strips are the averages of all parts."""
    height, width = pixels.shape[:2]
    rows = averages(height)[:, strip.first : strip.last]
    rows[:, : strip.top - strip.first] = rows[:, strip.bottom - strip.first :] = 0  # the halo is another strip's
    return {"pixels": planes(pixels, strip), "rows": rows, "columns": np.ascontiguousarray(averages(width).T)}


def map_feeds(pixels: Array, strip: Strip, levels: Array) -> Arrays:
    """Of the graph `enhance`. ``levels`` float32 [1, F, 12, 12]."""
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(between(height)[:, strip.first : strip.last].T)
    return {"pixels": planes(pixels, strip), "levels": levels, "rows": rows, "columns": between(width)}


def planes(pixels: Array, strip: Strip) -> Array:
    """float32 [1, 3, rows, width] in [0, 1]."""
    rows = pixels[strip.first : strip.last].transpose(2, 0, 1)[None]
    return np.ascontiguousarray(rows, np.float32) / np.float32(255)


def averages(size: int) -> Array:
    """float32 [12, size]: a row averages one part of an axis: 1 part, 2, 3 and 6; parts may share a pixel."""
    matrix = np.zeros((PARTS, size), np.float32)
    for row, (part, number) in zip(matrix, _parts(), strict=True):
        start, end = part * size // number, -(-(part + 1) * size // number)
        row[start:end] = 1 / (end - start)
    return matrix


def between(size: int) -> Array:
    """float32 [12, size]: the weight of each part at each pixel; the first and the last part lie at the borders."""
    matrix = np.zeros((PARTS, size))
    for row, (part, number) in zip(matrix, _parts(), strict=True):
        places = np.arange(size) * ((number - 1) / max(1, size - 1))
        row[:] = np.clip(1 - np.abs(places - part), 0, 1)
    return matrix.astype(np.float32)


def _parts() -> list[tuple[int, int]]:
    return [(part, number) for number in LEVELS for part in range(number)]


def divide(picture: Image.Image, light: Array) -> Image.Image:
    """clip(picture / map) in 8 bits, rounded; the map of a smaller picture is enlarged bilinearly. Memory: a band of
    rows beside the picture, its map and the answer. A map of ones gives the picture, bit for bit."""
    width, height = picture.size
    answer = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        band = np.asarray(picture.crop((0, top, width, bottom)), np.float32)
        answer[top:bottom] = np.clip(band / np.maximum(_band(light, picture.size, top, bottom), DARKEST), 0, 255) + 0.5
    return Image.fromarray(answer)


def _band(light: Array, size: tuple[int, int], top: int, bottom: int) -> Array:
    """Rows ``top`` to ``bottom`` of the map of a picture of ``size``: float32 [rows, width, 1 or 3]."""
    width, height = size
    across, down = light.shape[2], light.shape[1]
    if (across, down) == size:
        return light[:, top:bottom].transpose(1, 2, 0)
    box = (0, top * down / height, across, bottom * down / height)
    planes = [
        Image.fromarray(plane).resize((width, bottom - top), Image.Resampling.BILINEAR, box=box) for plane in light
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def check(manifest: Manifest) -> None:
    """Raises `ValueError` unless the graphs are those of `calmclip.export.nets.light_map`."""
    for role, inputs, output in (
        ("levels", ("pixels", "rows", "columns"), "sums"),
        ("enhance", ("pixels", "levels", "rows", "columns"), "light_map"),
    ):
        graph = manifest.graphs[role]
        exactly(role, "inputs", graph.inputs, inputs)
        exactly(role, "outputs", graph.outputs, (output,))
        if graph.batch:
            raise ValueError(f"`graphs.{role}.batch` is true; expected false, because its strips differ in height")


def example(bundle: Bundle, picture: bytes) -> EnhanceRequest:
    return EnhanceRequest(picture)


def _options(options: ArgumentParser) -> None:
    options.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the pictures go, as NAME.png")
    options.add_argument(
        "--map-pixels", type=int, default=MAP_PIXELS, help=f"of the picture under the map (default {MAP_PIXELS})"
    )


def _answers(driver: Driver, options: Namespace) -> Iterator[dict[str, Any]]:
    files = [options.out / f"{path.stem}.png" for path in options.pictures]
    if len({*files}) < len(files):
        raise BadRequest("two pictures have one name, and would be one file; give pictures with different names")
    options.out.mkdir(parents=True, exist_ok=True)
    answers = each(
        driver, options.pictures, lambda path: enhance(driver.bundle, EnhanceRequest(path, options.map_pixels))
    )
    for path, enhanced in answers:
        file = options.out / f"{path.stem}.png"
        file.write_bytes(enhanced.png())
        yield {"picture": str(path), "enhanced": str(file), "map_size": list(enhanced.map_size)}


TASKS.register("enhance")(
    Task(
        name="enhance",
        summary="picture -> the same picture in better light",
        request=EnhanceRequest,
        flow=enhance,
        example=example,
        roles={"levels": None, "enhance": None},
        check=check,
        command=Command(_options, _answers, lambda answer: f"{answer['picture']} -> {answer['enhanced']}"),
    )
)
