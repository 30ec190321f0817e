"""JPEG bytes -> upright RGB -> float32 [1, 3, H, W], and the frame that maps boxes back.

Equal to the reference processors (torchvision's PIL transforms, transformers' CLIPImageProcessor) because it
does what they do: Pillow's antialiased bicubic on uint8, then float32 arithmetic. With the op library its kernel
does both, some ten times as fast and with the same bits. What is resampled by a Gaussian, `models.preprocess.gaussian`
makes, as no kernel does.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import ExifTags, Image

from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.errors import BadImage, BadRequest, ImageTooLarge
from calmclip.models.flow import Array
from calmclip.models.ops import pixels as kernel
from calmclip.models.ops.library import Library
from calmclip.models.preprocess.gaussian import square_to
from calmclip.models.preprocess.memory import Band, in_bands, worth_it

FORMATS = ("JPEG", "PNG", "WEBP")
# A file, its bytes, or a picture in memory: one of Pillow's, or uint8 [height, width, 3], upright RGB.
Picture: TypeAlias = Path | bytes | Image.Image | Array
MAX_PIXELS = 40_000_000

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# EXIF orientation -> what makes the picture upright; 1 is upright already
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Header:
    """What a picture says of itself before it is decoded. ``width`` and ``height`` as stored, not upright."""

    format: str
    width: int
    height: int

    @property
    def pixels(self) -> int:
        return self.width * self.height


@dataclass(frozen=True)
class Frame:
    """How a picture of ``width`` x ``height`` pixels (upright) was placed in a graph's input.

    input = original * scale + offset, per axis (x, y).
    """

    width: int
    height: int
    scale: tuple[float, float]
    offset: tuple[float, float]

    def to_original(self, boxes: Array) -> Array:
        """float32 [N, 4] x0 y0 x1 y1 in the input's pixels -> in the original's, cut to the picture."""
        scale = np.array(self.scale * 2, np.float32)
        offset = np.array(self.offset * 2, np.float32)
        limit = np.array([self.width, self.height] * 2, np.float32)
        moved: Array = np.clip((boxes - offset) / scale, 0.0, limit).astype(np.float32)
        return moved

    def to_input(self, boxes: Array) -> Array:
        """The way back: float32 [N, 4] in the original's pixels -> in the input's."""
        moved: Array = boxes * np.array(self.scale * 2, np.float32) + np.array(self.offset * 2, np.float32)
        return moved.astype(np.float32)


def inspect(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Read the header only. Raises `BadImage` for anything but JPEG, PNG, WebP; `ImageTooLarge` over the limit."""
    with _open(data, max_pixels) as image:
        return _header(image)


