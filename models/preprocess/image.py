"""Bytes of a picture -> upright RGB -> float32 [1, 3, H, W], and the frame that maps boxes back.

The result equals that of the reference processors (torchvision's PIL transforms, transformers' CLIPImageProcessor):
Pillow's antialiased resize on uint8, then float32 arithmetic. The kernel of the op library computes both with the same
bits. `models.preprocess.gaussian` resamples by a Gaussian.

A JPEG of more than `EXACT_PIXELS` is decoded at 1/2, 1/4 or 1/8 of its sides by libjpeg's own scale (an inverse DCT of
fewer points), so that the photograph of a phone with 48 megapixels takes the memory of 12. Smaller ones are decoded
whole, with the bits of the reference processors. `tests/bench/reduced.py` compares both.
"""

import os
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from PIL import ExifTags, Image

from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.errors import BadImage, BadRequest, ImageTooLarge
from calmclip.models.flow import Array
from calmclip.models.ops import pixels as kernel
from calmclip.models.ops.library import Library
from calmclip.models.preprocess.formats import FORMATS, NAMES, SUFFIXES, opened
from calmclip.models.preprocess.gaussian import square_to
from calmclip.models.preprocess.memory import Band, fits_bands, in_bands
from calmclip.models.preprocess.placement import Frame, Placement, columns_first, place, source_range

__all__ = [
    "EXACT_PIXELS", "FORMATS", "JPEG_PIXELS", "KINDS", "LEAST_SIDE", "MAX_PIXELS", "NAMES", "REDUCED_PIXELS",
    "SUFFIXES", "ImagePreparer", "Picture", "Watched", "count_pixels", "decode", "is_picture", "load", "normalisation",
    "upright_size", "whole_size",
]  # fmt: skip
# The path of a file, its bytes, an open binary file, a Pillow image, or pixels, see `_of_array`. A `str` is none of
# these, because a task may take it for a text; `Runner` takes it for a path.
Picture: TypeAlias = PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | Array
KINDS = (
    f"a path, the bytes of a {NAMES} file, a file opened in binary mode, a Pillow image, or a numpy array "
    "uint8 [height, width], [height, width, 3] or [height, width, 4]"
)
MAX_PIXELS = 50_000_000  # that are decoded of one picture, at most: a phone's 48 megapixels in any format
JPEG_PIXELS = 4  # times as many may a JPEG have whose decoder makes it smaller: a phone's 200 megapixels
EXACT_PIXELS = 40_000_000  # a JPEG of more is decoded at a part of its size,
REDUCED_PIXELS = 20_000_000  # so that it has at most so many,
LEAST_SIDE = 2016  # unless its short side would be shorter: twice the side of the largest inputs (OWLv2's 1008)

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# EXIF orientation -> the transpose that makes the picture upright; 1 is upright already
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # those that exchange width and height
_WHOLE = "_calmclip_whole"  # an attribute of a Pillow image, so that a crop or a copy does not have it


class Watched(bytes):
    """The bytes of a picture whose decoded pixels are of further use, so that they are not decoded twice."""

    def see(self, image: Image.Image) -> None:
        """Called once with what `decode` gives, in the thread that decodes. Must not change or keep ``image``."""


