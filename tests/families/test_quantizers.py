"""The contract of every quantizer, on a small tower."""

import numpy as np
import onnx
import pytest
import torch

from calmclip.export.nets import Tower
from calmclip.export.parity import compare, onnx_run
from calmclip.export.quantizers import QUANTIZERS
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Tensor

NAMES = QUANTIZERS.names()
RNG = np.random.default_rng(0)
FEEDS = [{"x": RNG.standard_normal((4, 16)).astype(np.float32)} for _ in range(8)]


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(  # the last layer is a head, which a quantizer may leave in float
        torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 8), torch.nn.Linear(8, 8)
    )
    x, y = Tensor(dtype="float32", shape=("B", 16)), Tensor(dtype="float32", shape=("B", 8))
    return to_onnx(Tower(layers, {"x": x}, {"y": y}, None, quantizer="none"))


def quantized(name: str, graph: onnx.ModelProto) -> onnx.ModelProto:
    quantizer = QUANTIZERS.get(name)
    params = quantizer.params()
    ranges = quantizer.observe(graph, FEEDS, params) if quantizer.observe else {}
    return quantizer.quantize(graph, ranges, params)


@pytest.mark.parametrize("name", NAMES)
def test_answers_stay_close_with_the_same_inputs_outputs_and_standard_operators(name: str, graph: onnx.ModelProto):
    model = quantized(name, graph)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
    for side in ("input", "output"):
        assert [v.name for v in getattr(model.graph, side)] == [v.name for v in getattr(graph.graph, side)]
    statistics = compare(onnx_run(graph), onnx_run(model), FEEDS)["y"]
    assert statistics["cosine_min"] > 0.99
    assert statistics["sqnr_db"] > 25


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_weights_are_stored_in_8_bits(name: str, graph: onnx.ModelProto):
    def stored(model: onnx.ModelProto) -> list[int]:
        return [i.data_type for i in model.graph.initializer if len(i.dims) == 2 and np.prod(i.dims) >= 512]

    assert set(stored(graph)) == {onnx.TensorProto.FLOAT}
    assert set(stored(quantized(name, graph))) == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("name", NAMES)
def test_the_float_graph_is_not_changed_and_two_runs_give_the_same_bytes(name: str, graph: onnx.ModelProto):
    before = graph.SerializeToString(deterministic=True)
    first, second = (quantized(name, graph).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert graph.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", [name for name in NAMES if QUANTIZERS.get(name).observe])
def test_with_fixed_ranges_a_row_does_not_depend_on_other_rows(name: str, graph: onnx.ModelProto):
    run = onnx_run(quantized(name, graph), threads=1)
    x = FEEDS[0]["x"]
    together = run({"x": np.concatenate([x, 100 * x])})["y"]
    # the integers are equal; the runtime converts one row to float in another order than many, so the last bit differs
    np.testing.assert_allclose(together[:1], run({"x": x[:1]})["y"], rtol=0, atol=1e-6)
