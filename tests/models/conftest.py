"""A bundle of hand-written graphs whose answers are worked out by hand, without torch.

`image` is the normalized mean colour of a picture. `text` is the normalized sum of its words' vectors: red, green and
blue are the three axes, all other words are zero.
"""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import parser
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Manifest, parse
from calmclip.models.bundle.store import read, seal, stage
from calmclip.models.tasks.detect import DETECTED, SUPPRESSION
from calmclip.models.tasks.detect import REGIONS as REGION_OUTPUTS

IMAGE = """<ir_version: 9, opset_import: ["" : 18]>
image (float[B, 3, 4, 4] pixels) => (float[B, 3] image_embeds) {
    axes = Constant <value_ints = [2, 3]> ()
    mean = ReduceMean <keepdims = 0> (pixels, axes)
    image_embeds = LpNormalization <axis = 1, p = 2> (mean)
}"""
TEXT = """<ir_version: 9, opset_import: ["" : 18]>
text (int64[B, T] ids) => (float[B, 3] text_embeds)
<float[5, 3] words = {0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1}> {
    each = Gather (words, ids)
    axes = Constant <value_ints = [1]> ()
    sum = ReduceSum <keepdims = 0> (each, axes)
    text_embeds = LpNormalization <axis = 1, p = 2> (sum)
}"""
# One region: the 8 x 8 letterbox, whose vector is its normalized mean colour.
REGIONS = """<ir_version: 9, opset_import: ["" : 18]>
regions (float[1, 3, 8, 8] pixels) => (float[1, 1, 3] class_embeds, float[1, 1, 4] boxes, float[1, 1] objectness)
<float[1, 1, 4] boxes = {0, 0, 8, 8}, float[1, 1] objectness = {1}> {
    axes = Constant <value_ints = [2, 3]> ()
    mean = ReduceMean <keepdims = 0> (pixels, axes)
    row = LpNormalization <axis = 1, p = 2> (mean)
    first = Constant <value_ints = [0]> ()
    class_embeds = Unsqueeze (row, first)
}"""
# One detection per prompt whose cosine is at least min_score; the other settings have no effect.
DETECT = """<ir_version: 9, opset_import: ["" : 18]>
detect (float[1, 1, 3] class_embeds, float[1, 1, 4] boxes, float[1, 1] objectness, float[Q, 3] text_embeds,
        int64[1] method, int64[1] per_class, float[1] iou_threshold, float[1] sigma, float[1] min_score,
        int64[1] max_output)
    => (float[K, 4] kept_boxes, float[K] scores, float[K] raw_scores, int64[K] classes, int64[1] candidates) {
    column = Constant <value_ints = [3, 1]> ()
    all = Constant <value_ints = [-1]> ()
    vector = Reshape (class_embeds, column)
    cosines = MatMul (text_embeds, vector)
    flat = Reshape (cosines, all)
    over = GreaterOrEqual (flat, min_score)
    indices = NonZero (over)
    classes = Reshape (indices, all)
    scores = Gather (flat, classes)
    raw_scores = Identity (scores)
    candidates = Shape (classes)
    four = Constant <value_ints = [4]> ()
    sizes = Concat <axis = 0> (candidates, four)
    row = Constant <value_ints = [1, 4]> ()
    box = Reshape (boxes, row)
    kept_boxes = Expand (box, sizes)
}"""
# The mean colour of each 4 x 4 pixels of the 32 x 32 letterbox.
DENSE = """<ir_version: 9, opset_import: ["" : 18]>
dense (float[B, 3, 32, 32] pixels) => (float[B, 8, 8, 3] patches) {
    cells = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (pixels)
    patches = Transpose <perm = [0, 2, 3, 1]> (cells)
}"""
VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "red": 2, "green": 3, "blue": 4}
MANIFEST: dict[str, Any] = {
    "format": 2,
    "name": "colours",
    "precision": "float",
    "tasks": ["classify", "embed", "raw"],
    "source": {"net": "by_hand", "model": "colours", "license": "CC0-1.0"},
    "graphs": {
        "image": {
            "file": "image.onnx",
            "inputs": {"pixels": {"dtype": "float32", "shape": ["B", 3, 4, 4]}},
            "outputs": {"image_embeds": {"dtype": "float32", "shape": ["B", 3]}},
            "preprocess": {"kind": "image", "size": [4, 4], "shortest": 4, "mean": [0.0] * 3, "std": [1.0] * 3},
        },
        "text": {
            "file": "text.onnx",
            "inputs": {"ids": {"dtype": "int64", "shape": ["B", "T"]}},
            "outputs": {"text_embeds": {"dtype": "float32", "shape": ["B", 3]}},
            "preprocess": {"kind": "text", "context": 6},
        },
    },
    "classifier": {"templates": ["{}"], "head": {"name": "cosine", "params": {"scale": 2.0}}},
    "quantization": {"name": "none"},
    "created": "2026-01-01T00:00:00+00:00",
}


def _words() -> str:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str()


@pytest.fixture
def colours() -> dict[str, Any]:
    """The manifest of the hand-written bundle as JSON data; a test may change it."""
    return copy.deepcopy(MANIFEST)