def count_pixels(data: bytes, *, max_pixels: int = MAX_PIXELS, whole: bool = False) -> int:
    """The pixels that `decode` holds in memory, from the header alone. Raises as `decode` does for the header."""
    with opened(data) as image:
        return _plan(image, data, max_pixels, whole)[1]


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height of the upright picture, from the header alone. Raises `BadImage`."""
    with opened(data) as image:
        turned = _orientation(image) in _SIDEWAYS and image.format != "TIFF"  # of a TIFF, Pillow tells the upright size
        return image.size[::-1] if turned else image.size


def is_picture(value: object) -> bool:
    """Whether ``value`` is one picture of a kind that `load` takes, not a list of pictures."""
    pixels = isinstance(value, np.ndarray) and value.ndim < 4
    return (
        pixels or isinstance(value, PathLike | bytes | bytearray | memoryview | Image.Image) or hasattr(value, "read")
    )


def load(picture: Picture, *, max_pixels: int = MAX_PIXELS, whole: bool = False) -> Image.Image:
    """Any `Picture`, upright and as 8-bit RGB; equal pixels give an equal result for every kind. ``whole``: see
    `decode`.

    An open file is read from its position to its end. Raises as `decode`; `BadRequest` for a file that cannot be read,
    an array of another dtype or shape, and a value of another type; `BadImage` for a Pillow image that is broken.
    """
    if isinstance(picture, PathLike) or hasattr(picture, "read"):
        picture = _read(picture)
    if isinstance(picture, bytes | bytearray | memoryview):
        image = decode(bytes(picture), max_pixels=max_pixels, whole=whole)
        if isinstance(picture, Watched):
            picture.see(image)
        return image
    if isinstance(picture, np.ndarray):
        picture = _of_array(picture)
    if not isinstance(picture, Image.Image):
        raise BadRequest(f"the picture is of the type {type(picture).__name__}; expected {KINDS}")
    if picture.width * picture.height > max_pixels:
        raise ImageTooLarge(
            f"the picture is {picture.width} x {picture.height} pixels; at most {max_pixels} are read. Scale it down."
        )
    try:
        picture.load()  # decodes now, from a file that may be cut or closed
        return _rgb(_upright(picture, _orientation(picture)))
    except Exception as error:  # as in `decode`
        raise BadImage(f"the Pillow image cannot be read: {error}. Open it again from a whole file.") from None


def _read(picture: Any) -> bytes:
    """The content of a path or an open file. Raises `BadRequest`."""
    path = isinstance(picture, PathLike)
    name = repr(os.fspath(picture)) if path else f"in {getattr(picture, 'name', picture)!r}"
    try:
        content = Path(os.fsdecode(picture)).read_bytes() if path else picture.read()
    except (OSError, ValueError) as error:
        raise BadRequest(f"the picture {name} cannot be read: {error}") from None
    if not isinstance(content, bytes | bytearray | memoryview):
        raise BadRequest(f"the picture {name} reads as {type(content).__name__}; open the file in binary mode ('rb')")
    return bytes(content)


def _of_array(pixels: Array) -> Image.Image:
    """Upright pixels: grey uint8 [height, width], RGB [height, width, 3], or RGB with alpha [height, width, 4]."""
    channels = pixels.shape[2:]
    if pixels.dtype != np.uint8 or pixels.ndim < 2 or channels not in ((), (3,), (4,)) or not pixels.size:
        raise BadRequest(f"the picture is an array {pixels.dtype} {list(pixels.shape)}; expected {KINDS}")
    return Image.fromarray(pixels)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, whole: bool = False) -> Image.Image:
    """The first frame, upright by its EXIF tag, as 8-bit RGB. The bytes choose the format, see `FORMATS`.

    CMYK and palettes are converted; 16-bit grey is scaled, not clipped; transparency is composed over white. A colour
    profile is ignored, as in the reference processors. A JPEG of more than `EXACT_PIXELS` has fewer pixels than its
    file, and `whole_size` tells the file's; not if ``whole``. Memory: 4 bytes for each of `count_pixels`, and as many
    again for a picture that is turned.

    Raises `BadImage` for no picture, a broken one, and a format that is not installed; `ImageTooLarge` for more pixels
    than ``max_pixels`` after the reduction, or than `JPEG_PIXELS` times as many before it. Both before it decodes.
    """
    with opened(data) as image:
        scale, _ = _plan(image, data, max_pixels, whole)
        size = image.size
        if scale > 1:
            image.draft(None, (size[0] // scale, size[1] // scale))
        try:
            image.load()
            orientation = _orientation(image)
            picture = _rgb(_upright(image, orientation))
        except Exception as error:  # a decoder may raise anything on hostile bytes
            raise BadImage(f"the {image.format} picture is broken: {error}. Send the whole file.") from None
    if scale > 1:
        setattr(picture, _WHOLE, size[::-1] if orientation in _SIDEWAYS else size)
    return picture


def whole_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the upright picture that ``image`` shows: its size, unless `decode` made it smaller."""
    width, height = getattr(image, _WHOLE, image.size)
    return width, height


