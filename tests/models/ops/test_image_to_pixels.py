"""ImageToPixels against Pillow, to the bit: kernels of every instruction set, op, local function and preparer."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from calmclip.export.functions import alone
from calmclip.export.functions.image_to_pixels import image_to_pixels
from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.bundle.store import read
from calmclip.models.errors import BadRequest, OpsLibraryMissing
from calmclip.models.flow import Array
from calmclip.models.ops import pixels, reference
from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import IMAGE_TO_PIXELS, IMAGE_TO_QUANTIZED_PIXELS, Op
from calmclip.models.preprocess import memory
from calmclip.models.preprocess.image import ImagePreparer
from calmclip.models.preprocess.placement import columns_first
from calmclip.models.runner import open_bundle
from tests.models.ops import harness
from tests.models.ops.harness import Contract

PHOTOGRAPHS = sorted((Path(__file__).parents[3] / "export" / "samples").glob("*.jpg"))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Radford et al. 2021
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
ONE, NIL = np.ones(3, np.float32), np.zeros(3, np.float32)
GUARD = 64

# (height, width) -> (height, width)
SIZES = [
    ((480, 640), (224, 298)), ((640, 480), (298, 224)), ((1, 1), (224, 224)), ((7, 5), (224, 160)),
    ((1, 300), (3, 40)), ((300, 1), (40, 3)), ((3, 5000), (224, 30)), ((1, 40000), (1, 224)), ((40000, 1), (224, 1)),
    ((65536, 1), (1, 1)), ((1, 65536), (1, 1)), ((300, 900), (40, 50)), ((33, 15), (16, 16)),
    ((5000, 3), (30, 224)), ((900, 300), (50, 40)),  # columns first
    ((97, 131), (97, 131)), ((97, 131), (97, 40)), ((97, 131), (40, 131)), ((97, 131), (300, 131)),  # one side or none
    ((13, 17), (29, 700)), ((16, 1100), (17, 1030)),  # wider than a strip
]  # fmt: skip


def noise(height: int, width: int, seed: int = 0, kind: str = "grey") -> Array:
    """All frequencies; ``black or white`` over- and undershoots most."""
    grey = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return np.where(grey > 127, 255, 0).astype(np.uint8) if kind == "black or white" else grey


def pillow(image: Array, height: int, width: int, resample: str) -> Array:
    """uint8 [H, W, 3] -> [3, height, width] in two calls of Pillow, in the order of the spec."""
    picture, mode = Image.fromarray(image), FILTERS[resample]
    halfway = (picture.width, height) if columns_first(*picture.size, width, height) else (width, picture.height)
    return np.asarray(picture.resize(halfway, mode).resize((width, height), mode)).transpose(2, 0, 1)


def kernel(
    library: Library,
    image: Array,
    resized: tuple[int, int],
    size: tuple[int, int],
    corner: tuple[int, int] = (0, 0),
    resample: str = "bicubic",
    **options: Any,
) -> Array:
    """uint8 [3, height, width], from the kernel's float32 with gain 1 and bias 0, between guard values."""
    memory = np.full(3 * size[0] * size[1] + 2 * GUARD, np.nan, np.float32)
    out = memory[GUARD:-GUARD].reshape(3, *size)
    picture = pixels.Picture(image.ctypes.data, *image.shape[:2], *image.strides[:2], 0, image.shape[0])
    place = pixels.Placement(*resized, *corner, *size, options.pop("pad", 0))
    pixels.image_to_pixels(library, picture, place, resample, ONE, NIL, out, **options)
    assert np.isnan(memory[:GUARD]).all()
    assert np.isnan(memory[-GUARD:]).all()
    assert np.array_equal(out, out.astype(np.uint8))
    return out.astype(np.uint8)


def isas(library: Library) -> list[str]:
    return [line.isa for line in library.kernels if line.name == "resize_rows" and line.runs]


def four_bytes(image: Array) -> Array:
    """Four bytes a pixel, as in Pillow; the fourth must not matter."""
    return np.concatenate([image, noise(*image.shape[:2], 9)[..., :1]], axis=2)


