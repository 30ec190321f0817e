"""Quantized graphs before and after a rule. The oracle is the graph before the rule, run by ONNX Runtime without
fusion, because fused nodes add in another order."""

import collections
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper, parser

from calmclip.export.parity import onnx_run
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.library import Library, find

START = "x8 = QuantizeLinear (x, step, mid) xb = DequantizeLinear (x8, step, mid)"


def graph(nodes: str, ends: str, constants: Mapping[str, Array]) -> onnx.ModelProto:
    """``ends``: inputs and outputs in ONNX's text syntax. The graph gets those ``constants`` that its nodes read."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {ends} {{ {nodes} }}')
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items() if n in read)
    return model


def plain(model: onnx.ModelProto, feeds: Arrays) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs = ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)
    return {value.name: array for value, array in zip(model.graph.output, outputs, strict=True)}


def same(model: onnx.ModelProto, done: onnx.ModelProto, feeds: Arrays, most: float = 0.01) -> None:
    """``done`` is valid and answers as ``model``. Next to ties at most a fraction ``most`` differs, by .0511."""
    onnx.checker.check_model(done, full_check=True)
    for name, expected in plain(model, feeds).items():
        assert len(np.unique(expected)) > 20
        for library in (None, find()):
            got = onnx_run(done, library=library)(feeds)[name]
            assert got.shape == expected.shape
            apart = np.abs(got - expected)
            assert (apart > 1e-6).mean() < most
            assert apart.max() < 0.052


def kinds(model: onnx.ModelProto, folder: Path, library: Library) -> collections.Counter[str]:
    """Op types of the graph that ONNX Runtime optimizes, counted."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.register_custom_ops_library(str(library.path))
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
