"""Bundles whose answers are worked out by hand.

`image` is the mean colour of a picture times a 3 x 3 matrix, `text` the sum of its words' vectors times that matrix;
both are normalized. The matrix is the identity, and lies in a file that both graphs read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import parse
from calmclip.models.bundle.store import seal, stage
from calmclip.models.evals.zero_shot import DataSet
from calmclip.models.runner import Runner, open_bundle
from tests.export.graphs import parse as graph_of

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
IMAGE = """image (float[B, 3, 4, 4] pixels) => (float[B, 3] image_embeds) {
    mean = ReduceMean <keepdims = 0> (pixels, area)
    row = MatMul (mean, matrix)
    image_embeds = LpNormalization <axis = 1, p = 2> (row)
}"""
TEXT = """text (int64[B, T] ids) => (float[B, 3] text_embeds) {
    each = Gather (words, ids)
    sum = ReduceSum <keepdims = 0> (each, tokens)
    row = MatMul (sum, matrix)
    text_embeds = LpNormalization <axis = 1, p = 2> (row)
}"""
MATRIX = np.eye(3, dtype=np.float32)
WORDS = np.concatenate([np.zeros((2, 3), np.float32), np.eye(3, dtype=np.float32)])
Change = Callable[[dict[str, onnx.ModelProto]], None]


def manifest(name: str) -> dict[str, Any]:
    graph: dict[str, Any] = {
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
    }
    return {
        "format": 2, "name": name, "precision": "float", "tasks": ["classify", "embed"],
        "source": {"net": "by_hand", "model": "colours", "license": "CC0-1.0"}, "graphs": graph,
        "classifier": {"templates": ["{}"], "head": {"name": "cosine", "params": {"scale": 2.0}}},
        "quantization": {"name": "none"}, "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip


@pytest.fixture
def colours(tmp_path: Path) -> Callable[..., Path]:
    """Seals the bundle and returns its directory. ``change``: a function that changes its graphs first."""

    def make(name: str = "colours", change: Change = lambda graphs: None) -> Path:
        graphs = {
            "image": graph_of(IMAGE, area=np.array([2, 3])),
            "text": graph_of(TEXT, words=WORDS, tokens=np.array([1])),
        }
        for model in graphs.values():
            matrix = model.graph.initializer.add(
                name="matrix", dims=[3, 3], data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL
            )
            for key, value in (("location", "weights.bin"), ("offset", 0), ("length", 36)):
                matrix.external_data.add(key=key, value=str(value))
        change(graphs)
        with stage(tmp_path / "bundles", name) as staged:
            for role, model in graphs.items():
                (staged / f"{role}.onnx").write_bytes(model.SerializeToString())
            (staged / "weights.bin").write_bytes(MATRIX.tobytes())
            vocabulary = {"[PAD]": 0, "[UNK]": 1, **{word: 2 + i for i, word in enumerate(COLOURS)}}
            tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            (staged / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
            return seal(staged, parse(json.dumps(manifest(name)).encode(), name)).directory

    return make


@pytest.fixture
def runner(colours: Callable[..., Path]) -> Runner:
    return open_bundle(colours(), threads=1)


@pytest.fixture
def bundle(runner: Runner) -> Bundle:
    return runner.bundle


@pytest.fixture
def data() -> DataSet:
    """A red, a green and a blue picture, with their names as labels."""
    pictures = [Image.new("RGB", (4, 4), colour) for colour in COLOURS.values()]
    return DataSet(pictures, [*COLOURS], range(3))