# --- the kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grey", "black or white"])
@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(("source", "resized"), SIZES)
def test_every_kernel_equals_pillow(library: Library, source, resized, resample: str, kind: str):
    image = noise(*source, 1, kind)
    expected = pillow(image, *resized, resample)
    wide = four_bytes(image)
    for isa in isas(library):
        for form in (image, wide):
            pixels = kernel(library, form, resized, resized, resample=resample, isa=isa)
            assert np.array_equal(pixels, expected), (isa, form.shape)


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
def test_every_kernel_equals_pillow_on_photographs(library: Library, path: Path):
    image = np.asarray(Image.open(path).convert("RGB"))
    for resized in ((224, 300), (100, 130), (640, 500)):
        expected = pillow(image, *resized, "bicubic")
        for isa in isas(library):
            assert np.array_equal(kernel(library, image, resized, resized, isa=isa), expected), isa


@given(st.tuples(*[st.integers(1, 150)] * 4), st.sampled_from(sorted(FILTERS)), st.integers(0, 2**20), st.data())
@settings(max_examples=150, deadline=None)
def test_any_cut_of_any_size(library: Library, sizes, resample: str, seed: int, data):
    source, resized = sizes[:2], sizes[2:]
    top, left = (data.draw(st.integers(0, side - 1)) for side in resized)
    size = data.draw(st.integers(1, 160)), data.draw(st.integers(1, 160))
    image = noise(*source, seed, "black or white" if seed % 2 else "grey")
    visible = pillow(image, *resized, resample)[:, top : top + size[0], left : left + size[1]]
    expected = np.full((3, *size), 7, np.uint8)
    expected[:, : visible.shape[1], : visible.shape[2]] = visible
    for isa in isas(library):
        pixels = kernel(library, image, resized, size, (top, left), resample, pad=7, isa=isa)
        assert np.array_equal(pixels, expected), isa


def test_a_picture_inside_a_larger_buffer(library: Library):
    """Rows with a stride over their length; no byte is read past a row's end."""
    frame = noise(70, 90, 3)
    inside = frame[11:60, 5:76]
    assert np.array_equal(
        kernel(library, inside, (20, 30), (20, 30)), pillow(np.ascontiguousarray(inside), 20, 30, "bicubic")
    )


@pytest.mark.parametrize(("source", "resized"), [((500, 400), (90, 80)), ((900, 300), (50, 40)), ((50, 40), (90, 80))])
def test_rows_in_parts_and_from_parts_of_the_picture(library: Library, source, resized):
    image = noise(*source)
    expected = pillow(image, *resized, "bicubic")
    out = np.full((3, *resized), np.nan, np.float32)
    place = pixels.Placement(*resized, 0, 0, *resized, 0)
    scale = source[0] / resized[0]
    for first in range(0, resized[0], 17):
        last = min(first + 17, resized[0])
        low = max(0, int((first + 0.5) * scale - 2 * max(scale, 1)) - 2)
        high = min(source[0], int((last - 0.5) * scale + 2 * max(scale, 1)) + 3)
        part = image[low:high].copy()
        picture = pixels.Picture(part.ctypes.data, *source, *part.strides[:2], low, high - low)
        pixels.image_to_pixels(library, picture, place, "bicubic", ONE, NIL, out, (first, last))
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("resized", [90, 97, 300, 1000])
def test_a_row_that_is_needed_and_missing_is_noticed(library: Library, resized: int, resample: str):
    """A picture with one white row shows whether an output depends on that row."""
    size = (resized, 4)
    place = pixels.Placement(*size, 0, 0, *size, 0)
    radius = {"bilinear": 1, "bicubic": 2}[resample] * max(500 / resized, 1)
    for first in range(0, resized - 7, 13):
        low, high = (int((edge + 0.5) * 500 / resized) for edge in (first, first + 6))
        for row in {*range(int(low - radius) - 3, low), *range(high, int(high + radius) + 4)} & set(range(500)):
            image = np.zeros((500, 4, 3), np.uint8)
            image[row] = 255
            part = image[:row] if row >= high else image[row + 1 :]
            picture = pixels.Picture(
                part.ctypes.data, 500, 4, *image.strides[:2], 500 - len(part) if row < low else 0, len(part)
            )
            out = np.empty((3, *size), np.float32)
            try:
                pixels.image_to_pixels(library, picture, place, resample, ONE, NIL, out, (first, first + 7))
            except ValueError:
                continue
            output = kernel(library, image, size, size, resample=resample)
            assert not output[:, first : first + 7].any(), (first, row)


