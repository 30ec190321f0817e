"""A routed expert that no calibration input reaches. Oracle: the float graph, whose router is then changed to send it
every token, as that of the INT8 graph."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from calmclip.export.calibrate import hold_out
from calmclip.export.checkpoints import Weights
from calmclip.export.graph import constants, module_of
from calmclip.export.nets.clip import load
from calmclip.export.parity import onnx_run
from calmclip.export.quantizers import QUANTIZERS, Goal, Settled
from calmclip.export.quantizers.ranges import collect
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.store import read
from calmclip.models.cli import main
from calmclip.models.errors import ExportError
from calmclip.models.flow import Array
from tests.tiny_layouts import openai_like

STARVED, LEAD = 3, 20.0


def state() -> dict[str, torch.Tensor]:
    """Channel 1 of a router's input is 1 for every token, and the row of expert `STARVED` subtracts `LEAD` for it."""
    tensors = openai_like.clip_moe_state()
    for name in [name for name in tensors if name.endswith(".gate.weight")]:
        norm = name.replace("gate.weight", "ln_2")
        tensors[f"{norm}.weight"][1], tensors[f"{norm}.bias"][1] = 0, 1
        tensors[name] *= 0.2
        tensors[name][:, 1] = 0
        tensors[name][STARVED, 1] = -LEAD
    return tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    file = openai_like.saved(state(), tmp_path_factory.mktemp("starved"))
    return to_onnx(load(str(file), Weights(experts="routed")).towers["text"])


def texts(count: int, seed: int) -> list[dict[str, Array]]:
    rows = np.random.default_rng(seed).integers(1, 49406, (count, 1, 12))
    rows[:, :, 0], rows[:, :, -1] = 49406, 49407
    return [{"ids": row} for row in rows]


def router(model: onnx.ModelProto) -> onnx.NodeProto:
    (node,) = (node for node in model.graph.node if module_of(node).endswith("mlp.gate"))
    return node


def settled(name: str, model: onnx.ModelProto) -> Settled:
    """With the router in float."""
    quantizer = QUANTIZERS.get(name)
    params = quantizer.params(keep=(router(model).name,))
    if quantizer.search:
        return quantizer.search(model, *hold_out(texts(24, 0)), params, Goal())
    return Settled(name, params, quantizer.observe(model, texts(24, 0), params))


def forced(model: onnx.ModelProto, weight: str) -> onnx.ModelProto:
    """The graph whose router sends every token to `STARVED`, with nearly all of its weight."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = constants(changed)[weight]
    matrix = numpy_helper.to_array(tensor).copy()  # [W, E]
    matrix[1, STARVED] = LEAD
    tensor.CopyFrom(numpy_helper.from_array(matrix, weight))
    return changed


@pytest.mark.parametrize("name", ["static", "smooth", "paper", "search"])
def test_it_answers_as_in_float_when_a_token_reaches_it(name: str, model: onnx.ModelProto):
    done = settled(name, model)
    assert (done.starved or done.ranges.starved) == ("blocks.1.mlp.experts.3",)
    integers = QUANTIZERS.get(done.quantizer).quantize(model, done.ranges, done.params)
    graphs = (model, *(forced(graph, router(model).input[1]) for graph in (model, integers)))
    feeds = texts(16, 7)
    plain, want, answers = (
        np.concatenate([run(feed)["text_embeds"] for feed in feeds]) for run in map(onnx_run, graphs)
    )
    assert np.sum(plain * want, 1).mean() < 0.97  # the expert matters
    assert np.sum(answers * want, 1).mean() >= 0.99


def test_its_ranges_are_the_widest_of_the_other_experts(model: onnx.ModelProto):
    ranges = settled("static", model).ranges
    mixed = [node for node in model.graph.node if ".experts." in module_of(node) and node.op_type == "Gemm"]
    for end in ("up", "down"):
        *others, last = (ranges[node.input[0]] for node in mixed if module_of(node).endswith(end))
        assert last == (min(low for low, _ in others), max(high for _, high in others))


def test_a_layer_without_tokens_is_still_refused(model: onnx.ModelProto):
    """No expert has values, so none can lend them."""
    names = [node.input[0] for node in model.graph.node if ".experts." in module_of(node) and node.op_type == "Gemm"]
    with pytest.raises(ExportError, match=r"no calibration input gives Gather_\d+ a value, and 1 tensors in all"):
        collect(model, texts(2, 0), [names[-2]], lambda name, values: values.size)


@pytest.mark.slow
def test_export_says_which_experts_had_no_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = openai_like.saved(state(), tmp_path)
    assert main(["export", str(file), "--experts", "routed", "--out", str(tmp_path), "--name", "moe"]) == 0
    said = capsys.readouterr().out
    for role in ("image", "text"):
        assert f"{role}: no calibration input reaches blocks.1.mlp.experts.3, which takes " in said
    (bundle,) = tmp_path.glob("moe-*/")
    graphs = json.loads((bundle / "report.json").read_text())["graphs"]
    assert [graphs[role]["starved_experts"] for role in ("image", "text")] == [["blocks.1.mlp.experts.3"]] * 2
    assert main(["check", read(bundle).manifest.name, "--bundles", str(tmp_path)]) == 0
