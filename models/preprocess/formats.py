"""The formats of pictures: one table, and bytes -> an open Pillow picture of which only the header is read.

The bytes choose the format; a name or a content type does not. A plug-in of Pillow is imported when bytes get as far as
its format, and no plug-in outside of the table is ever asked: each one is a parser that strangers could reach.
"""

import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from struct import Struct, calcsize, unpack_from
from struct import error as StructError
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO

from calmclip.models.errors import BadImage, ImageTooLarge

if TYPE_CHECKING:  # the table is read where no picture is
    from PIL import Image

# Of a header. Pillow parses one part after another in Python, and the service does so on its event loop: 32 MB of empty
# parts would take 10 s, these take .01 s. A photograph has some hundreds at most.
MOST_READS = 1 << 13
# What a TIFF's directory may claim: Pillow lists all strips and tiles, and libtiff takes memory for one whole tile. A
# picture of 48 megapixels in tiles of 64 x 64 has 12,000.
MOST_ENTRIES = 1 << 10
MOST_TILES = 1 << 16
LARGEST_TILE = 1 << 22  # pixels, unless the picture has a quarter of the tile's; also of what a HEIC shows a part of
_WIDTH, _HEIGHT, _STRIPS, _TILE_WIDTH, _TILE_HEIGHT, _TILES = 256, 257, 273, 322, 323, 324  # tags of TIFF 6.0
_EXTENT, _SIZE = re.compile(rb"\0\0\0\x14ispe\0{4}(.{8})", re.DOTALL), Struct(">II")  # ISO/IEC 23008-12, 6.5.3
_BRANDS = {  # of the box `ftyp`, ISO/IEC 14496-12
    "HEIF": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"),
    "AVIF": (b"avif", b"avis"),
}


@dataclass(frozen=True)
class Format:
    """``name``: in messages. ``content_types``: the registered one, followed by others that clients send.
    ``suffixes``: of files. ``module``: registers the plug-in. ``needs``: the package that has it, for an error; the
    extra of calmclip that brings it has the format's name."""

    name: str
    content_types: tuple[str, ...]
    suffixes: tuple[str, ...]
    module: str
    needs: str = "Pillow 11.3 or newer"


# Pillow's name -> the format, in the order in which bytes are tried. Frequent ones stand first.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "JPEG": Format("JPEG", ("image/jpeg", "image/jpg"), (".jpg", ".jpeg", ".jfif"), "PIL.JpegImagePlugin"),
        "PNG": Format("PNG", ("image/png",), (".png",), "PIL.PngImagePlugin"),
        "WEBP": Format("WebP", ("image/webp",), (".webp",), "PIL.WebPImagePlugin"),
        "GIF": Format("GIF", ("image/gif",), (".gif",), "PIL.GifImagePlugin"),
        "BMP": Format("BMP", ("image/bmp", "image/x-ms-bmp"), (".bmp",), "PIL.BmpImagePlugin"),
        "TIFF": Format("TIFF", ("image/tiff",), (".tif", ".tiff"), "PIL.TiffImagePlugin"),
        "AVIF": Format("AVIF", ("image/avif",), (".avif",), "PIL.AvifImagePlugin"),
        "HEIF": Format(
            "HEIC",
            ("image/heic", "image/heif"),
            (".heic", ".heif", ".hif"),
            "pillow_heif.HeifImagePlugin",
            "pillow-heif (calmclip's extra heic)",
        ),
    }
)
_NAMES = [format.name for format in FORMATS.values()]
NAMES = f"{', '.join(_NAMES[:-1])} or {_NAMES[-1]}"  # in messages
SUFFIXES = tuple(suffix for format in FORMATS.values() for suffix in format.suffixes)


def opened(data: bytes) -> "Image.Image":
    """The picture with its size and tags; no pixel is decoded. Pillow's own limit on pixels does not count, so the
    caller checks the size.

    Raises `BadImage` for bytes of no format of the table, and of one that is not installed; `ImageTooLarge` for a frame
    of a GIF that is larger than Pillow's limit.
    """
    from PIL import Image

    if not data:
        raise BadImage(f"the picture has 0 bytes; expected a {NAMES} file")
    for name in FORMATS:
        if not (plugin := _plugin(name)) or plugin.accepts(data[:16]) is not True:
            continue
        if name == "TIFF":
            _check_directory(data)
        file = _File(data)
        try:
            image = plugin.open(file, "")
        except BadImage:
            raise
        except Image.DecompressionBombError as error:
            raise ImageTooLarge(f"the picture is not decoded: {error}. Scale it down.") from None
        except Exception:  # a parser may raise anything on hostile bytes; another format may have the same signature
            continue
        if name == "HEIF":
            _check_extent(image, data)
        file.left = math.inf
        return image
    raise BadImage(_unreadable(data))