def test_invalid_numbers_are_refused(library: Library):
    image = noise(20, 20)
    right = {"height": 20, "width": 20, "row": 60, "pixel": 3, "first": 0, "rows": 20}
    where = {"rh": 8, "rw": 8, "top": 0, "left": 0, "h": 8, "w": 8}
    out = np.empty((3, 8, 8), np.float32)

    def run(outputs: tuple[int, int] = (0, 8), out: Array = out, **changes: int) -> None:
        picture = pixels.Picture(image.ctypes.data, *(changes.get(name, value) for name, value in right.items()))
        place = pixels.Placement(*(changes.get(name, value) for name, value in where.items()), 0)
        pixels.image_to_pixels(library, picture, place, "bicubic", ONE, NIL, out, outputs)

    run()
    for changes in (
        {"height": 0}, {"width": 0}, {"height": 2**64 - 1, "rows": 2**64 - 1}, {"width": 70000}, {"row": 59},
        {"pixel": 2}, {"rows": 21}, {"rows": 0}, {"first": 5}, {"rh": 0}, {"rw": 2**40}, {"top": 8},
        {"left": 2**64 - 1}, {"first": 10, "rows": 10},  # half of the rows that the outputs need
    ):  # fmt: skip
        with pytest.raises(ValueError, match="refused rows 0 to 8"):
            run(**changes)
    with pytest.raises(ValueError, match="refused rows 0 to 9"):
        run((0, 9))
    with pytest.raises(ValueError, match="expected contiguous float32"):
        run(h=9)
    with pytest.raises(ValueError, match="expected contiguous float32"):
        run(out=np.empty((3, 8, 8)))


# --- the reference and its order ------------------------------------------------------------------------------------


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="older versions always resize the width first")
def test_the_order_is_that_of_the_installed_pillow():
    rng = np.random.default_rng(5)
    for _ in range(200):
        height, width, *resized = map(int, rng.integers(1, 90, 4))
        height *= int(rng.integers(1, 4))
        image = noise(height, width, 2, "black or white")
        expected = Image.fromarray(image).resize((resized[1], resized[0]), Image.Resampling.BICUBIC)
        assert np.array_equal(pillow(image, *resized, "bicubic"), np.asarray(expected).transpose(2, 0, 1))


def test_the_reference_normalizes_by_mean_and_deviation():
    image = noise(50, 40)
    normalized = reference.image_to_pixels(image, size=(20, 24), resize="exact", **NORMAL)
    grey = pillow(image, 20, 24, "bicubic").astype(np.float64)
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (MEAN, STD))
    assert normalized.shape == (1, 3, 20, 24)
    assert np.abs(normalized[0] - (grey / 255 - mean) / std).max() < 1e-6


def test_the_reference_quantises_half_to_even_and_clips():
    grey = np.repeat(np.array([[[0], [1], [2], [255]]], np.uint8), 3, axis=2)
    step = 2 * float(np.float32(1 / 255))  # two grey levels, to the last bit
    how: dict[str, Any] = {"size": (1, 4), "resize": "exact", "scale": step}
    steps = reference.image_to_quantized_pixels(grey, zero_point=200, **how)
    assert steps[0, 0, 0].tolist() == [200, 200, 201, 255]  # 0; 0.5 rounds to 0; 1; 127.5 is above the range
    steps = reference.image_to_quantized_pixels(grey, zero_point=100, bias=(-1.0,) * 3, **how)
    assert steps[0, 0, 0].tolist() == [0, 0, 0, 100]  # -127.5 is below the range


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (0, 4, 3), (1, 4, 4, 3)])
def test_the_reference_refuses_other_shapes(shape: tuple[int, ...]):
    with pytest.raises(BadRequest, match=r"expected uint8 \[height, width, 3\]"):
        reference.image_to_pixels(np.zeros(shape, np.uint8))


