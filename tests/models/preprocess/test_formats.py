"""Which parser reads which bytes, what each format looks like, and what a header may claim."""

import io
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from calmclip.models.errors import BadImage, ImageTooLarge
from calmclip.models.preprocess import formats
from calmclip.models.preprocess.formats import FORMATS, MOST_ENTRIES, MOST_TILES, opened
from calmclip.models.preprocess.image import count_pixels, decode, load, upright_size

CAT = Path(__file__).parents[3] / "export" / "samples" / "cat.jpg"
LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}}
LOSSY: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "AVIF": {"quality": 90, "speed": 10},
    "HEIF": {"quality": 90},
}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def save(image: Image.Image, format: str, **options: Any) -> bytes:
    if format == "HEIF":
        pytest.importorskip("pillow_heif.HeifImagePlugin")
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exact(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("format", LOSSLESS)
def test_the_pixels_of_lossless_formats(format: str):
    assert np.array_equal(exact(save(noise(33, 21), format, **LOSSLESS[format])), np.asarray(noise(33, 21)))


@pytest.mark.parametrize("format", LOSSY)
def test_the_pixels_of_lossy_formats(format: str):
    picture = Image.open(CAT)
    data = save(picture, format, **LOSSY[format])
    assert np.abs(exact(data).astype(int) - np.asarray(picture)).mean() < 3
    assert count_pixels(data) == picture.width * picture.height


def test_every_format_of_the_table_is_tested():
    assert {*LOSSLESS, *LOSSY, "GIF"} == {*FORMATS}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_exif_turns_the_picture_upright(format: str, orientation: int):
    """The quarters have four grey levels, so that each way to turn them is another picture. Pillow's own way turns what
    it opens; of a HEIC, whose boxes turn it, the picture before is turned."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    quarters = Image.fromarray(np.kron(np.array([[10, 90], [170, 250]], np.uint8), np.ones((32, 64), np.uint8)))
    quarters = quarters.convert("RGB")
    data = save(quarters, format, exif=tags.tobytes(), **(LOSSLESS | LOSSY)[format])
    quarters.getexif()[0x0112] = orientation
    wanted = np.asarray(ImageOps.exif_transpose(quarters), int)
    assert np.abs(exact(data) - wanted).mean() < 3
    assert exact(data).shape == wanted.shape
    assert upright_size(data) == (wanted.shape[1], wanted.shape[0])
    assert np.array_equal(np.asarray(load(decode(data))), exact(data))  # a decoded picture is not turned again


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "MPO"])
def test_the_first_frame_or_page(format: str):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
    data = save(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(exact(data).astype(int) - [255, 0, 0]).max() <= 3
    assert count_pixels(data) == 64 * 64


def test_a_gif_has_a_palette_and_may_be_clear_in_places():
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    assert exact(save(picture, "GIF")).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert exact(save(picture, "GIF", transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize("format", ["AVIF", "HEIF", "TIFF"])
def test_alpha_is_composed_over_white(format: str):
    rgba = Image.new("RGBA", (64, 64), (0, 0, 0, 51))  # 51 / 255 = 0.2 of black on white: 204
    assert np.abs(exact(save(rgba, format)).astype(int) - 204).max() <= 2


def test_numbers_of_a_tiff():
    values = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], np.uint16)
    assert exact(save(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]
    big = save(Image.fromarray(values.astype(">u2")), "TIFF")
    assert exact(big)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]
    assert exact(save(Image.fromarray(values.astype(np.int32)), "TIFF"))[0, :, 0].tolist() == [
        0,
        0,
        1,
        1,
        128,
        254,
        255,
    ]
    for wrong, says in ((values.astype(np.int32) * 2, "0 to 65535"), (values.astype(np.float32), "floating point")):
        with pytest.raises(BadImage, match=f"TIFF picture is broken: it holds numbers .*{says}.*8 or 16 bits"):
            decode(save(Image.fromarray(wrong), "TIFF"))
    cmyk = exact(save(Image.open(CAT).convert("CMYK"), "TIFF")).astype(int)
    assert np.abs(cmyk - np.asarray(Image.open(CAT))).mean() < 3


@pytest.mark.parametrize("format", ["PPM", "ICO", "JPEG2000", "TGA", "EPS"])
def test_other_formats_are_refused(format: str):
    says = "are no picture we read; send JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
    with pytest.raises(BadImage, match=says):
        decode(save(noise(16, 16), format))


def test_only_plug_ins_of_the_table_are_imported():
    """In a process of its own. Bytes of the first format import one; unknown bytes those of the table. Pillow's own
    `Image.open` would import all."""
    code = (
        "import sys; from calmclip.models.preprocess.image import decode;"
        f"decode(open({str(CAT)!r}, 'rb').read())\n"
        "names = lambda: sorted(name for name in sys.modules if 'ImagePlugin' in name)\n"
        "print(names())\ntry: decode(b'\\0' * 99)\nexcept Exception: print(names())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, every = (eval(line) for line in done.stdout.splitlines())
    listed = {format.module for format in FORMATS.values()}
    needed = {"PIL.MpoImagePlugin"}  # of a JPEG with several pictures; the modules below are imported by others
    assert {*first} <= {"PIL.JpegImagePlugin", "PIL.TiffImagePlugin"} | needed
    assert {*every} <= listed | needed | {"PIL.GifImagePlugin", "PIL.PngImagePlugin"}


@pytest.mark.parametrize(
    ("brand", "name", "package"),
    [(b"heic", "HEIC", "pillow-heif"), (b"mif1", "HEIC", "pillow-heif"), (b"avif", "AVIF", "Pillow")],
)
def test_a_format_that_is_not_installed_is_named_with_its_package(monkeypatch, brand: bytes, name: str, package: str):
    plugin = formats._plugin
    monkeypatch.setattr(formats, "_plugin", lambda format: None if format in ("HEIF", "AVIF") else plugin(format))
    for read in (count_pixels, decode, upright_size):
        with pytest.raises(BadImage, match=f"it is a {name} picture.*{package}.*pip install {package}.*another format"):
            read(struct.pack(">I4s4s", 24, b"ftyp", brand) + bytes(100))


# --- what a header may claim ----------------------------------------------------------------------------------------


def tiff(*entries: tuple[int, int, int, int], order: str = "<", tail: bytes = b"") -> bytes:
    """A TIFF of one directory: tag, type, count, value."""
    head = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    return head + b"".join(struct.pack(order + "HHII", *entry) for entry in entries) + bytes(4) + tail


GREY = ((258, 3, 1, 8), (259, 4, 1, 1), (262, 4, 1, 1), (277, 4, 1, 1))


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tile_that_is_far_larger_than_its_picture(order: str):
    size = ((256, 4, 1, 16), (257, 4, 1, 16))
    tiles = ((322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 8), (325, 4, 1, 9))
    with pytest.raises(BadImage, match="16 x 16 pixels has tiles of 60000 x 60000; use smaller tiles"):
        opened(tiff(*size, *tiles, order=order))
    twice = ((322, 4, 1, 16), (323, 4, 1, 16))  # a parser takes the first or the last
    for entries in ((*size, *twice, *tiles), (*size, *tiles, *twice)):
        with pytest.raises(BadImage, match="use smaller tiles"):
            opened(tiff(*entries, order=order))


def test_strips_and_entries_without_end():
    """32 MB of offsets would become gigabytes of objects."""
    size = ((256, 4, 1, 1), (257, 4, 1, 8_000_000), (278, 4, 1, 1))
    for tag in (273, 324):
        with pytest.raises(BadImage, match=f"8000000 strips or tiles; at most {MOST_TILES} are read"):
            opened(tiff(*size, *GREY, (tag, 4, 8_000_000, 200), tail=bytes(4000)))
    with pytest.raises(BadImage, match=f"a directory of 60000 entries; at most {MOST_ENTRIES}"):
        opened(struct.pack("<2sHIH", b"II", 42, 8, 60_000) + bytes(720_000))
    big = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 1 << 40)
    with pytest.raises(BadImage, match="entries"):
        opened(big + bytes(100))
    for place in (1 << 63, (1 << 64) - 1, 1 << 20):  # the directory lies outside
        with pytest.raises(BadImage, match="no picture we read"):
            opened(struct.pack("<2sHHHQ", b"II", 43, 8, 0, place) + bytes(100))


def test_a_header_of_very_many_parts_is_refused():
    """Each is a step of Python, before any limit of pixels."""
    picture = noise(8, 8)
    jpeg, png = save(picture, "JPEG"), save(picture, "PNG")
    empty = struct.pack(">I4sI", 0, b"teSt", zlib.crc32(b"teSt"))
    for data in (
        jpeg[:2] + b"\xff\xe5\0\2" * 9000 + jpeg[2:],
        jpeg[:2] + b"\xff" * 9000 + jpeg[2:],
        png[:33] + empty * 9000 + png[33:],
    ):
        with pytest.raises(BadImage, match="more than 8192 parts; save it without its metadata"):
            count_pixels(data)
    assert np.array_equal(exact(png[:33] + empty * 2000 + png[33:]), np.asarray(picture))
    behind = png[:-12] + empty * 9000 + png[-12:]  # read when the picture is decoded, which the event loop does not do
    assert np.array_equal(exact(behind), np.asarray(picture))


def test_a_tiff_that_claims_too_many_pixels():
    with pytest.raises(ImageTooLarge, match="60000 x 60000"):
        count_pixels(tiff((256, 4, 1, 60_000), (257, 4, 1, 60_000), *GREY, (273, 4, 1, 8), (279, 4, 1, 9)))


def test_the_sizes_of_avif_and_heic_are_read_from_the_header():
    """A size in the box `ispe` that the stream does not have: too large before a pixel is decoded."""
    for format in ("AVIF", "HEIF"):
        data = bytearray(save(noise(64, 64), format))
        at = data.index(b"ispe") + 8
        data[at : at + 8] = struct.pack(">II", 16_000, 16_000)
        with pytest.raises(ImageTooLarge, match="16000 x 16000"):
            count_pixels(bytes(data))


def test_a_heic_that_shows_a_small_part_of_what_is_decoded():
    data = save(noise(64, 64), "HEIF")
    extent = struct.pack(">I4sIII", 20, b"ispe", 0, 4096, 1024)  # behind the boxes, where libheif does not look
    assert exact(data + extent).shape == (64, 64, 3)
    with pytest.raises(BadImage, match="64 x 64 pixels of 4198400; save the part"):
        count_pixels(data + extent + struct.pack(">I4sIII", 20, b"ispe", 0, 4100, 1024))


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}), ("AVIF", {"speed": 10}), ("HEIF", {}),
    ],
)  # fmt: skip
def test_a_truncated_file_is_refused_or_complete(format: str, options: dict[str, Any]):
    """A TIFF without its directory is broken; one whose strips end early may be, too. AVIF and GIF may end early."""
    content = save(Image.open(CAT).resize((60, 40)), format, **options)
    whole = exact(content)
    for length in [*range(1, 40), *range(40, len(content) - 12, max(1, len(content) // 40))]:
        with suppress(BadImage):
            assert exact(content[:length]).shape == whole.shape
    for length in (len(content) // 4, len(content) // 2):
        with pytest.raises(BadImage):
            decode(content[:length])
