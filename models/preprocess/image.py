"""JPEG bytes -> upright RGB -> float32 [1, 3, H, W], and the frame that maps boxes back.

The result equals that of the reference processors (torchvision's PIL transforms, transformers' CLIPImageProcessor):
Pillow's antialiased resize on uint8, then float32 arithmetic. The kernel of the op library computes both with the same
bits. `models.preprocess.gaussian` resamples by a Gaussian.
"""

import io
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
from calmclip.models.preprocess.gaussian import square_to
from calmclip.models.preprocess.memory import Band, fits_bands, in_bands
from calmclip.models.preprocess.placement import Frame, Placement, columns_first, place, source_range

FORMATS = ("JPEG", "PNG", "WEBP")
# The path of a file, its bytes, an open binary file, a Pillow image, or pixels, see `_of_array`. A `str` is none of
# these, because a task may take it for a text; `Runner` takes it for a path.
Picture: TypeAlias = PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | Array
KINDS = (
    "a path, the bytes of a JPEG, PNG or WebP file, a file opened in binary mode, a Pillow image, or a numpy array "
    "uint8 [height, width], [height, width, 3] or [height, width, 4]"
)
MAX_PIXELS = 40_000_000

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


def count_pixels(data: bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """Read the header only. Raises `BadImage` if it is no JPEG, PNG or WebP; `ImageTooLarge` over the limit."""
    with _open(data, max_pixels) as image:
        return image.width * image.height


def is_picture(value: object) -> bool:
    """Whether ``value`` is one picture of a kind that `load` takes, not a list of pictures."""
    pixels = isinstance(value, np.ndarray) and value.ndim < 4
    return (
        pixels or isinstance(value, PathLike | bytes | bytearray | memoryview | Image.Image) or hasattr(value, "read")
    )


def load(picture: Picture, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Any `Picture`, upright and as 8-bit RGB; equal pixels give an equal result for every kind.

    An open file is read from its position to its end. Raises as `decode`; `BadRequest` for a file that cannot be read,
    an array of another dtype or shape, and a value of another type; `BadImage` for a Pillow image that is broken.
    """
    if isinstance(picture, PathLike) or hasattr(picture, "read"):
        picture = _read(picture)
    if isinstance(picture, bytes | bytearray | memoryview):
        return decode(bytes(picture), max_pixels=max_pixels)
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
        return _rgb(_upright(picture))
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


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame, upright by its EXIF tag, as 8-bit RGB. Raises as `count_pixels` does, before it decodes.

    CMYK and palettes are converted; 16-bit grey is scaled, not clipped; transparency is composed over white. A colour
    profile is ignored, as in the reference processors.
    """
    with _open(data, max_pixels) as image:
        try:
            image.load()
            return _rgb(_upright(image))
        except Exception as error:  # a decoder may raise anything on hostile bytes
            raise BadImage(f"the {image.format} picture is broken: {error}. Send the whole file.") from None


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
        """Upright RGB picture of any size -> pixels float32 [1, 3, H, W] and its `Frame`.

        A graph with ``in_graph`` takes the picture unchanged: uint8 [height, width, 3]. Raises ValueError for a picture
        of another mode; `decode` returns RGB only.
        """
        if image.mode != "RGB":
            raise ValueError(f"the picture is {image.mode}; expected RGB")
        placement, frame = place(self.spec, *image.size)
        if self.spec.in_graph:
            return np.asarray(image, np.uint8), frame
        if self.spec.resample == "gaussian":
            pixels = square_to(image, self.spec.size, self.spec.pad)
            pixels *= self.gain
            pixels += self.bias
            return pixels[None], frame
        if self.library and self._suits_kernel(image, placement):
            return self._by_kernel(self.library, image, placement), frame
        chw = np.asarray(self._by_pillow(image, placement, frame), np.uint8).transpose(2, 0, 1)
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

    def _by_pillow(self, image: Image.Image, placement: Placement, frame: Frame) -> Image.Image:
        spec, (rows, cols) = self.spec, self.spec.size
        left, top = placement.left, placement.top
        if self._is_ribbon(placement):
            return self._ribbon(image, placement, frame)
        resized = self._resize(image, placement.width, placement.height)
        if resized.size == (cols, rows):
            return resized
        if spec.resize != "letterbox":
            return resized.crop((left, top, left + cols, top + rows))
        canvas = Image.new("RGB", (cols, rows), (spec.pad,) * 3)
        canvas.paste(resized)
        return canvas

    def _ribbon(self, image: Image.Image, placement: Placement, frame: Frame) -> Image.Image:
        """Resize only the part inside the graph's input, one axis at a time, in the same order as a whole picture."""
        (rows, cols), filter = self.spec.size, _RESAMPLE[self.spec.resample]
        down_first = columns_first(*image.size, placement.width, placement.height)
        left, right, width = source_range(placement.left, cols, frame.scale[0], image.width)
        top, bottom, height = source_range(placement.top, rows, frame.scale[1], image.height)
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


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImage("the picture has 0 bytes; expected a JPEG, PNG or WebP file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # Pillow's own limit, about five times MAX_PIXELS
        raise ImageTooLarge(
            f"the picture is not decoded: {error}; at most {max_pixels} pixels are. Scale it down."
        ) from None
    except Exception:  # a parser may raise anything on hostile bytes
        start = data[:4].hex(" ")
        raise BadImage(f"{len(data)} bytes starting {start} are no picture we read; send JPEG, PNG or WebP") from None
    if (pixels := image.width * image.height) > max_pixels:
        image.close()
        raise ImageTooLarge(
            f"the picture is {image.width} x {image.height} = {pixels} pixels; "
            f"at most {max_pixels} are decoded. Scale it down."
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Transposed by EXIF orientation; as stored if EXIF is absent, broken or invalid.

    `ImageOps.exif_transpose` is not used: it also rewrites the tags, and fails on a tag that it cannot write.
    """
    try:
        transpose = _TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken tags do not make the pixels unusable
        transpose = None
    if transpose is None:
        return image
    turned = image.transpose(transpose)
    turned.info = {key: value for key, value in turned.info.items() if key == "transparency"}  # no tag to turn it again
    return turned


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        grey = (np.asarray(image, np.uint32) + 128) // 257  # rounded to 0-255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")