def load(picture: Picture, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Any `Picture`, upright and as 8-bit RGB. Raises as `decode`; `BadRequest` for a file that cannot be read, an
    array of another dtype or shape, and what is no picture at all."""
    if isinstance(picture, bytes):
        return decode(picture, max_pixels=max_pixels)
    if isinstance(picture, Path):
        try:
            data = picture.read_bytes()
        except (OSError, ValueError) as error:
            raise BadRequest(f"the picture {str(picture)!r} cannot be read: {error}") from None
        return decode(data, max_pixels=max_pixels)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise BadRequest(f"the picture is {picture.dtype} {list(picture.shape)}; expected uint8 [height, width, 3]")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise BadRequest(
            f"the picture is a {type(picture).__name__}; expected a path, the bytes of a file, a picture of Pillow's, "
            "or uint8 [height, width, 3]"
        )
    if picture.width * picture.height > max_pixels:
        raise ImageTooLarge(
            f"the picture is {picture.width} x {picture.height} pixels; at most {max_pixels} are read. Scale it down."
        )
    return _rgb(_upright(picture))


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame, upright by its EXIF tag, as 8-bit RGB. Raises as `inspect` does, before it decodes.

    CMYK and palettes are converted; 16-bit grey is scaled, not clipped; transparent pixels come out as they
    look on white, as a page would show them. A colour profile is not applied, as the reference processors do.
    """
    with _open(data, max_pixels) as image:
        try:
            image.load()
            upright = _upright(image)
            return _rgb(upright)
        except Exception as error:  # whatever a decoder of hostile bytes trips over
            raise BadImage(f"the {image.format} picture is broken: {error}. Send the whole file.") from None


@dataclass(frozen=True)
class Placement:
    """Resized to ``width`` x ``height``; what lies from (``left``, ``top``) on fills the graph's input."""

    width: int
    height: int
    left: int = 0
    top: int = 0

    @property
    def pixels(self) -> int:
        return self.width * self.height


def place(spec: ImagePreprocess, width: int, height: int) -> tuple[Placement, Frame]:
    """Where a picture of ``width`` x ``height`` pixels comes to lie."""
    rows, cols = spec.size
    if spec.resize == "exact" or (spec.keep_square and width == height):
        return Placement(cols, rows), Frame(width, height, (cols / width, rows / height), (0.0, 0.0))
    if spec.resize == "square":
        square = max(width, height)
        return Placement(cols, rows), Frame(width, height, (cols / square, rows / square), (0.0, 0.0))
    if spec.resize == "letterbox":
        ratio = min(cols / width, rows / height)
        w, h = max(1, round(width * ratio)), max(1, round(height * ratio))
        return Placement(w, h), Frame(width, height, (w / width, h / height), (0.0, 0.0))
    assert spec.shortest is not None  # the manifest was validated
    short, long = sorted((width, height))
    longer = int(spec.shortest * long / short)
    w, h = (spec.shortest, longer) if width <= height else (longer, spec.shortest)
    left, top = _margin(spec, w - cols), _margin(spec, h - rows)
    return Placement(w, h, left, top), Frame(width, height, (w / width, h / height), (-float(left), -float(top)))


def columns_first(width: int, height: int, to_width: int, to_height: int) -> bool:
    """Whether the height is resized before the width: the order shows, for bytes between the two are rounded.

    It is that of Pillow 13: columns first where the height shrinks by more than twice what the width does. Older ones
    resize the width first, always.
    """
    return height > to_height and height - to_height > 2 * (width - to_width)


def normalisation(spec: ImagePreprocess) -> tuple[Array, Array]:
    """-> gain, bias float32 [3, 1, 1]: (x / 255 - mean) / std = x * gain + bias, worked out in float64."""
    mean, std = (np.array(three, np.float64).reshape(3, 1, 1) for three in (spec.mean, spec.std))
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


class ImagePreparer:
    """`ImagePreprocess` at work: by the kernel of ``library``, or by Pillow, which gives the same bits."""

    def __init__(self, spec: ImagePreprocess, library: Library | None = None) -> None:
        self.spec = spec
        self.library = library
        self.gain, self.bias = normalisation(spec)

    def prepare(self, image: Image.Image) -> tuple[Array, Frame]:
        """Upright RGB picture of any size -> pixels float32 [1, 3, H, W] and its `Frame`.

        For a graph that does this itself (``in_graph``) the picture stays as it is: uint8 [height, width, 3]. Raises
        ValueError for a picture of another mode, which `decode` gives none of.
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
        """Of what does not, Pillow makes the same, and sooner."""
        small = max(image.size) <= kernel.MAX_SIDE and not self._is_ribbon(placement)
        return small and worth_it(image, self._reach(image, placement))

    def _reach(self, image: Image.Image, placement: Placement) -> float:
        """How far from its centre, in source rows, an output row looks."""
        taps = 2 if self.spec.resample == "bicubic" else 1
        return taps * max(image.height / placement.height, 1.0) + 2  # two for what rounding adds

    def _is_ribbon(self, placement: Placement) -> bool:
        """So long that, resized whole, it would not fit in memory."""
        return placement.pixels > max(MAX_PIXELS, self.spec.size[0] * self.spec.size[1])

    def _by_kernel(self, library: Library, image: Image.Image, placement: Placement) -> Array:
        spec, (width, height) = self.spec, image.size
        resample = spec.resample
        assert resample != "gaussian"  # which is not the kernel's
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
        """Only what is seen, and the sides one by one, so that their order is that of the whole."""
        (rows, cols), how = self.spec.size, _RESAMPLE[self.spec.resample]
        down_first = columns_first(*image.size, placement.width, placement.height)
        left, right, width = _seen(placement.left, cols, frame.scale[0], image.width)
        top, bottom, height = _seen(placement.top, rows, frame.scale[1], image.height)
        image = image.crop((width.start, height.start, width.stop, height.stop))
        for down in (down_first, not down_first):
            size = (image.width, rows) if down else (cols, image.height)
            box = (0, top, image.width, bottom) if down else (left, 0, right, image.height)
            image = image.resize(size, how, box)
        return image

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """In two steps, so that their order does not hang on Pillow's version."""
        halfway = (image.width, height) if columns_first(*image.size, width, height) else (width, image.height)
        for size in (halfway, (width, height)):
            if size != image.size:
                image = image.resize(size, _RESAMPLE[self.spec.resample])
        return image


def _margin(spec: ImagePreprocess, spare: int) -> int:
    return spare // 2 if spec.crop_offset == "floor" else round(spare / 2.0)


def _seen(start: int, count: int, scale: float, side: int) -> tuple[float, float, range]:
    """The source samples that ``count`` outputs from ``start`` on are made of, and where the outputs lie in them."""
    low, high, reach = start / scale, (start + count) / scale, 2 * max(1 / scale, 1.0) + 2
    within = range(max(int(low - reach), 0), min(int(high + reach) + 1, side))
    return low - within.start, min(high, side) - within.start, within


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImage("the picture has 0 bytes; expected a JPEG, PNG or WebP file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # Pillow's own guard, some five times above MAX_PIXELS
        raise ImageTooLarge(
            f"the picture is not decoded: {error}; at most {max_pixels} pixels are. Scale it down."
        ) from None
    except Exception:  # whatever a parser of hostile bytes trips over
        start = data[:4].hex(" ")
        raise BadImage(f"{len(data)} bytes starting {start} are no picture we read; send JPEG, PNG or WebP") from None
    header = _header(image)
    if header.pixels > max_pixels:
        image.close()
        raise ImageTooLarge(
            f"the picture is {header.width} x {header.height} = {header.pixels} pixels; "
            f"at most {max_pixels} are decoded. Scale it down."
        )
    return image


def _header(image: Image.Image) -> Header:
    return Header(str(image.format), *image.size)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says; as stored where EXIF is absent, broken or says nonsense.

    Not `ImageOps.exif_transpose`: it also writes the tags anew, and fails on what it cannot write.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken tags are no reason to refuse whole pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        grey = (np.asarray(image, np.uint32) + 128) // 257  # to the nearest of 0-255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")