# --- the op ---------------------------------------------------------------------------------------------------------


def scaled(mean: Any, std: Any) -> dict[str, Any]:
    """The gain and bias of a node, from mean and std."""
    mean, std = np.array(mean), np.array(std)
    return {"gain": np.float32(1 / (255 * std)).tolist(), "bias": np.float32(-mean / std).tolist()}


NORMAL = scaled(MEAN, STD)
MODES: dict[str, dict[str, Any]] = {
    "clip": NORMAL,
    "transformers": {"shortest": 256, "crop_offset": "floor", "resample": "bilinear", **NORMAL},
    "siglip": {"size": (48, 64), "resize": "exact", **scaled((0.5,) * 3, (0.5,) * 3)},
    "owl": {"size": (96, 64), "resize": "letterbox", "pad": 114, **NORMAL},
    "square": {"size": (32, 32), "shortest": 40, "keep_square": 1, "crop_offset": "round"},
}
# 900 x 300 is resized columns first; 600 x 300 is the limit and is not
SHAPES = [(480, 640), (640, 480), (900, 300), (600, 300), (301, 900), (333, 500), (1, 1), (1, 300), (300, 1), (64, 64)]
QUANTIZED = {"scale": 0.0173, "zero_point": 114}


def session(op: Op, attributes: dict[str, Any], library: Library | None, threads: int = 1) -> Any:
    shapes = {"image": ["H", "W", 3]}
    return harness.session(op, {"image": noise(1, 1)}, attributes, library=library, shapes=shapes, threads=threads)


def run(loaded: Any, image: Array) -> Array:
    return loaded.run(None, {"image": image})[0]


@pytest.mark.parametrize("mode", MODES)
def test_op_and_function_equal_the_reference(library: Library, mode: str):
    """The function is exact as well."""
    how, quantized = MODES[mode], MODES[mode] | QUANTIZED
    ways = ((IMAGE_TO_PIXELS, how), (IMAGE_TO_QUANTIZED_PIXELS, quantized))
    for node, attributes in ways:
        onnx.checker.check_model(alone(node, node.inputs, node.outputs, attributes), full_check=True)
    op, function, op8, function8 = (session(*way, by) for way in ways for by in (library, None))
    assert op.get_outputs()[0].shape == [1, 3, *(IMAGE_TO_PIXELS.attributes | how)["size"]]
    for number, shape in enumerate(SHAPES):
        image = noise(*shape, number, "black or white" if number % 2 else "grey")
        expected = reference.image_to_pixels(image, **how)
        expected8 = reference.image_to_quantized_pixels(image, **quantized)
        for way, wanted in ((op, expected), (function, expected), (op8, expected8), (function8, expected8)):
            np.testing.assert_array_equal(run(way, image), wanted, err_msg=str(shape), strict=True)


@pytest.mark.parametrize("mode", MODES)
def test_op_and_function_agree_on_ribbons(library: Library, mode: str):
    """If Pillow would resize to more than 40 million pixels, the op computes only the visible pixels."""
    how = MODES[mode]
    op, function = (session(IMAGE_TO_PIXELS, how, by) for by in (library, None))
    for shape in ((2, 9000), (9000, 2)):
        image = noise(*shape)
        output = run(op, image)
        assert np.array_equal(output, run(function, image)), shape
        level = np.array((IMAGE_TO_PIXELS.attributes | how)["gain"]).reshape(3, 1, 1)
        assert (np.abs(output - reference.image_to_pixels(image, **how)) < 1.01 * level).all(), shape


@pytest.mark.parametrize("mode", ["clip", "owl"])
def test_the_op_is_the_same_on_several_threads(library: Library, mode: str):
    alone, four = (session(IMAGE_TO_PIXELS, MODES[mode], library, threads) for threads in (1, 4))
    for shape in ((2000, 1500), (1500, 2000), (2400, 700)):  # the last is resized columns first
        image = noise(*shape)
        assert np.array_equal(run(four, image), run(alone, image))


