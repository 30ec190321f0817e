"""A bundle of hand-made graphs whose answers can be worked out by hand; no torch.

`image` is the mean colour of a picture, made unit; `text` is the sum of its words' vectors, made unit: red, green
and blue are the three axes, every other word is nothing.
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

from models.bundle.bundle import Bundle
from models.bundle.manifest import Manifest, parse
from models.bundle.store import read, seal, stage

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
VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "red": 2, "green": 3, "blue": 4}
MANIFEST: dict[str, Any] = {
    "format": 1,
    "name": "colours",
    "precision": "float32",
    "tasks": ["classify", "embed", "raw"],
    "source": {"net": "by_hand", "model": "colours", "license": "CC0-1.0"},
    "graphs": {
        "image": {
            "file": "image.onnx",
            "inputs": {"pixels": {"dtype": "float32", "shape": ["B", 3, 4, 4]}},
            "outputs": {"image_embeds": {"dtype": "float32", "shape": ["B", 3]}},
            "preprocess": {
                "kind": "image",
                "size": [4, 4],
                "shortest": 4,
                "mean": [0.0, 0.0, 0.0],
                "std": [1.0, 1.0, 1.0],
            },
        },
        "text": {
            "file": "text.onnx",
            "inputs": {"ids": {"dtype": "int64", "shape": ["B", "T"]}},
            "outputs": {"text_embeds": {"dtype": "float32", "shape": ["B", 3]}},
            "preprocess": {"kind": "text", "context": 6},
        },
    },
    "prompts": {"name": "single", "params": {"template": "{}"}},
    "head": {"name": "cosine", "params": {"scale": 2.0}},
    "quantization": {"name": "none"},
    "created": "2026-01-01T00:00:00+00:00",
}


def _words() -> str:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str()


@pytest.fixture
def colours() -> dict[str, Any]:
    """The manifest of the hand-made bundle as JSON data, yours to change."""
    return copy.deepcopy(MANIFEST)


@pytest.fixture
def write(colours: dict[str, Any]) -> Callable[[Path], Manifest]:
    """Puts the bundle's files into a directory and returns its manifest, without `files`."""

    def put(directory: Path) -> Manifest:
        for name, text in (("image.onnx", IMAGE), ("text.onnx", TEXT)):
            (directory / name).write_bytes(parser.parse_model(text).SerializeToString())
        (directory / "tokenizer.json").write_text(_words(), encoding="utf-8")
        return parse(json.dumps(colours).encode(), "colours")

    return put


@pytest.fixture
def sealed(tmp_path: Path, write: Callable[[Path], Manifest]) -> Path:
    """The directory of the bundle, sealed."""
    with stage(tmp_path / "bundles", "colours") as staged:
        return seal(staged, write(staged)).directory


@pytest.fixture
def bundle(sealed: Path) -> Bundle:
    return Bundle(read(sealed))


@pytest.fixture
def png() -> Callable[..., bytes]:
    """The bytes of a PNG of one colour."""

    def make(colour: tuple[int, int, int] | str, size: tuple[int, int] = (8, 6)) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", size, colour).save(file, "PNG")
        return file.getvalue()

    return make
