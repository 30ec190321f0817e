"""GRAIN's regions against its definition in torch, on random weights; and the image graph as a part of that graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from calmclip.export import pipeline
from calmclip.export.adapters import load_tensors, tensors
from calmclip.export.graph import cut
from calmclip.export.nets import Net, ready
from calmclip.export.nets.clip import load, summary
from calmclip.export.parity import onnx_run, torch_run
from calmclip.export.recipe import Quantize, Recipe
from calmclip.export.trace import to_onnx
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays
from tests.tiny_layouts import openai_like

SIDE = 32


@pytest.fixture(scope="module")
def path(checkpoint: Any) -> Path:
    grain: Path = checkpoint("grain")
    return grain


@pytest.fixture(scope="module")
def net(path: Path) -> Net:
    return load(str(path))


@pytest.fixture(scope="module")
def graph(net: Net) -> onnx.ModelProto:
    return to_onnx(net.towers["regions"])


@pytest.fixture(scope="module")
def pixels() -> Array:
    return np.random.default_rng(7).normal(size=(3, 3, SIDE, SIDE)).astype(np.float32)


@pytest.fixture(scope="module")
@torch.inference_mode()
def want(pixels: Array) -> Arrays:
    backbone, decoder = openai_like.Slip(qk_norm=True), openai_like.Decoder()
    tokens = backbone.visual.forward_features(torch.from_numpy(pixels))
    vectors, boxes = decoder.regions(tokens, SIDE)
    image = torch.nn.functional.normalize(decoder(tokens), dim=-1)
    return {"class_embeds": vectors.numpy(), "boxes": boxes.numpy(), "image_embeds": image.numpy()}


def test_regions_are_those_of_the_definition(net: Net, graph: onnx.ModelProto, pixels: Array, want: Arrays):
    for run in (torch_run(net.towers["regions"]), onnx_run(graph, threads=1)):
        answers = run({"pixels": pixels})
        assert answers["class_embeds"] == pytest.approx(want["class_embeds"], abs=2e-5)
        assert answers["boxes"] == pytest.approx(want["boxes"], abs=SIDE * 2e-5)
        assert answers["image_embeds"] == pytest.approx(want["image_embeds"], abs=2e-5)
        assert answers["objectness"].tolist() == [[1.0, 1.0]] * 3
    assert np.abs(want["class_embeds"][0] - want["class_embeds"][1]).max() > 0.01  # the comparison means something
    assert np.abs(want["boxes"][0] - want["boxes"][1]).max() > 0.01


def test_the_image_graph_is_a_part_of_the_graph_of_regions(graph: onnx.ModelProto, pixels: Array, want: Arrays):
    part = cut(graph, ["image_embeds"])
    assert [*onnx_run(part)({"pixels": pixels})] == ["image_embeds"]
    assert onnx_run(part, threads=1)({"pixels": pixels})["image_embeds"] == pytest.approx(
        want["image_embeds"], abs=2e-5
    )
    whole = {tensor.name: tensor.raw_data for tensor in graph.graph.initializer}
    assert {tensor.name: tensor.raw_data for tensor in part.graph.initializer}.items() < whole.items()
    onnx.checker.check_model(part, full_check=True)


def test_a_cut_keeps_only_the_inputs_that_it_reads():
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[2] a, float[2] b) => (float[2] x, float[2] y) <float[2] c = {1, 2}, float[2] d = {3, 4}>
        { m = Add (a, c)  x = Relu (m)  n = Mul (b, d)  y = Add (n, m) }
    """)
    part = cut(model, ["x"])
    assert [node.op_type for node in part.graph.node] == ["Add", "Relu"]
    assert [value.name for value in (*part.graph.input, *part.graph.output)] == ["a", "x"]
    assert [tensor.name for tensor in part.graph.initializer] == ["c"]


def test_adapters_see_each_weight_once_and_change_both_graphs(path: Path, pixels: Array):
    unfolded = load(str(path), fold=False)
    state = tensors(unfolded)
    assert sum("box.0.weight" in name for name in state) == 1
    before = {role: torch_run(ready(unfolded).towers[role])({"pixels": pixels}) for role in ("image", "regions")}
    load_tensors(unfolded, {**state, "image.projection.weight": -state["image.projection.weight"]})
    folded = ready(unfolded)
    for role in ("image", "regions"):
        after = torch_run(folded.towers[role])({"pixels": pixels})
        assert after["image_embeds"] == pytest.approx(-before[role]["image_embeds"], abs=1e-6)


def test_a_graph_and_its_part_have_one_quantizer(net: Net):
    recipe = Recipe(checkpoint="grain", net="clip", name="grain", quantize={"regions": Quantize(name="static")})
    assert pipeline._quantizer(recipe, net, "image").name == "static"
    both = recipe.model_copy(update={"quantize": {**recipe.quantize, "image": Quantize(name="none")}})
    with pytest.raises(BadRequest, match=r"quantize\.image is none, but the graph has the weights of regions"):
        pipeline._quantizer(both, net, "image")


def test_boxes_are_compared_in_one_row_for_a_picture():
    rows = summary({"boxes": np.full((2, 3, 4), 16.0), "objectness": np.ones((2, 3))}, side=32)
    assert rows["boxes"].tolist() == [[0.5] * 12] * 2
