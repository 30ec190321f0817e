"""Pixels against the reference processors, all kinds of files, and boxes to the input and back."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.errors import BadImage, ImageTooLarge
from calmclip.models.preprocess.image import (
    MAX_PIXELS,
    ImagePreparer,
    count_pixels,
    decode,
    load,
    normalisation,
    upright_size,
    whole_size,
)
from calmclip.models.preprocess.placement import Frame

ASSETS = Path(__file__).parents[3] / "export" / "samples"
PHOTOGRAPHS = sorted(ASSETS.glob("*.jpg"))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Radford et al. 2021
SHAPES = [(640, 480), (480, 640), (333, 500), (501, 333), (224, 224), (225, 224), (1, 300), (300, 1), (7, 5), (1, 1)]


def clip(**changes: Any) -> ImagePreprocess:
    return ImagePreprocess(**{"size": (224, 224), "shortest": 224, "mean": MEAN, "std": STD} | changes)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise has every frequency, so it shows errors of a resize."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def save(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pictures() -> list[Any]:
    shapes = [pytest.param(noise(*shape), id="x".join(map(str, shape))) for shape in SHAPES]
    return shapes + [pytest.param(Image.open(path).convert("RGB"), id=path.stem) for path in PHOTOGRAPHS]


def bytes_of(pixels: np.ndarray, spec: ImagePreprocess) -> np.ndarray:
    """-> uint8 [3, H, W]: the pixels before normalisation."""
    mean, std = (np.array(v, np.float64).reshape(3, 1, 1) for v in (spec.mean, spec.std))
    grey = (pixels[0].astype(np.float64) * std + mean) * 255
    assert np.abs(grey - np.rint(grey)).max() < 1e-3
    return np.rint(grey).astype(np.uint8)


# --- the references -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", pictures())
def test_equal_to_torchvision_and_open_clip(picture: Image.Image):
    from open_clip.transform import image_transform
    from torchvision import transforms as tv

    placed = tv.Compose([tv.Resize(224, tv.InterpolationMode.BICUBIC, antialias=True), tv.CenterCrop(224)])(picture)
    normal = image_transform(224, is_train=False, mean=MEAN, std=STD)(picture).numpy()
    pixels, _ = ImagePreparer(clip()).prepare(picture)
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    assert np.array_equal(bytes_of(pixels, clip()), np.asarray(placed).transpose(2, 0, 1))
    assert np.abs(pixels[0] - normal).max() <= 1e-6


@pytest.mark.parametrize("picture", pictures())
def test_equal_to_transformers(picture: Image.Image):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}, image_mean=MEAN, image_std=STD
    )
    spec = clip(crop_offset="floor")
    expected = processor(picture, return_tensors="np")["pixel_values"][0]
    pixels, _ = ImagePreparer(spec).prepare(picture)
    assert np.array_equal(bytes_of(pixels, spec), bytes_of(expected[None], spec))
    assert np.abs(pixels[0] - expected).max() <= 1e-6


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_exact_is_a_plain_resize(resample: str):
    """The preprocessing of SigLIP and OWL-ViT: both sides become the size, without a crop."""
    from torchvision import transforms as tv

    spec = clip(size=(48, 64), resize="exact", resample=resample, mean=(0.5,) * 3, std=(0.5,) * 3)
    mode = {"bicubic": tv.InterpolationMode.BICUBIC, "bilinear": tv.InterpolationMode.BILINEAR}[resample]
    expected = np.asarray(tv.Resize((48, 64), mode, antialias=True)(noise(100, 30)))
    pixels, frame = ImagePreparer(spec).prepare(noise(100, 30))
    assert np.array_equal(bytes_of(pixels, spec), expected.transpose(2, 0, 1))
    assert frame == Frame(100, 30, (0.64, 1.6), (0.0, 0.0))


def test_letterbox_keeps_the_shape_and_pads():
    spec = clip(size=(64, 64), resize="letterbox", pad=114, mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels, frame = ImagePreparer(spec).prepare(noise(128, 50))
    grey = bytes_of(pixels, spec).transpose(1, 2, 0)
    assert np.array_equal(grey[:25], np.asarray(noise(128, 50).resize((64, 25), Image.Resampling.BICUBIC)))
    assert (grey[25:] == 114).all()
    assert frame == Frame(128, 50, (0.5, 0.5), (0.0, 0.0))


def test_keep_square_does_not_crop_a_square():
    preparer = ImagePreparer(clip(size=(32, 32), shortest=40, keep_square=True, mean=(0.0,) * 3, std=(1.0,) * 3))
    square, frame = preparer.prepare(noise(64, 64))
    expected = np.asarray(noise(64, 64).resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(bytes_of(square, preparer.spec), expected)
    assert frame.scale == (0.5, 0.5)
    assert ImagePreparer(clip(size=(32, 32), shortest=40)).prepare(noise(64, 64))[1].offset == (-4.0, -4.0)
    assert preparer.prepare(noise(64, 80))[1].offset == (-4.0, -9.0)  # the middle 32 x 32 of 40 x 50


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1), (3, 3_000_000)])
def test_only_the_visible_part_of_a_ribbon_is_resized(size: tuple[int, int]):
    """The whole resized picture would not fit into memory. The middle of a ramp is middle grey."""
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    grey = np.broadcast_to(ramp, (size[0], max(size))) if size[0] < size[1] else np.broadcast_to(ramp, (1, size[0]))
    picture = Image.fromarray(np.ascontiguousarray(grey.T if size[0] < size[1] else grey)).convert("RGB")
    assert picture.size == size
    pixels, frame = ImagePreparer(clip(mean=(0.0,) * 3, std=(1.0,) * 3)).prepare(picture)
    assert np.abs(pixels * 255 - 127.5).max() <= 1.0
    assert frame.width, frame.height == size


def test_a_ribbon_equals_a_crop_of_the_whole_resize(monkeypatch: pytest.MonkeyPatch):
    picture = Image.open(ASSETS / "cat.jpg").resize((20, 900))
    preparer = ImagePreparer(clip(size=(32, 32), shortest=32))
    expected, frame = preparer.prepare(picture)
    monkeypatch.setattr("calmclip.models.preprocess.image.MAX_PIXELS", 100)
    part, same = preparer.prepare(picture)
    assert same == frame
    step = np.abs(bytes_of(expected, preparer.spec).astype(int) - bytes_of(part, preparer.spec))
    assert step.max() <= 2  # Pillow may resize the axes in the other order


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
@pytest.mark.parametrize("in_graph", [False, True])
def test_other_modes_than_rgb_are_refused(mode: str, in_graph: bool):
    """Some of these modes have 4 bytes a pixel, like RGB in Pillow."""
    with pytest.raises(ValueError, match=f"the picture is {mode}; expected RGB"):
        ImagePreparer(clip(in_graph=in_graph)).prepare(Image.new(mode, (300, 200)))


# --- frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"size": (96, 96), "shortest": 120},
        {"size": (96, 96), "shortest": 97, "crop_offset": "floor"},
        {"size": (80, 120), "resize": "exact"},
        {"size": (128, 128), "resize": "letterbox"},
        {"size": (320, 320), "resize": "letterbox", "resample": "bilinear"},
    ],
)
@pytest.mark.parametrize("size", [(160, 120), (120, 160), (200, 150), (131, 97), (64, 64)])
def test_a_box_is_mapped_back_to_its_position(change: dict[str, Any], size: tuple[int, int]):
    """Draw a white box, locate its edges in the input by sums of grey levels, and map them back by the frame."""
    width, height = size
    box = (width // 2 - 14, height // 2 - 11, width // 2 + 17, height // 2 + 12)
    picture = Image.new("RGB", size)
    ImageDraw.Draw(picture).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="white")
    pixels, frame = ImagePreparer(clip(mean=(0.0,) * 3, std=(1.0,) * 3, **change)).prepare(picture)

    edges = []
    for axis in (0, 1):  # mass and first moment of the profile give the two edges
        profile = pixels[0, 0].max(axis=axis).astype(np.float64)
        mass, centre = profile.sum(), (profile * (np.arange(len(profile)) + 0.5)).sum() / profile.sum()
        edges.append((centre - mass / 2, centre + mass / 2))
    (x0, x1), (y0, y1) = edges
    back = frame.to_original(np.array([[x0, y0, x1, y1]], np.float32))
    assert back.dtype == np.float32
    assert np.abs(back[0] - box).max() < 0.5


def test_boxes_are_clipped_and_may_be_empty():
    frame = Frame(100, 50, (2.0, 2.0), (-10.0, 0.0))
    boxes = np.array([[-500, -500, 500, 500], [0, 0, 10, 10]], np.float32)
    assert frame.to_original(boxes).tolist() == [[0, 0, 100, 50], [5, 0, 10, 5]]  # (0 + 10) / 2, (10 + 10) / 2
    assert frame.to_original(np.zeros((0, 4), np.float32)).shape == (0, 4)


# --- kinds of files -------------------------------------------------------------------------------------------------


def exact(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",  # 65535 entries are announced, none follows
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",  # the orientation is a text
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",  # the orientation is 99
        b"Exif\0\0" + b"\xff" * 100,
    ],
)
def test_broken_exif_does_not_refuse_the_pixels(exif: bytes):
    plain = save(noise(24, 16), "JPEG")
    tagged = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    assert np.array_equal(exact(tagged), exact(plain))


def test_a_jpeg_decodes_to_what_pillow_decodes():
    for path in PHOTOGRAPHS:
        assert np.array_equal(exact(path.read_bytes()), np.asarray(Image.open(path).convert("RGB")))


def test_progressive_grey_and_cmyk_jpegs():
    picture = Image.open(ASSETS / "cat.jpg")
    baseline, progressive = save(picture, "JPEG", quality=90), save(picture, "JPEG", quality=90, progressive=True)
    assert np.array_equal(exact(progressive), exact(baseline))
    grey = exact(save(picture.convert("L"), "JPEG"))
    assert (grey[..., 0] == grey[..., 1]).all()
    cmyk = exact(save(picture.convert("CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(cmyk - np.asarray(picture)).mean() < 3  # and not inverted


def test_palettes_with_and_without_transparency():
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    assert exact(save(picture, "PNG")).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert exact(save(picture, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    # alpha 128 of 255: 128/255 red + 127/255 white
    half = exact(save(picture, "PNG", transparency=bytes([128, 255]))).tolist()
    assert half == [[[255, 127, 127], [0, 0, 255]]]


def test_sixteen_bit_grey_is_scaled():
    values = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], np.uint16)
    # round(v / 257): 0.498 -> 0, 0.502 -> 1, 1, 127.5 + 0.002 -> 128, 254, 255
    assert exact(save(Image.fromarray(values), "PNG"))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]


def test_alpha_is_composed_over_white():
    rgba = Image.fromarray(np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8))
    # 51 / 255 = 0.2 of black on white: 204
    expected = [[[10, 20, 30], [255, 255, 255], [204, 204, 204]]]
    assert exact(save(rgba, "PNG")).tolist() == expected
    assert exact(save(rgba, "WEBP", lossless=True, exact=True)).tolist() == expected
    la = Image.fromarray(np.array([[[9, 255], [9, 0], [0, 51]]], np.uint8))
    assert exact(save(la, "PNG"))[..., 0].tolist() == [[9, 255, 204]]
    opaque = noise(9, 9)
    assert np.array_equal(exact(save(opaque.convert("RGBA"), "PNG")), np.asarray(opaque))


def test_one_bit_and_colour_keys():
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert exact(save(bits, "PNG")).tolist() == [[[0] * 3, [255] * 3]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert exact(save(keyed, "PNG", transparency=(1, 2, 3))).tolist() == [[[255] * 3, [4, 5, 6]]]


# --- a JPEG that the decoder makes smaller ---------------------------------------------------------------------------


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch):
    """The rules at a thousandth of their sizes: whole up to 40,000 pixels, else at most 20,000."""
    for name, value in (("EXACT_PIXELS", 40_000), ("REDUCED_PIXELS", 20_000), ("LEAST_SIDE", 64)):
        monkeypatch.setattr(f"calmclip.models.preprocess.image.{name}", value)


def shrunk(data: bytes, **options: Any) -> tuple[int, int]:
    image = decode(data, **options)
    assert count_pixels(data, **options) == image.width * image.height
    return image.size


def test_the_photograph_of_a_phone_takes_the_memory_of_12_megapixels():
    data = save(Image.new("RGB", (8064, 6048), "teal"), "JPEG", exif=turned(6))
    assert count_pixels(data) == 4032 * 3024
    image = decode(data)
    assert (image.size, whole_size(image)) == ((3024, 4032), (6048, 8064))
    assert upright_size(data) == (6048, 8064)
    assert count_pixels(data, whole=True) == 8064 * 6048
    with pytest.raises(ImageTooLarge, match="8064 x 6048 = 48771072 pixels; at most 40000000 are decoded"):
        count_pixels(data, max_pixels=40_000_000, whole=True)
    assert count_pixels(jpeg_claiming(16320, 12240)) == 4080 * 3060  # 200 megapixels
    progressive = save(Image.new("L", (64, 64)), "JPEG", progressive=True).replace(
        struct.pack(">HH", 64, 64), struct.pack(">HH", 6048, 8064), 1
    )
    assert count_pixels(progressive) == 8064 * 6048  # its coefficients are kept


def turned(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((200, 200), (200, 200)),  # exactly the limit: with all its bits
        ((201, 200), (101, 100)),
        ((401, 201), (101, 51)),  # at a half it has 20,301; the short side would be 50
        ((500, 300), (250, 150)),
        ((1600, 1100), (200, 138)),
    ],
)
def test_the_scale_of_a_large_jpeg(small_limits, monkeypatch, size: tuple[int, int], decoded: tuple[int, int]):
    if size == (401, 201):
        monkeypatch.setattr("calmclip.models.preprocess.image.LEAST_SIDE", 50)
    if size == (500, 300):  # a quarter would have 9,375, with a short side of 75
        monkeypatch.setattr("calmclip.models.preprocess.image.LEAST_SIDE", 76)
    picture = Image.open(ASSETS / "cat.jpg").resize(size)
    data = save(picture, "JPEG", quality=95)
    assert shrunk(data) == decoded
    assert shrunk(data, whole=True) == size
    assert shrunk(save(picture, "PNG")) == size
    assert shrunk(save(picture.convert("L"), "JPEG")) == shrunk(save(picture.convert("CMYK"), "JPEG")) == decoded
    assert shrunk(save(picture, "MPO", save_all=True, append_images=[noise(9, 9)])) == decoded
    step = round(size[0] / decoded[0])
    blocks = np.asarray(Image.open(io.BytesIO(data)).reduce(step), float)  # the mean of step x step pixels
    assert np.abs(np.asarray(decode(data), float) - blocks).mean() < 1.5


def test_the_limit_of_a_large_jpeg(small_limits):
    """Decoded pixels are limited, and those of the file at four times as many; a lower limit makes pictures smaller."""
    data = save(noise(300, 200), "JPEG")
    assert shrunk(data, max_pixels=60_000) == shrunk(data, max_pixels=15_000) == (150, 100)
    assert shrunk(save(noise(160, 120), "JPEG"), max_pixels=5000) == (80, 60)
    with pytest.raises(ImageTooLarge, match="at most 14999 are decoded, and of a JPEG 59996 are read"):
        decode(data, max_pixels=14_999)
    progressive = save(noise(300, 200), "JPEG", progressive=True)
    assert (decode(progressive).size, count_pixels(progressive)) == ((150, 100), 60_000)
    with pytest.raises(ImageTooLarge, match="at most 59999 are decoded"):
        decode(progressive, max_pixels=59_999)
    scan = data.index(b"\xff\xda") + 2  # length 12, 3 components: here the first scan has only one, as if more followed
    parts = data[:scan] + struct.pack(">HB", 8, 1) + data[scan + 3 : scan + 5] + data[scan + 9 :]
    assert count_pixels(parts) == 60_000


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(
    "change",
    [{}, {"resize": "exact", "size": (30, 40)}, {"resize": "letterbox", "resample": "bilinear"}, {"in_graph": True}],
)
def test_the_frame_of_a_smaller_picture_maps_boxes_of_the_whole(small_limits, change: dict[str, Any], orientation: int):
    """The same file decoded whole and smaller: the frames map the corners of a box to nearly the same place."""
    data = save(Image.open(ASSETS / "cat.jpg").resize((403, 299)), "JPEG", exif=turned(orientation))
    preparer = ImagePreparer(
        clip(size=(32, 32), shortest=36, **change)
        if "resize" not in change
        else clip(**{"size": (32, 32), "shortest": None} | change)
    )
    whole, small = decode(data, whole=True), decode(data)
    assert whole_size(whole) == whole_size(small) == whole.size == upright_size(data)
    assert max(small.size) == 101
    (pixels, frame), (fewer, other) = preparer.prepare(whole), preparer.prepare(small)
    assert (other.width, other.height) == whole.size
    box = np.array([[100, 50, 250, 200]], np.float32)
    if not preparer.spec.in_graph:
        assert pixels.shape == fewer.shape
        assert np.abs(other.to_input(box) - frame.to_input(box)).max() < 0.2
    assert np.abs(other.to_original(other.to_input(box)) - box).max() < 1e-3
    crop, kept = small.crop((0, 0, 60, 50)), load(small)
    assert (whole_size(crop), whole_size(kept)) == ((60, 50), whole.size)


def test_a_box_of_a_smaller_picture_lies_where_it_was_drawn(small_limits):
    """As `test_a_box_is_mapped_back_to_its_position`, over the reduced decode, in pixels of the file."""
    picture, box = Image.new("RGB", (640, 480)), (212, 133, 420, 390)
    ImageDraw.Draw(picture).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="white")
    small = decode(save(picture, "JPEG", quality=95))
    assert small.size == (160, 120)
    spec = clip(size=(96, 96), shortest=None, resize="letterbox", mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels, frame = ImagePreparer(spec).prepare(small)
    edges = []
    for axis in (0, 1):
        profile = pixels[0, 0].max(axis=axis).astype(np.float64)
        mass, centre = profile.sum(), (profile * (np.arange(len(profile)) + 0.5)).sum() / profile.sum()
        edges.append((centre - mass / 2, centre + mass / 2))
    (x0, x1), (y0, y1) = edges
    assert np.abs(frame.to_original(np.array([[x0, y0, x1, y1]], np.float32))[0] - box).max() < 3  # half a grid step


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_header_is_read_without_decoding():
    assert count_pixels((ASSETS / "cat.jpg").read_bytes()) == 400 * 266
    assert count_pixels(save(noise(5, 4), "PNG")) == count_pixels(save(noise(5, 4), "WEBP")) == 20


@pytest.mark.parametrize(
    "data",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"\0",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"RIFF\xff\xff\xff\xffWEBP",
        b"hello" * 1000,
        bytes(range(256)),
        b"",
    ],
)
def test_bytes_that_are_not_a_picture_are_refused(data: bytes):
    says = "no picture we read" if data else "the picture has 0 bytes; expected a JPEG, PNG, WebP"
    for read in (count_pixels, decode):
        with pytest.raises(BadImage, match=says):
            read(data)


FILES = {
    "jpeg": lambda: save(Image.open(ASSETS / "cat.jpg").resize((120, 80)), "JPEG"),
    "progressive": lambda: save(Image.open(ASSETS / "cat.jpg").resize((120, 80)), "JPEG", progressive=True),
    "png": lambda: save(noise(30, 20), "PNG"),
    "palette": lambda: save(noise(30, 20).convert("P"), "PNG", transparency=3),
    "webp": lambda: save(Image.open(ASSETS / "cat.jpg").resize((120, 80)), "WEBP"),
    "lossless": lambda: save(noise(30, 20).convert("RGBA"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_truncated_file_is_refused_or_complete(kind: str):
    content = FILES[kind]()
    pixels = exact(content)
    for length in [*range(1, 60), *range(60, len(content) - 40, 37), *range(len(content) - 40, len(content))]:
        try:
            image = exact(content[:length])
        except BadImage:
            continue
        assert length >= len(content) - 24, length  # only checksums and the end mark can be missing
        assert np.array_equal(image, pixels)


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_a_picture_or_refused(kind: str):
    content = FILES[kind]()
    generator = np.random.default_rng(7)
    for _ in range(150):
        data = bytearray(content)
        for place in generator.integers(0, len(data), 3):
            data[place] = generator.integers(0, 256)
        with suppress(BadImage, ImageTooLarge):
            assert decode(bytes(data), max_pixels=100_000).mode == "RGB"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(save(noise(16, 16), "JPEG"))
    place = data.index(b"\xff\xc0")  # start of frame: length 2, precision 1, height 2, width 2
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = [png_claiming(60_000, 60_000), jpeg_claiming(60_000, 60_000), png_claiming(2**31 - 1, 1)]


@pytest.mark.parametrize("data", BOMBS)
def test_a_bomb_is_refused_by_its_header(data: bytes):
    for read in (count_pixels, decode):
        with pytest.raises(ImageTooLarge, match=rf"at most {MAX_PIXELS}.*Scale it down"):
            read(data)


def test_the_limit_is_exact():
    data = save(noise(10, 10), "PNG")
    assert decode(data, max_pixels=100).size == (10, 10)
    with pytest.raises(ImageTooLarge, match="the picture is 10 x 10 = 100 pixels; at most 99 are decoded"):
        decode(data, max_pixels=99)


def test_a_large_compressed_text_is_refused():
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * (1 << 26)))
    plain = save(noise(4, 4), "PNG")
    with pytest.raises(BadImage):
        decode(plain[:33] + bomb + plain[33:])


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]):
    with pytest.raises(BadImage):
        decode(png_claiming(*size))


def test_decoding_is_safe_in_threads():
    data = (ASSETS / "coffee.jpg").read_bytes()
    preparer = ImagePreparer(clip())
    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(lambda _: preparer.prepare(decode(data))[0], range(32))
    assert all(np.array_equal(first, other) for other in others)


def test_gain_and_bias_are_computed_in_float64():
    # (x / 255 - 127/255) / (128/255) = (x - 127) / 128, exact in binary; in float32 the last bit would differ
    gain, bias = normalisation(clip(mean=(127 / 255,) * 3, std=(128 / 255,) * 3))
    assert gain.dtype == bias.dtype == np.float32
    assert set(gain.ravel().tolist()) == {0.0078125}
    assert set(bias.ravel().tolist()) == {-0.9921875}
