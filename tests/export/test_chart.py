"""The chart of outliers. The oracle is the picture, read by Pillow."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calmclip.export.chart import draw
from calmclip.models.outliers import Outliers


def outliers(*norms: float, worst: int = 1) -> Outliers:
    tensors = {f"blocks.{i}.mlp.down": (norm, 3.0 + norm) for i, norm in enumerate(norms)}
    norm, kurtosis = max(norms), 3.0 + max(norms)
    return Outliers(
        max_inf_norm=norm, avg_inf_norm=norm, max_kurtosis=kurtosis, avg_kurtosis=kurtosis,
        inputs=2, worst=tuple(tensors)[worst : worst + 1], tensors=tensors,
    )  # fmt: skip


def bars(file: Path) -> tuple[list[int], list[int]]:
    """For each row of pixels, the number of blue and of red pixels: the first and fourth colour of matplotlib."""
    with Image.open(file) as opened:
        assert opened.format == "PNG"
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    masks = (np.abs(pixels - colour).sum(axis=-1) < 12 for colour in ((31, 119, 180), (214, 39, 40)))
    blue, red = (mask.sum(axis=1).tolist() for mask in masks)
    return blue, red


def test_each_tensor_has_a_bar_and_the_bar_of_the_worst_is_red_and_longest(tmp_path: Path):
    draw({"image": outliers(2.0, 5.0, 900.0, worst=2)}, tmp_path / "o.png", "tiny-int8")
    blue, red = bars(tmp_path / "o.png")
    groups = [row for row, before in zip(blue, [0, *blue], strict=False) if row and not before]
    assert len(groups) == 2
    assert sum(1 for row, before in zip(red, [0, *red], strict=False) if row and not before) == 1
    assert max(red) > max(blue)
    top, bottom = (next(i for i, row in enumerate(side) if row) for side in (blue, red))
    assert top < bottom, "the first bar is that of the first layer"


def test_the_height_grows_with_the_tensors_of_each_graph(tmp_path: Path):
    few, many = {"image": outliers(2.0, 3.0)}, {"image": outliers(2.0, 3.0), "text": outliers(*[7.0] * 40)}
    heights = []
    for graphs in (few, many):
        draw(graphs, tmp_path / "o.png", "x")
        with Image.open(tmp_path / "o.png") as opened:
            heights.append(opened.height)
    assert heights[1] - heights[0] > 40 * 12  # about the height of 40 lines of text


def test_a_tensor_of_zeros_is_drawn(tmp_path: Path):
    draw({"text": outliers(0.0, worst=0)}, tmp_path / "o.png", "x")
    assert sum(map(sum, bars(tmp_path / "o.png"))) > 0  # its kurtosis is 3 in `outliers`


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught:
        draw({"text": outliers(1.0)}, tmp_path / "nowhere" / "o.png", "x")
    assert caught.value.filename == str(tmp_path / "nowhere" / "o.png")
