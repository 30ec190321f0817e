"""ONNX graphs for tests, written in ONNX's text syntax."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper, parser

from calmclip.models.flow import Array


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parse(text: str, drawn: Mapping[str, tuple[int, ...]] | None = None, **constants: Array) -> onnx.ModelProto:
    """``drawn``: shapes of random constants. A node's name is its operator and its first output: ``Conv.y``."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    random = np.random.default_rng(0)
    constants = {name: random.standard_normal(shape).astype(np.float32) for name, shape in (drawn or {}).items()} | {
        name: np.asarray(array) for name, array in constants.items()
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    for node in model.graph.node:
        node.name = f"{node.op_type}.{node.output[0]}"
    return model
