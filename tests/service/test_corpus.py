"""More than two thousand broken and unusual pictures, the same in each run: each gets an answer, none a 5xx."""

import gc
import io
import random
import resource
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from calmclip.models.errors import InputError
from calmclip.models.preprocess.formats import FORMATS
from calmclip.models.preprocess.image import decode

SEED = 5
EACH = 66  # mutations of one picture
READ = {name.lower() for name in FORMATS}
SIZES = (0, 1, 2, 255, 4096, 16383, 16384, 65535, 0x7FFFFFFF, 0xFFFFFFFF)


def saved(image: Image.Image, kind: str, **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def originals() -> dict[str, bytes]:
    """Small pictures: every supported format in each of its modes, and some unsupported formats."""
    heif = has_heif()
    noise = np.random.default_rng(SEED).integers(0, 256, (21, 33, 4), np.uint8)
    rgba = Image.fromarray(noise, "RGBA")
    rgb = rgba.convert("RGB")
    palette = rgb.quantize(16)
    grey16 = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    frames = [rgb.rotate(90 * turn) for turn in (1, 2)]
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "jpeg": saved(rgb, "JPEG"),
        "jpeg progressive": saved(rgb, "JPEG", progressive=True, subsampling=0),
        "jpeg grey": saved(rgb.convert("L"), "JPEG"),
        "jpeg cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "jpeg turned": saved(rgb, "JPEG", exif=turned),
        "png": saved(rgb, "PNG"),
        "png alpha": saved(rgba, "PNG"),
        "png grey alpha": saved(rgba.convert("LA"), "PNG"),
        "png palette": saved(palette, "PNG"),
        "png palette, one colour clear": saved(palette, "PNG", transparency=3),
        "png one bit": saved(rgb.convert("1"), "PNG"),
        "png 16 bits": saved(grey16, "PNG"),
        "png moving": saved(rgb, "PNG", save_all=True, append_images=frames),
        "webp": saved(rgb, "WEBP"),
        "webp lossless": saved(rgb, "WEBP", lossless=True),
        "webp alpha": saved(rgba, "WEBP", exif=turned),
        "webp moving": saved(rgb, "WEBP", save_all=True, append_images=frames, duration=50),
        "gif": saved(palette, "GIF"),
        "gif moving, one colour clear": saved(palette, "GIF", save_all=True, append_images=frames, transparency=3),
        "bmp": saved(rgb, "BMP"),
        "bmp palette": saved(palette, "BMP"),
        "bmp alpha": saved(rgba, "BMP"),
        "tiff": saved(rgb, "TIFF"),
        "tiff lzw, turned, two pages": saved(
            rgb, "TIFF", compression="tiff_lzw", exif=turned, save_all=True, append_images=frames
        ),
        "tiff deflate, 16 bits": saved(grey16, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": saved(rgb, "TIFF", compression="jpeg"),
        "tiff cmyk": saved(rgb.convert("CMYK"), "TIFF", compression="packbits"),
        "tiff alpha": saved(rgba, "TIFF", tiffinfo={338: 2}),
        "avif": saved(rgb, "AVIF", speed=10, exif=turned.tobytes()),
        "avif alpha, moving": saved(rgba, "AVIF", speed=10, save_all=True, append_images=[rgba.rotate(180)]),
        **({"heif": saved(rgb, "HEIF", exif=turned.tobytes()), "heif alpha": saved(rgba, "HEIF")} if heif else {}),
        "ppm": saved(rgb, "PPM"),
        "ico": saved(rgb.resize((32, 32)), "ICO"),
    }


def has_heif() -> bool:
    """Whether the extra `heic` is installed. The import registers the encoder."""
    try:
        import pillow_heif.HeifImagePlugin  # noqa: F401
    except ImportError:
        return False
    return True


def png_mended(data: bytes) -> bytes:
    """The PNG with the right checksum on each chunk, so that a decoder does not stop there."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + length]
        out += struct.pack(">I", length) + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out)


def resized(data: bytes, width: int, height: int) -> bytes:
    """The picture with another size in its header and the same pixels."""
    out = bytearray(data)
    if data[:4] == b"\x89PNG":
        struct.pack_into(">II", out, 16, width, height)
        return png_mended(bytes(out))
    if data[:2] == b"\xff\xd8":
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))  # baseline or progressive
        struct.pack_into(">HH", out, at + 5, height & 0xFFFF, width & 0xFFFF)
    elif data[:3] == b"GIF":
        struct.pack_into("<HH", out, 6, width & 0xFFFF, height & 0xFFFF)
    elif data[:2] == b"BM":
        struct.pack_into("<II", out, 18, width, height)
    elif data[:4] == b"II*\0":
        for tag, value in ((256, width), (257, height)):  # in the first directory, as a long number
            for at in range(8, len(data) - 11):
                if struct.unpack_from("<HH", data, at) in ((tag, 3), (tag, 4)):
                    struct.pack_into("<HHII", out, at, tag, 4, 1, value)
                    break
    elif b"ispe" in data:
        at = -1
        while (at := data.find(b"ispe", at + 1)) >= 0:
            struct.pack_into(">II", out, at + 8, width, height)
    elif data[12:16] == b"VP8 ":
        struct.pack_into("<HH", out, 26, width & 0x3FFF, height & 0x3FFF)
    elif data[12:16] == b"VP8L":
        struct.pack_into("<I", out, 21, (width & 0x3FFF) | (height & 0x3FFF) << 14)
    elif data[12:16] == b"VP8X":
        out[24:30] = struct.pack("<I", width & 0xFFFFFF)[:3] + struct.pack("<I", height & 0xFFFFFF)[:3]
    return bytes(out)


def mutated(data: bytes, others: list[bytes], dice: random.Random) -> bytes:
    out = bytearray(data)
    at, length = dice.randrange(len(out)), dice.randrange(1, 64)
    kind = dice.randrange(9)
    if kind == 0:
        del out[at:]
    elif kind == 1:
        for _ in range(dice.choice((1, 3, 20))):
            out[dice.randrange(len(out))] ^= 1 << dice.randrange(8)
    elif kind == 2:  # in the header
        for _ in range(dice.choice((1, 3))):
            out[dice.randrange(min(64, len(out)))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
    elif kind == 3:
        return resized(data, dice.choice(SIZES), dice.choice(SIZES))
    elif kind == 4:
        del out[at : at + length]
    elif kind == 5:
        out[at:at] = dice.randbytes(length)
    elif kind == 6:
        out[at : at + length] = out[:length]
    elif kind == 7:
        other = dice.choice(others)
        out[at:] = other[dice.randrange(len(other)) :]
    else:
        out[at : at + 4] = struct.pack(dice.choice("<>") + "I", dice.choice(SIZES))
    return png_mended(bytes(out)) if data[:4] == b"\x89PNG" and dice.random() < 0.7 else bytes(out)


def corpus() -> Iterator[tuple[str, bytes]]:
    dice = random.Random(SEED)
    known = originals()
    for name, data in known.items():
        yield name, data
        for number in range(EACH):
            yield f"{name} {number}", mutated(data, list(known.values()), dice)
    for kind in ("png", "jpeg", "webp", "webp lossless", "webp moving", "gif", "bmp", "tiff", "avif", "heif"):
        if kind in known:
            yield f"{kind} bomb", resized(known[kind], 16383, 16383)


def test_each_is_answered_and_none_with_a_5xx(client):
    pictures = list(corpus())
    assert len({data for _, data in pictures}) >= 2000
    kinds = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
    answers = {}
    for number, (name, data) in enumerate(pictures):
        headers = {"content-type": kinds[number % 4]}  # the service ignores the declared type
        answers[name] = client.post("/v1/classify?labels=red", content=data, headers=headers)
    assert {name for name, answer in answers.items() if answer.status_code not in (200, 413, 415)} == set()
    for name in originals():
        read = name.split()[0] in READ
        assert answers[name].status_code == (200 if read else 415), name
    bombs = {name: answer.status_code for name, answer in answers.items() if name.endswith("bomb")}
    assert bombs.pop("heif bomb", 415) == 415  # libheif compares the size with that in the stream
    assert {*bombs.values()} == {413}
    count = Counter(answer.status_code for answer in answers.values())
    assert all(count[status] >= 50 for status in (200, 413, 415)), count  # it reaches the decoders and all checks
    assert client.get("/readyz").status_code == 200


@pytest.mark.slow
def test_no_decoder_leaks():
    """The second to fifth time that the corpus is decoded takes no more memory than the first."""
    pictures = [data for _, data in corpus()]

    def grown() -> int:
        for data in pictures:
            with suppress(InputError):
                decode(data, max_pixels=1_000_000)
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() >> 20

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = grown()
        later = [grown() for _ in range(4)]
    assert later[-1] - first <= 8, (first, later)  # MB
