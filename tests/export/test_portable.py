"""Graphs of standard operators alone. Oracles: ONNX's own reading of a file, the checker's opsets, hand-made graphs."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from calmclip.export.parity import onnx_run
from calmclip.export.portable import is_portable, portable
from calmclip.export.recipe import load_recipe
from calmclip.models.bundle.opsets import opsets
from calmclip.models.errors import BadRequest, BundleInvalid, ExportError
from tests.export.test_recipe import NET

FUNCTION = """<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
    g (float[N, 4] x) => (float[N, 4] y) { a = local.twice (x) b = local.twice (a) y = ACTIVATION (b) }
    <domain: "local", opset_import: ["" : 20]> twice (v) => (w) { w = Add (v, v) }"""


def graph(activation: str) -> onnx.ModelProto:
    return parser.parse_model(FUNCTION.replace("ACTIVATION", activation))


@pytest.mark.parametrize(("activation", "opset", "ir"), [("Relu", 13, 7), ("Mish", 18, 8), ("Gelu", 20, 9)])
def test_functions_are_inlined_in_the_opset_that_has_every_operator(activation: str, opset: int, ir: int):
    """Mish came with opset 18, Gelu with 20. x is added to itself twice."""
    plain = portable(graph(activation), "g")
    assert is_portable(plain)
    assert [(entry.domain, entry.version) for entry in plain.opset_import] == [("", opset)]
    assert plain.ir_version == ir
    assert sorted(node.op_type for node in plain.graph.node) == sorted(["Add", "Add", activation])
    if activation == "Relu":
        x = np.array([[-1, 0, 0.5, 2]], np.float32)
        assert onnx_run(plain)({"x": x})["y"].tolist() == [[0, 0, 2, 8]]


def test_an_operator_of_another_domain_is_refused_also_in_a_loop():
    text = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (int64 n, bool go, float[4] x) => (float[4] y) {
            y = Loop (n, go, x) <body = step (int64 i, bool on, float[4] v) => (bool still, float[4] w) {
                still = Identity (on) w = com.microsoft.FastGelu (v) }> }"""
    with pytest.raises(ExportError, match=r"image in INT8: it has com\.microsoft\.FastGelu; .* without --portable"):
        portable(parser.parse_model(text), "image in INT8")


@pytest.mark.parametrize(("key", "value"), [("rewrites", "['softmax']"), ("picture_input", "true")])
def test_a_portable_recipe_refuses_what_puts_our_operators_in(key: str, value: str, tmp_path: Path):
    file = tmp_path / "r.toml"
    file.write_text(f"{key} = {value}\n")
    with pytest.raises(BadRequest, match=f"portable and {key} = .* are set; .* Leave {key} out"):
        load_recipe("x", "n", NET, file, portable=True)
    file.write_text("portable = true\nrewrites = []\n")
    recipe = load_recipe("some/ViT B", "n", NET, file)
    assert (recipe.rewrites, recipe.name, recipe.public()["portable"]) == ((), "vit-b-portable", True)
    assert load_recipe("x", "n", NET, file, name="mine").name == "mine"
    assert load_recipe("x", "n", NET).rewrites


def test_the_operator_sets_of_a_file_are_those_that_onnx_reads(tmp_path: Path):
    model = graph("Relu")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1 << 16), "weight"))
    model.metadata_props.add(key="note", value="x" * 5000)  # longer than a field whose value is read
    file = tmp_path / "g.onnx"
    onnx.save(model, file)
    assert opsets(file) == ({"": 20, "local": 1}, 1)
    for damaged in (file.read_bytes() + b"\xc2", b"\x0f"):  # ends inside a number; a type that does not exist
        file.write_bytes(damaged)
        with pytest.raises(BundleInvalid, match="no ONNX file"):
            opsets(file)