def test_every_grey_level_quantises_as_onnx_runtime_does(library: Library):
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    halves = scaled((0.0,) * 3, (1.0,) * 3)  # steps of two grey levels, to the last bit: odd levels are halves
    for scale, zero_point, normal in (
        (0.0173, 114, NORMAL),
        (1e-30, 0, NORMAL),
        (1e30, 255, NORMAL),
        (2 * float(np.float32(1 / 255)), 7, halves),
        (1 / 64, 128, NORMAL),
    ):
        how = {"size": (1, 256), "resize": "exact", **normal, "scale": scale, "zero_point": zero_point}
        expected = reference.image_to_quantized_pixels(levels, **how)
        for way in (library, None):
            assert np.array_equal(run(session(IMAGE_TO_QUANTIZED_PIXELS, how, way), levels), expected)


def test_a_missing_attribute_is_named(library: Library):
    node = harness.node(IMAGE_TO_PIXELS, ["image"], ["pixels"], **IMAGE_TO_PIXELS.attributes)
    del node.attribute[0]
    ends = {"image": (np.uint8, None)}, {"pixels": (np.float32, None)}
    with pytest.raises(Exception, match=r"ImageToPixels: the attribute .* cannot be read"):
        harness.load(harness.model([node], *ends), library)


def test_the_function_refuses_attributes_out_of_range():
    with pytest.raises(ValidationError, match="shortest"):
        image_to_pixels(shortest=100)
    with pytest.raises(TypeError, match="has no attribute colour; it has size"):
        image_to_pixels(colour=1)


# --- the preparer ---------------------------------------------------------------------------------------------------


def both(library: Library, spec: ImagePreprocess, picture: Image.Image) -> None:
    plain, frame = ImagePreparer(spec).prepare(picture)
    fast, same = ImagePreparer(spec, library).prepare(picture)
    assert same == frame
    assert fast.shape == plain.shape
    assert fast.flags.c_contiguous
    assert fast.tobytes() == plain.tobytes()


def spec(mode: str, **others: Any) -> ImagePreprocess:
    places = {k: v for k, v in (IMAGE_TO_PIXELS.attributes | MODES[mode] | others).items() if k not in ("gain", "bias")}
    return ImagePreprocess.model_validate(places | {"mean": MEAN, "std": STD})


@pytest.mark.parametrize("mode", MODES)
def test_the_preparer_gives_the_same_bits_with_and_without_the_library(library: Library, mode: str):
    for path in PHOTOGRAPHS:
        both(library, spec(mode), Image.open(path).convert("RGB"))
    for shape in [*SHAPES, (1, 70_000), (70_000, 1)]:
        both(library, spec(mode), Image.fromarray(noise(*shape)))


@given(st.integers(1, 250), st.integers(1, 250), st.sampled_from(sorted(MODES)), st.integers(0, 2**20))
@settings(max_examples=100, deadline=None)
def test_the_preparer_on_any_size(library: Library, width: int, height: int, mode: str, seed: int):
    both(library, spec(mode), Image.fromarray(noise(height, width, seed)))


@pytest.mark.parametrize("size", [(2400, 1900), (1000, 4300)])
@pytest.mark.parametrize("mode", ["clip", "owl", "siglip"])
def test_the_preparer_on_pictures_over_one_block_of_pillows(library: Library, size: tuple[int, int], mode: str):
    """The preparer cuts them into bands; the second is resized columns first."""
    both(library, spec(mode), Image.fromarray(noise(*size[::-1])))