@pytest.fixture
def write(colours: dict[str, Any]) -> Callable[[Path], Manifest]:
    """Writes the bundle's files into a directory and returns its manifest, without `files`."""

    def write_files(directory: Path) -> Manifest:
        for name, text in (("image.onnx", IMAGE), ("text.onnx", TEXT)):
            (directory / name).write_bytes(parser.parse_model(text).SerializeToString())
        (directory / "tokenizer.json").write_text(_words(), encoding="utf-8")
        return parse(json.dumps(colours).encode(), "colours")

    return write_files


@pytest.fixture
def sealed(tmp_path: Path, write: Callable[[Path], Manifest]) -> Path:
    """The directory of the sealed bundle."""
    with stage(tmp_path / "bundles", "colours") as staged:
        return seal(staged, write(staged)).directory


@pytest.fixture
def detector(colours: dict[str, Any], tmp_path: Path, write: Callable[[Path], Manifest]) -> Path:
    """The directory of the sealed bundle, with detection."""
    tensors = {
        "class_embeds": ("float32", [1, 1, 3]),
        "boxes": ("float32", [1, 1, 4]),
        "objectness": ("float32", [1, 1]),
        "text_embeds": ("float32", ["Q", 3]),
        **{name: ("float32", [1]) for name in ("iou_threshold", "sigma", "min_score")},
        **{name: ("int64", [1]) for name in ("method", "per_class", "max_output", "candidates")},
        "kept_boxes": ("float32", ["K", 4]),
        "scores": ("float32", ["K"]),
        "raw_scores": ("float32", ["K"]),
        "classes": ("int64", ["K"]),
    }

    def named(*names: str) -> dict[str, Any]:
        return {name: dict(zip(("dtype", "shape"), tensors[name], strict=True)) for name in names}

    graphs = colours["graphs"]
    plain = {"kind": "image", "size": [8, 8], "resize": "letterbox", "mean": [0.0] * 3, "std": [1.0] * 3}
    graphs["regions"] = {
        "file": "regions.onnx",
        "inputs": {"pixels": {"dtype": "float32", "shape": [1, 3, 8, 8]}},
        "outputs": named(*REGION_OUTPUTS),
        "preprocess": plain,
    }
    graphs["detect"] = {
        "file": "detect.onnx",
        "batch": False,
        "inputs": named(*REGION_OUTPUTS, "text_embeds", *SUPPRESSION),
        "outputs": named(*DETECTED),
    }
    colours["tasks"].append("detect")
    with stage(tmp_path / "detectors", "colours") as staged:
        for name, text in (("regions.onnx", REGIONS), ("detect.onnx", DETECT)):
            (staged / name).write_bytes(parser.parse_model(text).SerializeToString())
        return seal(staged, write(staged)).directory


@pytest.fixture
def segmenter(colours: dict[str, Any], tmp_path: Path, write: Callable[[Path], Manifest]) -> Path:
    """The directory of the sealed bundle, with a graph `dense` of 8 x 8 cells."""
    colours["graphs"]["dense"] = {
        "file": "dense.onnx",
        "inputs": {"pixels": {"dtype": "float32", "shape": ["B", 3, 32, 32]}},
        "outputs": {"patches": {"dtype": "float32", "shape": ["B", 8, 8, 3]}},
        "preprocess": {"kind": "image", "size": [32, 32], "resize": "letterbox", "mean": [0.0] * 3, "std": [1.0] * 3},
    }
    with stage(tmp_path / "segmenters", "colours") as staged:
        (staged / "dense.onnx").write_bytes(parser.parse_model(DENSE).SerializeToString())
        return seal(staged, write(staged)).directory


@pytest.fixture
def mapped(colours: dict[str, Any], sealed: Path) -> Bundle:
    """The bundle with a graph `dense` of 2 x 2 cells of 4 pixels, whose answers a test invents."""
    colours["graphs"]["dense"] = {
        "file": "image.onnx",
        "inputs": {"pixels": {"dtype": "float32", "shape": ["B", 3, 8, 8]}},
        "outputs": {"patches": {"dtype": "float32", "shape": ["B", 2, 2, 3]}},
        "preprocess": {"kind": "image", "size": [8, 8], "resize": "letterbox", "mean": [0.0] * 3, "std": [1.0] * 3},
    }
    bundle = Bundle(read(sealed))
    bundle.manifest = parse(json.dumps(colours).encode(), "colours")
    return bundle


@pytest.fixture
def mapped_finder(finder: Bundle, colours: dict[str, Any]) -> Bundle:
    """The detector with such a graph instead of `regions`."""
    graphs = colours["graphs"]
    graphs["dense"] = {**graphs.pop("regions"), "outputs": {"patches": {"dtype": "float32", "shape": ["B", 2, 2, 3]}}}
    for name, shape in (("class_embeds", [1, "P", 3]), ("boxes", [1, "P", 4]), ("objectness", [1, "P"])):
        graphs["detect"]["inputs"][name]["shape"] = shape
    finder.manifest = parse(json.dumps(colours).encode(), "colours")
    return finder


@pytest.fixture
def bundle(sealed: Path) -> Bundle:
    return Bundle(read(sealed))


@pytest.fixture
def finder(detector: Path) -> Bundle:
    return Bundle(read(detector))


@pytest.fixture
def png() -> Callable[..., bytes]:
    """The bytes of a PNG of one colour."""

    def encode(colour: tuple[int, int, int] | str, size: tuple[int, int] = (8, 6)) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", size, colour).save(file, "PNG")
        return file.getvalue()

    return encode