def normalisation(spec: ImagePreprocess) -> tuple[Array, Array]:
    """-> gain, bias float32 [3, 1, 1]: (x / 255 - mean) / std = x * gain + bias, computed in float64."""
    mean, std = (np.array(triple, np.float64).reshape(3, 1, 1) for triple in (spec.mean, spec.std))
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


class ImagePreparer:
    """Runs an `ImagePreprocess` by the kernel of ``library``, or by Pillow with the same bits."""

    def __init__(self, spec: ImagePreprocess, library: Library | None = None) -> None:
        self.spec = spec
        self.library = library
        self.gain, self.bias = normalisation(spec)

    def prepare(self, image: Image.Image) -> tuple[Array, Frame]:
        """Upright RGB picture of any size -> pixels float32 [1, 3, H, W] and its `Frame`, which maps boxes of the whole
        picture (`whole_size`).

        A graph with ``in_graph`` takes the picture unchanged: uint8 [height, width, 3]. Raises ValueError for a picture
        of another mode; `decode` returns RGB only.
        """
        if image.mode != "RGB":
            raise ValueError(f"the picture is {image.mode}; expected RGB")
        placement, frame = place(self.spec, *image.size)
        frame = frame.enlarged(*whole_size(image))
        if self.spec.in_graph:
            return np.asarray(image, np.uint8), frame
        if self.spec.resample == "gaussian":
            pixels = square_to(image, self.spec.size, self.spec.pad)
            pixels *= self.gain
            pixels += self.bias
            return pixels[None], frame
        if self.library and self._suits_kernel(image, placement):
            return self._by_kernel(self.library, image, placement), frame
        chw = np.asarray(self._by_pillow(image, placement), np.uint8).transpose(2, 0, 1)
        pixels = np.multiply(chw, self.gain, dtype=np.float32, order="C")
        pixels += self.bias
        return pixels[None], frame

    def _suits_kernel(self, image: Image.Image, placement: Placement) -> bool:
        """Otherwise Pillow computes the same, and faster."""
        small = max(image.size) <= kernel.MAX_SIDE and not self._is_ribbon(placement)
        return small and fits_bands(image, self._reach(image, placement))

    def _reach(self, image: Image.Image, placement: Placement) -> float:
        """The radius of an output row's filter, in source rows, with 2 rows for rounding."""
        taps = 2 if self.spec.resample == "bicubic" else 1
        return taps * max(image.height / placement.height, 1.0) + 2

    def _is_ribbon(self, placement: Placement) -> bool:
        """Whether the whole resized picture would take too much memory, because the picture is long and narrow."""
        return placement.width * placement.height > max(MAX_PIXELS, self.spec.size[0] * self.spec.size[1])

    def _by_kernel(self, library: Library, image: Image.Image, placement: Placement) -> Array:
        spec, (width, height) = self.spec, image.size
        resample = spec.resample
        assert resample != "gaussian"  # the kernel has no Gaussian
        pixels = np.empty((1, 3, *spec.size), np.float32)
        where = kernel.Placement(placement.height, placement.width, placement.top, placement.left, *spec.size, spec.pad)
        scale, reach = height / placement.height, self._reach(image, placement)

        def use(band: Band) -> None:
            picture = kernel.Picture(band.address, height, width, *band.strides, band.first, band.rows)
            kernel.image_to_pixels(library, picture, where, resample, self.gain, self.bias, pixels, band.outputs)

        in_bands(image, spec.size[0], lambda row: (placement.top + row + 0.5) * scale, reach, use)
        return pixels

    def _by_pillow(self, image: Image.Image, placement: Placement) -> Image.Image:
        spec, (rows, cols) = self.spec, self.spec.size
        left, top = placement.left, placement.top
        if self._is_ribbon(placement):
            return self._ribbon(image, placement)
        resized = self._resize(image, placement.width, placement.height)
        if resized.size == (cols, rows):
            return resized
        if spec.resize != "letterbox":
            return resized.crop((left, top, left + cols, top + rows))
        canvas = Image.new("RGB", (cols, rows), (spec.pad,) * 3)
        canvas.paste(resized)
        return canvas

    def _ribbon(self, image: Image.Image, placement: Placement) -> Image.Image:
        """Resize only the part inside the graph's input, one axis at a time, in the same order as a whole picture."""
        (rows, cols), filter = self.spec.size, _RESAMPLE[self.spec.resample]
        down_first = columns_first(*image.size, placement.width, placement.height)
        left, right, width = source_range(placement.left, cols, placement.width / image.width, image.width)
        top, bottom, height = source_range(placement.top, rows, placement.height / image.height, image.height)
        image = image.crop((width.start, height.start, width.stop, height.stop))
        for down in (down_first, not down_first):
            size = (image.width, rows) if down else (cols, image.height)
            box = (0, top, image.width, bottom) if down else (left, 0, right, image.height)
            image = image.resize(size, filter, box)
        return image

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Resize in two steps, so the order of the axes does not depend on Pillow's version."""
        halfway = (image.width, height) if columns_first(*image.size, width, height) else (width, image.height)
        for size in (halfway, (width, height)):
            if size != image.size:
                image = image.resize(size, _RESAMPLE[self.spec.resample])
        return image