class _File(io.BytesIO):
    """Counts reads while a header is parsed. Raises `BadImage`."""

    left: float = MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise BadImage(f"the header of the picture has more than {MOST_READS} parts; save it without its metadata")
        return super().read(size)


@dataclass(frozen=True)
class _Plugin:
    """Pillow's functions of a format. ``accepts``: whether a file may begin with these bytes; a text says why not."""

    open: Callable[[BinaryIO, str], "Image.Image"]
    accepts: Callable[[bytes], bool | str]


@cache
def _plugin(name: str) -> _Plugin | None:
    """None if the plug-in is not installed."""
    from PIL import Image

    try:
        import_module(FORMATS[name].module)
    except (ImportError, OSError):  # OSError: a library of it does not load
        return None
    functions = Image.OPEN.get(name)
    return _Plugin(*functions) if functions and functions[1] else None  # type: ignore[arg-type]  # Pillow lists a class


def _unreadable(data: bytes) -> str:
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    for name, brands in _BRANDS.items():
        plugin, format = _plugin(name), FORMATS[name]
        if brand in brands and not (plugin and plugin.accepts(data[:16]) is True):
            return (
                f"it is a {format.name} picture, and to read those the package {format.needs} has to be installed "
                f"where pictures are decoded: pip install {format.needs.partition(' ')[0]}. Or send another format"
            )
    return f"{len(data)} bytes starting {data[:4].hex(' ')} are no picture we read; send {NAMES}"


def _check_extent(image: "Image.Image", data: bytes) -> None:
    """Raises `BadImage` for a HEIC that shows a small part of what is decoded: its size is told after a crop (`clap`).

    A box `ispe` has the size of what is decoded, which libheif compares with the stream.
    """
    shown = image.width * image.height
    coded = max((w * h for w, h in map(_SIZE.unpack, _EXTENT.findall(data))), default=0)
    if coded > max(LARGEST_TILE, 4 * shown):
        raise BadImage(
            f"the HEIC picture shows {image.width} x {image.height} pixels of {coded}; save the part as a picture"
        )


def _check_directory(data: bytes) -> None:
    """Raises `BadImage` for a TIFF whose first directory claims more strips or larger tiles than a picture needs.

    A tag may stand there twice, and parsers disagree on the one that counts, so the worst counts here.
    """
    counts, values = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
    for tag, count, value in _entries(data):
        counts[tag].append(count)
        values[tag].append(value)
    if (count := max(*counts[_STRIPS], *counts[_TILES], 0, 0)) > MOST_TILES:
        raise BadImage(f"the TIFF picture has {count} strips or tiles; at most {MOST_TILES} are read")
    width, height = (min(values[tag], default=0) for tag in (_WIDTH, _HEIGHT))
    wide, high = (max(values[tag], default=0) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
    if wide * high > max(LARGEST_TILE, 4 * width * height):
        raise BadImage(f"the TIFF picture of {width} x {height} pixels has tiles of {wide} x {high}; use smaller tiles")


def _entries(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Of the first directory of a TIFF: tag, number of values, and the value if it is one whole number. Raises
    `BadImage` for more than `MOST_ENTRIES`."""
    order, big = "<" if data[:1] == b"I" else ">", 43 in data[2:4]
    head, count, entry = ("8xQ", "Q", "HHQ8s") if big else ("4xI", "H", "HHI4s")
    try:
        (place,) = unpack_from(order + head, data)
        (number,) = unpack_from(order + count, data, place)
        if number > MOST_ENTRIES:
            raise BadImage(f"the TIFF picture has a directory of {number} entries; at most {MOST_ENTRIES} are read")
        at, size = place + calcsize(order + count), calcsize(order + entry)
        for index in range(number):
            tag, kind, values, field = unpack_from(order + entry, data, at + index * size)
            number_kind = {3: "H", 4: "I", 16: "Q" if big else "I"}.get(kind, "B")
            (value,) = unpack_from(order + number_kind, field)
            yield tag, values, value
    except (StructError, OverflowError):  # cut, or it points outside: Pillow says so
        return
