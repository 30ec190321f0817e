"""A user's ONNX graph as the guide. The networks are written by hand: a patch is the mean colour of 8 x 8 pixels."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from calmclip.export import parity
from calmclip.export.adapters import _guide
from calmclip.export.adapters._guide import guide
from calmclip.export.nets import Tower, float32
from calmclip.export.trace import OPSET
from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array

SEEN = ImagePreprocess(size=(32, 32), resize="letterbox", mean=(0.5,) * 3, std=(0.2,) * 3, pad=127)
LIKE = Tower.drawn(None, {}, {}, SEEN, quantizer="none")
POOL = "AveragePool <kernel_shape = [8, 8], strides = [8, 8]> (image)"
TOKENS = """
    plane = AveragePool <kernel_shape = [8, 8], strides = [8, 8]> (image)
    shape = Constant <value_ints = [0, 3, -1]> ()
    columns = Reshape (plane, shape)
    rows = Transpose <perm = [0, 2, 1]> (columns)
    mean = ReduceMean <axes = [1]> (rows)
"""


def saved(file: Path, outputs: str, body: str, pixels: str = "B, 3, 32, 32", opset: int = 17) -> Path:
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> dino (float[{pixels}] image) => ({outputs}) {{{body}}}'
    onnx.save(onnx.parser.parse_model(text), file)
    return file


def cells(pixels: Array) -> Array:
    """[B, 3, H, W] -> the means of 8 x 8 pixels, [B, h, w, 3]."""
    batch, _, rows, columns = pixels.shape
    blocks = pixels.reshape(batch, 3, rows // 8, 8, columns // 8, 8)
    return np.asarray(blocks.mean(axis=(3, 5), dtype=np.float64).transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("outputs", "body"),
    [
        ("float[B, T, 3] last_hidden_state, float[B, 1, 3] mean",
         f"{TOKENS} last_hidden_state = Concat <axis = 1> (mean, rows)"),
        ("float[B, 1, 3] mean, float[B, T, 3] patches",
         f"{TOKENS} patches = Concat <axis = 1> (mean, mean, mean, rows)"),
        ("float[B, T, 3] rows", TOKENS.replace("mean = ReduceMean <axes = [1]> (rows)", "")),
        ("float[B, 3, h, w] pixels", f"pixels = {POOL}"),
        ("float[B, h, w, 3] y", f"patches = {POOL} y = Transpose <perm = [0, 2, 3, 1]> (patches)"),
    ],
    ids=["class token", "registers", "patches alone", "map", "cells"],
)  # fmt: skip
def test_answers_of_every_form_become_a_map(tmp_path: Path, outputs: str, body: str):
    tower = guide(saved(tmp_path / "dino.onnx", outputs, body), "imagenet", SEEN, LIKE)
    assert tower.outputs == {"patches": float32("B", 4, 4, 3)}
    assert tower.graph is not None
    assert tower.graph.opset_import[0].version == OPSET
    assert len({node.name for node in tower.graph.graph.node}) == len(tower.graph.graph.node)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    answer = parity.onnx_run(tower.graph)({"pixels": pixels})
    assert [*answer] == ["patches"]
    assert answer["patches"] == pytest.approx(cells(pixels), abs=1e-5)


def test_it_sees_the_same_part_of_the_picture_by_its_own_preprocessing(tmp_path: Path):
    file = saved(tmp_path / "dino.onnx", "float[B, 3, 8, 8] y", f"y = {POOL}", "B, 3, 64, 64")
    tower = guide(file, "imagenet", SEEN, LIKE)
    spec = tower.preprocess
    assert isinstance(spec, ImagePreprocess)
    assert (spec.size, spec.resize, spec.resample) == ((64, 64), "letterbox", "bicubic")
    assert spec.mean == (0.485, 0.456, 0.406)
    assert spec.pad == 114  # 255 times .449
    assert tower.outputs["patches"].shape == ("B", 8, 8, 3)


def test_a_graph_of_any_size_takes_that_of_the_tower(tmp_path: Path):
    file = saved(tmp_path / "dino.onnx", "float[B, 3, h, w] y", f"y = {POOL}", "B, 3, H, W")
    tower = guide(file, "half", SEEN.model_copy(update={"size": (32, 48)}), LIKE)
    assert tower.inputs["pixels"].shape == ("B", 3, 32, 48)
    assert tower.outputs["patches"].shape == ("B", 4, 6, 3)


def test_tokens_fill_the_largest_grid_of_the_pictures_shape():
    layouts = [_guide._layout(np.zeros((2, tokens, 6)), size, Path("x"))
               for tokens, size in ((785, (224, 224)), (789, (448, 448)), (19, (32, 64)))]  # fmt: skip
    assert [(layout.grid, layout.first) for layout in layouts] == [((28, 28), 1), ((28, 28), 5), ((3, 6), 1)]
    with pytest.raises(BadRequest, match="98 tokens of 32 x 32 pixels are no grid of that shape with at most 16"):
        _guide._layout(np.zeros((2, 98, 6)), (32, 32), Path("x"))
    with pytest.raises(BadRequest, match=r"a map \[4, 4, 4\] of 32 x 32 pixels; expected exactly one"):
        _guide._layout(np.zeros((2, 4, 4, 4)), (32, 32), Path("x"))


@pytest.mark.parametrize(
    ("outputs", "body", "pixels", "says"),
    [
        ("float[B, 3, 4, 8] y", f"y = {POOL}", "B, 3, 32, 64", "32 x 64 pixels, which is another shape than 32 x 32"),
        ("float[2, 3, 4, 4] y", f"y = {POOL}", "2, 3, 32, 32", "takes exactly 2 pictures; export it with a dynamic"),
        ("float[B, 3, 4, 4] y, float[B, 3, 4, 4] z", f"y = {POOL} z = Abs (y)", "B, 3, 32, 32", "expected one, or"),
        ("float[B, N] y", "y = Flatten (image)", "B, 3, 32, 32", r"output y is float32 \[2, 3072\] for two pictures"),
        ("float[B, 1, 4, 4] y", f"y = {POOL}", "B, 1, 32, 32", r"inputs are image \[None, 1, 32, 32\]; expected"),
    ],
)  # fmt: skip
def test_another_graph_is_refused(tmp_path: Path, outputs: str, body: str, pixels: str, says: str):
    with pytest.raises(BadRequest, match=f"--guide .*{says}"):
        guide(saved(tmp_path / "other.onnx", outputs, body, pixels), "imagenet", SEEN, LIKE)


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path):
    (tmp_path / "no.onnx").write_bytes(b"no graph at all")
    with pytest.raises(BadRequest, match=r"--guide .*no.onnx: it is no ONNX graph that is read here"):
        guide(tmp_path / "no.onnx", "imagenet", SEEN, LIKE)
    with pytest.raises(BadRequest, match=r"--guide .*absent.onnx"):
        guide(tmp_path / "absent.onnx", "imagenet", SEEN, LIKE)