@pytest.mark.parametrize("size", [(560, 560), (1750, 180), (2650, 118), (3500, 89), (5800, 53), (53, 5800)])
@pytest.mark.parametrize("mode", ["clip", "owl", "siglip"])
def test_no_picture_is_copied_many_times_over(
    library: Library, size: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
):
    """128 times smaller than 40 million pixels. A wide letterboxed picture was once copied 60 times for its bands."""
    monkeypatch.setattr(memory, "_BAND", (8 << 20) // 128)
    cut, copied = memory._band, 0

    def band(part: Image.Image, first: int, outputs: tuple[int, int]) -> memory.Band:
        nonlocal copied
        copied += part.height
        return cut(part, first, outputs)

    monkeypatch.setattr(memory, "_band", band)
    monkeypatch.setattr(memory, "borrow", lambda image: None)
    for target in ((20, 20), (57, 57)):
        copied = 0
        small = spec(mode, size=target, shortest=target[0])
        both(library, small, Image.fromarray(noise(*size[::-1])))
        assert copied <= 2.2 * size[1] + target[0], (target, copied)


def test_the_preparer_without_borrowed_memory(library: Library, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("calmclip.models.preprocess.memory.borrow", lambda image: None)
    for size in (1 << 12, 8 << 20):
        monkeypatch.setattr("calmclip.models.preprocess.memory._BAND", size)
        for mode in MODES:
            for shape in SHAPES[:5]:
                both(library, spec(mode), Image.fromarray(noise(*shape)))


def test_the_option_ops_selects_the_preparer(
    library: Library, sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert Bundle(read(sealed)).image().library == library
    assert Bundle(read(sealed), ops="required").image().library == library
    assert Bundle(read(sealed), ops="off").image().library is None
    runner = open_bundle(sealed, ops="off")
    assert runner.bundle.image().library is None
    assert runner.options.ops == "off"
    monkeypatch.setattr("calmclip.models.ops.build.FOLDER", tmp_path)
    assert Bundle(read(sealed)).image().library is None
    with pytest.raises(OpsLibraryMissing, match="no op library is built"):
        open_bundle(sealed, ops="required")


def picture(seed, columns):
    return {"image": np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)}


CONTRACTS = [
    Contract(
        IMAGE_TO_PIXELS,
        picture,
        refused=[
            ({"image": [0, 5, 3]}, r"the picture has the shape \[0, 5, 3\]; expected sides within 1 to 65536"),
            ({"image": [65537, 1, 3]}, "expected sides within 1 to 65536"),
            ({"image": [5, 5, 4]}, r"the picture has the shape \[5, 5, 4\]; expected \[height, width, 3\]"),
            ({"image": [1, 5, 5, 3]}, r"expected \[height, width, 3\]"),
            ({"image": []}, r"expected \[height, width, 3\]"),
        ],
    ),
    Contract(
        IMAGE_TO_QUANTIZED_PIXELS,
        picture,
        refused=[
            ({"size": (224,)}, "size has 1 numbers; expected height and width"),
            ({"size": (0, 5)}, r"size is \[0, 5\]; expected sides within 1 to 4096"),
            ({"size": (5, 4097)}, "expected sides within 1 to 4096"),
            ({"resize": "stretch"}, "resize is 'stretch'; expected one of shortest, exact, letterbox"),
            ({"resample": "nearest"}, "resample is 'nearest'; expected one of bilinear, bicubic"),
            ({"crop_offset": "ceil"}, "crop_offset is 'ceil'; expected one of round, floor"),
            ({"shortest": 223}, r"shortest is 223; expected the larger of size \[224, 224\] to 4096"),
            ({"shortest": 2**62}, "expected the larger of size"),
            ({"pad": 256}, "pad is 256; expected 0 to 255"),
            ({"pad": -1}, "pad is -1; expected 0 to 255"),
            ({"bias": (0.0, 0.0)}, "gain has 3 numbers and bias 2; expected 3 each"),
            ({"gain": (1.0, float("nan"), 1.0)}, "of channel 1; expected"),
            ({"bias": (float("inf"), 0.0, 0.0)}, "of channel 0; expected"),
            ({"scale": 0.0}, "scale is 0.000000; expected a finite number over 0"),
            ({"scale": float("nan")}, "expected a finite number over 0"),
            ({"zero_point": 256}, "zero_point is 256; expected 0 to 255"),
            ({"size": "big"}, "size has 0 numbers; expected height and width"),
            ({"pad": 1.5}, "the attribute pad cannot be read"),
        ],
    ),
]
