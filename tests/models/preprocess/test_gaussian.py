"""Pad to a square, blur, sample: against the OWLv2 processor of transformers (torchvision) and plain float64 loops."""

import numpy as np
import pytest
import transformers
from PIL import Image

from calmclip.export.samples import pictures
from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.preprocess.gaussian import blocks, square_to
from calmclip.models.preprocess.image import ImagePreparer

SIZES = [
    (1, 1),
    (7, 5),
    (2, 1),
    (96, 96),
    (97, 96),
    (640, 480),
    (333, 1000),
    (1000, 333),
    (50, 3),
    (1, 200),
    (301, 300),
]
STD = np.array(transformers.Owlv2ImageProcessor.image_std).reshape(3, 1, 1)


def photograph(size: tuple[int, int]) -> Image.Image:
    with Image.open(pictures()[1]) as opened:
        return opened.convert("RGB").resize(size)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("side", [96, 333])
def test_equals_the_reference_processor(size: tuple[int, int], side: int):
    processor = transformers.Owlv2ImageProcessor(size={"height": side, "width": side})
    spec = ImagePreprocess(
        size=(side, side),
        resize="square",
        resample="gaussian",
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
    )
    image = photograph(size)
    want = np.asarray(processor(image, return_tensors="np")["pixel_values"])
    pixels, frame = ImagePreparer(spec).prepare(image)
    assert (pixels.dtype, pixels.shape) == (np.float32, want.shape)
    assert np.abs((pixels - want) * STD).max() * 255 < 0.05  # grey levels
    assert frame.scale == pytest.approx((side / max(size),) * 2)
    assert frame.to_original(np.array([[0, 0, side, side]], np.float32))[0] == pytest.approx([0, 0, *size])
    assert frame.to_original(frame.to_input(np.array([[0, 0, *size]])))[0] == pytest.approx([0, 0, *size])


def test_the_padding_has_the_colour_of_pad():
    pixels = square_to(Image.new("RGB", (80, 20), (10, 20, 30)), (40, 40), 200)
    assert np.allclose(pixels[:, :9].reshape(3, -1).T, (10, 20, 30), atol=1e-3)  # the picture ends at row 10
    assert np.allclose(pixels[:, 12:], 200, atol=1e-3)
    assert 10 < pixels[0, 10, 0] < 200  # the blur crosses the edge


@pytest.mark.parametrize(
    ("side", "square", "to"), [(5, 5, 3), (100, 100, 7), (30, 90, 8), (9, 9, 1), (6, 6, 20), (1, 1, 4)]
)
def test_the_blocks_are_one_band_matrix(side: int, square: int, to: int):
    """For every size of a block. The expected matrix is blur times sampling in float64."""
    sigma = max(0.0, (square / to - 1) / 2)
    reach = int(np.ceil(3 * sigma))
    blur, sample = np.zeros((square, square)), np.zeros((to, square))
    for i in range(square):
        weights = [np.exp(-0.5 * (k / sigma) ** 2) if sigma else 1.0 for k in range(-reach, reach + 1)]
        for k, weight in zip(range(-reach, reach + 1), weights, strict=True):
            j = i + k
            while not 0 <= j < square:
                j = -j if j < 0 else 2 * (square - 1) - j
            blur[i, j] += weight / sum(weights)
    for i in range(to):
        place = min(max((i + 0.5) * square / to - 0.5, 0.0), square - 1.0)
        low = int(place)
        sample[i, low] += 1 - (place - low)
        sample[i, min(low + 1, square - 1)] += place - low
    for width in (1, 1 << 18, 1 << 30):
        matrix = np.zeros((to, side))
        for block in blocks(side, square, to, width):
            matrix[block.start : block.stop, block.first : block.end] = block.weights
        assert np.abs(matrix - (sample @ blur)[:, :side]).max() < 1e-6


@pytest.mark.parametrize("size", [(60_000, 2), (2, 60_000)])
def test_a_ribbon_allocates_no_square(size: tuple[int, int]):
    """The square would have 3.6e9 pixels."""
    pixels = square_to(Image.new("RGB", size, "white"), (64, 64), 0)
    assert pixels.shape == (3, 64, 64)
    assert 0 <= pixels.min() <= pixels.max() < 255