def _plan(image: Image.Image, data: bytes, max_pixels: int, whole: bool) -> tuple[int, int]:
    """The part of its sides at which a picture is decoded, 1/1 to 1/8, and the pixels that this takes.

    libjpeg keeps the coefficients of a JPEG with several scans (a progressive one), so such a picture counts whole.
    Raises `ImageTooLarge`.
    """
    width, height = image.size
    pixels = width * height
    if image.format not in ("JPEG", "MPO") or whole or pixels <= min(EXACT_PIXELS, max_pixels):
        scales, most = [1], max_pixels
    elif _in_one_scan(image, data):
        scales, most = [1, 2, 4, 8], JPEG_PIXELS * max_pixels
    else:
        scales, most = [1, 2, 4, 8], max_pixels
    sizes = {scale: -(-width // scale) * -(-height // scale) for scale in scales}
    able = [scale for scale, count in sizes.items() if count <= max_pixels]
    if pixels > most or not able:
        more = f", and of a JPEG {most} are read" if most > max_pixels else ""
        raise ImageTooLarge(
            f"the picture is {width} x {height} = {pixels} pixels; at most {max_pixels} are decoded{more}. "
            "Scale it down."
        )
    if pixels <= EXACT_PIXELS:
        scale = able[0]
    else:
        sharp = [scale for scale in able if min(width, height) // scale >= LEAST_SIDE] or able[:1]
        scale = next((scale for scale in sharp if sizes[scale] <= REDUCED_PIXELS), sharp[-1])
    return scale, pixels if most == max_pixels else sizes[scale]


def _in_one_scan(image: Image.Image, data: bytes) -> bool:
    """Whether the first scan of a JPEG has all components, so that libjpeg decodes row by row (ITU-T T.81, B.2.3).
    False if the segments before it are irregular."""
    at = 2
    while "progressive" not in image.info and at + 5 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return data[at + 4] == len(image.getbands())
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


def _orientation(image: Image.Image) -> int:
    """By EXIF; 1 if the tag is absent, broken or invalid, because broken tags do not make the pixels unusable."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if orientation in _TRANSPOSES else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """`ImageOps.exif_transpose` is not used: it also rewrites the tags, and fails on a tag that it cannot write."""
    if orientation == 1:
        return image
    turned = image.transpose(_TRANSPOSES[orientation])
    turned.info = {key: value for key, value in turned.info.items() if key == "transparency"}  # no tag to turn it again
    return turned


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        levels = np.asarray(image)
        if levels.dtype.itemsize > 2 and (levels.min() < 0 or levels.max() > 65535):
            raise ValueError("it holds numbers outside of 0 to 65535; save it with 8 or 16 bits")
        grey = (levels.astype(np.uint32) + 128) // 257  # rounded to 0-255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it holds numbers of floating point, whose range is unknown; save it with 8 or 16 bits")
    if "A" in image.mode or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")
