"""`words-int8`: a bundle that reads vectors in place of texts, whose answers are worked out by hand.

The vector of a picture is its mean colour. A text is a vector [4] of another model: the first three numbers are its
colour, and the fourth counts for nothing. Both are made unit vectors. The head is a cosine with scale 10.
"""

from pathlib import Path
from typing import Any

import numpy as np
from onnx import parser

from calmclip.models.bundle.manifest import Manifest
from calmclip.models.bundle.store import Sealed, seal, stage

DIM, MODEL, SCALE = 4, "org/language-model", 10.0
RED, BLUE, YELLOW = (3.0, 0.0, 0.0, 1.0), (0.0, 0.0, 2.0, 5.0), (1.0, 1.0, 0.0, -2.0)
IMAGE = """<ir_version: 8, opset_import: ["" : 18]>
image (float[B, 3, 8, 8] pixels) => (float[B, 3] image_embeds) {
    mean = GlobalAveragePool (pixels)
    row = Flatten (mean)
    image_embeds = LpNormalization <axis = 1, p = 2> (row)
}"""
TEXT = """<ir_version: 8, opset_import: ["" : 18]>
text (float[B, 4] vectors) => (float[B, 3] text_embeds)
<float[4, 3] colours = {1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0}> {
    row = MatMul (vectors, colours)
    text_embeds = LpNormalization <axis = 1, p = 2> (row)
}"""


def seal_bundle(bundles: Path, name: str = "words-int8", **preprocess: Any) -> Sealed:
    """``preprocess``: other settings of the graph `text`."""

    def graph(role: str, dtype: str, shape: tuple[int | str, ...], fed: dict[str, Any]) -> dict[str, Any]:
        return {
            "file": f"{role}.onnx",
            "inputs": {fed.get("input", "pixels"): {"dtype": dtype, "shape": shape}},
            "outputs": {f"{role}_embeds": {"dtype": "float32", "shape": ("B", 3)}},
            "preprocess": fed,
        }

    picture = {"kind": "image", "size": (8, 8), "resize": "exact", "resample": "bilinear"}
    words = {"kind": "vector", "input": "vectors", "dim": DIM, "model": MODEL, **preprocess}
    manifest = Manifest.model_validate(
        {
            "name": name,
            "precision": "int8",
            "tasks": ["classify", "embed"],
            "source": {"net": "hand", "model": "words", "license": "Apache-2.0"},
            "graphs": {
                "image": graph("image", "float32", ("B", 3, 8, 8), {**picture, "mean": (0, 0, 0), "std": (1, 1, 1)}),
                "text": graph("text", "float32", ("B", DIM), words),
            },
            "classifier": {"head": {"name": "cosine", "params": {"scale": SCALE}}},
            "quantization": {"name": "none"},
            "created": "2026-01-01T00:00:00+00:00",
        }
    )
    with stage(bundles, name) as directory:
        for file, text in (("image.onnx", IMAGE), ("text.onnx", TEXT)):
            (directory / file).write_bytes(parser.parse_model(text).SerializeToString())
        return seal(directory, manifest)


def softmax(*logits: float) -> list[float]:
    powers = np.exp(np.array(logits) - max(logits))
    return [float(power) for power in powers / powers.sum()]
