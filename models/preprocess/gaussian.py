"""Pad a picture to a square, blur it by a Gaussian and sample it linearly: OWLv2's preprocessing.

Source: Minderer et al. 2023 (arXiv 2306.09683); its code resizes by scikit-image, `transformers.Owlv2ImageProcessor`
by torchvision. This module follows torchvision at the borders: the blur mirrors without repeating the border pixel and
ends at three sigma; the sampling clamps.

Both steps are linear, and so is padding after the grey is subtracted: a resized picture is A (picture - pad) B + pad,
with a band matrix per axis. The band matrices are computed in blocks of rows, so no array is as large as the square,
and the padding costs no time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from calmclip.models.flow import Array

_NUMBERS = 1 << 22  # of a block of the picture, and of a block of weights: 16 MiB each
_ROWS = 32  # outputs of one block, at most


@dataclass(frozen=True)
class Block:
    """Outputs ``start`` to ``stop`` are ``weights`` float32 [stop - start, n] times the n samples from ``first`` on."""

    start: int
    stop: int
    first: int
    weights: Array

    @property
    def end(self) -> int:
        return self.first + int(self.weights.shape[1])


def blocks(side: int, square: int, to: int, width: int = 1) -> Iterator[Block]:
    """The band matrix that resizes ``square`` samples, of which only the first ``side`` are not zero, to ``to``.

    A block reads samples of ``width`` numbers each.
    """
    shrink = square / to
    sigma = max(0.0, (shrink - 1) / 2)
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2) if reach else np.ones(1)
    kernel /= kernel.sum()
    near = np.concatenate((kernel, [0.0]))  # weights of the sample at or before the position, and of the next one
    after = np.concatenate(([0.0], kernel))
    taps = np.arange(-reach, reach + 2)
    budget = int(min(max(1, _NUMBERS // width), _NUMBERS // _ROWS) / shrink)
    rows = int(np.clip(budget - 2 * reach / shrink, 1, _ROWS))
    for start in range(0, to, rows):
        stop = min(start + rows, to)
        place = np.clip((np.arange(start, stop) + 0.5) * shrink - 0.5, 0, square - 1)
        floor = np.floor(place).astype(np.int64)
        fraction = (place - floor)[:, None]
        weights = near * (1 - fraction) + after * fraction
        at = _mirror(floor[:, None] + taps, square)
        first, end = int(at.min()), min(int(at.max()) + 1, side)
        if first >= end:
            continue  # all padding
        dense = np.zeros((stop - start, int(at.max()) + 1 - first))
        np.add.at(dense, (np.arange(stop - start)[:, None], at - first), weights)
        yield Block(start, stop, first, dense[:, : end - first].astype(np.float32))


def square_to(image: Image.Image, size: tuple[int, int], pad: int) -> Array:
    """RGB picture -> float32 [3, *size] in grey levels 0-255, not rounded."""
    picture = np.asarray(image, np.uint8)
    height, width, _ = picture.shape
    square = max(height, width)
    resized = np.zeros((3, *size), np.float32)
    across = list(blocks(width, square, size[1]))
    for down in blocks(height, square, size[0], 3 * width):
        source = picture[down.first : down.end].transpose(2, 0, 1).astype(np.float32, order="C")
        source -= pad
        rows = np.matmul(down.weights, source)  # [3, rows, width]
        for block in across:
            part = np.matmul(rows[:, :, block.first : block.end], block.weights.T)
            resized[:, down.start : down.stop, block.start : block.stop] = part
    resized += pad
    return resized


def _mirror(at: Array, count: int) -> Array:
    """Indices outside 0 to ``count`` - 1 are mirrored, without repeating the border."""
    if count == 1:
        return np.zeros_like(at)
    period = 2 * (count - 1)
    folded: Array = np.abs((at + count - 1) % period - (count - 1))
    return folded
