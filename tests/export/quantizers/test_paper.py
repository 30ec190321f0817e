"""The quantizers paper and fast. Oracles: the paper's estimators in float64; lists of tensors counted by hand."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from calmclip.export import rewrites
from calmclip.export.coverage import count
from calmclip.export.graph import tap
from calmclip.export.nets import Tower
from calmclip.export.parity import compare, onnx_run
from calmclip.export.qdq import scale_and_zero
from calmclip.export.quantizers import fast, paper
from calmclip.export.quantizers.sites import Kind, find_sites
from calmclip.export.towers.attention import Softmax
from calmclip.export.trace import to_onnx
from calmclip.models.flow import Array, Arrays
from tests.export.graphs import parse
from tests.towers import HEADS, KINDS, LAYERS, WIDTH, feeds_of, state_of, tower_of

CLIPPED = Softmax(-0.05, 1.02)


class Case:
    """A tower of ``kind``, its float graph, and calibration inputs."""

    def __init__(self, kind: str, gate: Any = "none", softmax: Softmax | None = None) -> None:
        torch.manual_seed(0)
        self.kind, self.state = kind, state_of(kind, gate)
        self.tower: Tower = tower_of(kind, self.state, softmax)
        self.model = to_onnx(self.tower)
        self.feeds = feeds_of(self.tower, 8)

    def quantized(self, **params: Any) -> onnx.ModelProto:
        return quantized(self.model, self.feeds, **params)


def quantized(model: onnx.ModelProto, feeds: Sequence[Arrays], **params: Any) -> onnx.ModelProto:
    settings = paper.Params(**({"batch": 3} | params))
    return paper.quantize(model, paper.observe(model, feeds, settings), settings)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {
        "bert": Case("bert", "mlp", CLIPPED),
        "opt": Case("opt", "linear"),
        "vit": Case("vit", "none"),
        "clip": Case("clip", "all_heads", CLIPPED),
    }


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def constants(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def steps(model: onnx.ModelProto) -> dict[str, tuple[Array, Array]]:
    """Tensor -> scale and zero point of its QuantizeLinear."""
    fixed = constants(model)
    return {
        node.input[0]: (fixed[node.input[1]], fixed[node.input[2]])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }


# -- the tensors


def test_the_8_bit_tensors_are_those_counted_by_hand(case: Case):
    """A block has q, k, v, scores, the product with v, the output of attention, a sum, a norm, two layers of the MLP, a
    sum, and a norm. A gate adds its output. In the last block of vit and clip q is a separate product."""
    sites = find_sites(case.model)
    producers = {name: node.op_type for node in case.model.graph.node for name in node.output}
    kinds = Counter(producers.get(name, name) for name in sites.observed)
    one_token = case.kind in ("vit", "clip")
    act = {"bert": "Gelu", "vit": "Gelu", "opt": "Relu", "clip": "Mul"}[case.kind]
    expected = Counter({
        "Split": 3 * LAYERS - one_token,
        "MatMul": 2 * LAYERS,  # scores, products with v
        "Add": 4 * LAYERS + one_token,  # outputs of attention and MLP, two sums; q of one token
        "LayerNormalization": 2 * LAYERS + 1 + one_token,  # one before or behind the blocks; one more for one token
        act: LAYERS,
    })  # fmt: skip
    expected += {
        "bert": Counter({"Add": 1, "Reshape": LAYERS}),  # sum of tables; outputs of gates
        "opt": Counter({"Add": 1, "Reshape": LAYERS}),
        "clip": Counter({"Add": 1, "Reshape": LAYERS}),
        "vit": Counter({"pixels": 1, "Conv": 1, "Concat": 1}),  # the sum of class token and patches
    }[case.kind]
    assert kinds == expected
    behind_gates = LAYERS if case.kind != "vit" else 0
    assert Counter(sites.observed.values()) == Counter({
        "qkv": 3 * LAYERS, "scores": LAYERS, "mixtures": LAYERS, "linear": 3 * LAYERS + (case.kind == "vit"),
        "sums": 2 * LAYERS + 1, "norms": 2 * LAYERS + 1 + one_token, "inputs": behind_gates + (case.kind == "vit"),
    })  # fmt: skip
    chances = "Clip" if case.kind in ("bert", "clip") else "Softmax"
    assert [producers[name] for name in sites.probabilities] == [chances] * LAYERS
    assert len(sites.tables) == (1 if case.kind == "vit" else 2)


def test_each_of_them_is_quantized_and_no_other_tensor(case: Case):
    sites, scales = find_sites(case.model), steps(case.quantized())
    assert scales.keys() == {*sites.observed, *sites.probabilities, *(moved(case.model, sites))}


def test_kinds_of_tensors_stay_in_float(case: Case):
    everything = get_args(Kind)
    for kind in everything:
        left = steps(case.quantized(floats=(kind,)))
        tensors = {name for name, its in find_sites(case.model).observed.items() if its == kind}
        assert not tensors & left.keys()
        only = case.quantized(floats=tuple({*everything} - {kind}))
        constants_alone = kind in ("weights", "tables")
        assert bool(steps(only)) is not constants_alone
        assert constants_alone == any(
            item.data_type == TensorProto.INT8 and item.dims for item in only.graph.initializer
        )
    run, reference = onnx_run(case.quantized(floats=everything)), onnx_run(case.model)
    for feed in case.feeds[:2]:
        for answer, expected in zip(run(feed).values(), reference(feed).values(), strict=True):
            np.testing.assert_array_equal(answer, expected)


def moved(model: onnx.ModelProto, sites: Any) -> set[str]:
    nodes = {node.name: node for node in model.graph.node}
    return {nodes[name].input[place] for name, place in sites.moved}


def test_head_gates_and_biases_stay_in_float(case: Case):
    model = case.quantized()
    kinds = Counter((item.data_type, tuple(item.dims)) for item in model.graph.initializer if item.dims)
    biases = {tuple(t.shape) for name, t in case.state.items() if name.endswith("bias")}
    assert all(kinds[TensorProto.FLOAT, shape] for shape in biases if len(shape) == 1)
    assert not [item for item in model.graph.initializer if item.data_type == TensorProto.INT32]
    quantized = {item.name: item.int8 for item in count(model, {"B": 1, "T": 9})}
    gates = {"bert": 2 * LAYERS, "opt": LAYERS, "vit": 0, "clip": LAYERS}[case.kind]  # products of a gate
    floats = [name for name, int8 in quantized.items() if not int8]
    assert len(floats) == gates + 1
    assert floats[-1].startswith("Gemm")  # the projection
    assert not any(item.op_type.startswith("Q") and "gate" in " ".join(item.input) for item in model.graph.node)
    masked = {"bert": LAYERS, "opt": LAYERS, "vit": 0, "clip": LAYERS}[case.kind]
    softmaxes = [node.input[0] for node in model.graph.node if node.op_type == "Softmax"]
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    assert Counter(producers[name] for name in softmaxes)["Add"] == masked  # the mask is added to dequantized scores


HEADED = """g (float[B, 4] x) => (float[B, 8] y)
    {
        z = MatMul (x, first)
        a = MatMul (z, up)
        b = Relu (a)
        c = MatMul (b, down)
        d = SUM
        e = LayerNormalization (d, gain)
        f = MatMul (e, dense)
        h = Gelu (f)
        i = LayerNormalization (h, gain)
        y = MatMul (i, decoder)
    }"""


@pytest.mark.parametrize(
    ("sum_", "weights", "tensors"),
    [
        ("Add (z, c)", ["first", "up", "down"], "x z b c d e"),  # BERT: dense, its norm and the decoder are the head
        ("Sqrt (c)", ["first", "up", "down", "dense"], "x z b c e h i"),  # without a sum, the last product is the head
    ],
)
def test_the_head_follows_the_last_sum(sum_: str, weights: list[str], tensors: str):
    shapes = {"first": (4, 4), "up": (4, 6), "down": (6, 4), "gain": (4,), "dense": (4, 4), "decoder": (4, 8)}
    model = parse(HEADED.replace("SUM", sum_), shapes)
    sites, read = find_sites(model), {node.name: node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    assert [read[name] for name in sites.weights] == weights
    assert {*sites.observed} == {*tensors.split()}


# -- the estimators


def expected_range(values: Sequence[Array], batch: int, percentile: float) -> tuple[float, float]:
    """float64: the running mean (momentum 0.9) of the lower and the upper percentile of each batch."""
    low = high = None
    for start in range(0, len(values), batch):
        numbers = np.concatenate([array.reshape(-1) for array in values[start : start + batch]]).astype(np.float64)
        ends = np.percentile(numbers, [100 - percentile, percentile])
        low = ends[0] if low is None else 0.9 * low + 0.1 * ends[0]
        high = ends[1] if high is None else 0.9 * high + 0.1 * ends[1]
    return min(low, 0.0), max(high, 0.0)


@pytest.mark.parametrize("percentile", [100.0, 99.0])
def test_activations_have_the_running_range_of_their_batches(case: Case, percentile: float):
    """Eight rows in batches of three, three and two; each text has another length."""
    scales = steps(case.quantized(percentile=percentile))
    names = list(find_sites(case.model).observed)
    run = tap(case.model, names)
    outputs = [run(feed) for feed in case.feeds]
    for name in names:
        low, high = expected_range([output[name] for output in outputs], 3, percentile)
        scale, zero = scales[name]
        assert (scale.shape, zero.shape, zero.dtype) == ((), (), np.uint8)
        np.testing.assert_allclose(scale, (high - low) / 255, rtol=1e-6, err_msg=name)
        assert zero == np.clip(np.rint(-low / ((high - low) / 255)), 0, 255), name


def test_probabilities_have_the_fixed_scale(case: Case):
    scales, sites = steps(case.quantized()), find_sites(case.model)
    assert len(sites.probabilities) == LAYERS
    for name in sites.probabilities:
        scale, zero = scales[name]
        assert scale.tobytes() == np.float32(1 / 255).tobytes()
        assert (zero, zero.dtype) == (0, np.uint8)


def test_a_moved_tensor_keeps_its_scale(case: Case):
    scales, sites = steps(case.quantized()), find_sites(case.model)
    nodes = {node.name: node for node in case.model.graph.node}
    open_ = case.kind == "vit"
    assert len(sites.moved) == 3 * LAYERS + open_ * LAYERS  # q, k, v; outputs of attention without gates
    for (name, place), site in sites.moved.items():
        assert scales[nodes[name].input[place]] == scales[site]


def expected_scale(weight: Array, bits: int, how: str) -> float:
    """float64. The grid is [-2^(b-1), 2^(b-1) - 1] and symmetric."""
    weight, most = weight.astype(np.float64), 2 ** (bits - 1) - 1
    largest = np.abs(weight).max()
    if how == "minmax":
        return largest / most
    tried = [(largest + 0.5) * i / 100 / most for i in range(1, 101)]
    errors = [np.square(np.clip(np.rint(weight / s), -most - 1, most) * s - weight).sum() for s in tried]
    return tried[int(np.argmin(errors))]


def expected_weights(case: Case) -> list[Tensor]:
    """In the order of the graph, folded as the tower folds: the scale of attention, the type of a token, the bias of
    the patches. q, k and v are separate."""
    state = {name: tensor.clone() for name, tensor in case.state.items()}
    weights = []
    if case.kind == "vit":
        weights += [state["patch.weight"], state["positions"][1:] + state["patch.bias"]]
    else:
        weights.append(state["tokens.weight"])
        weights.append(state["positions"] + (state["types"][0] if "types" in state else 0))
    for i in range(LAYERS):
        q, k, v = state[f"blocks.{i}.attn.qkv.weight"].split(WIDTH)
        q = q * (WIDTH // HEADS) ** -0.5
        last = i == LAYERS - 1 and case.kind in ("vit", "clip")
        weights += [k, v, q] if last else [q, k, v]
        weights += [state[f"blocks.{i}.{name}.weight"] for name in ("attn.out", "mlp.up", "mlp.down")]
    return weights


def weights_of(model: onnx.ModelProto) -> list[tuple[Array, float]]:
    """The int8 tensors and their scales, in the order of the graph. A merged tensor is split into its pieces."""
    fixed, pieces_by_name = constants(model), {}
    for name in (name for node in model.graph.node for name in node.input if name in fixed):
        if fixed[name].dtype == np.int8 and fixed[name].ndim > 1:
            scale = np.broadcast_to(fixed[f"{name}_step"], fixed[name].shape[-1:])
            ends = [0, *(np.flatnonzero(np.diff(scale)) + 1), len(scale)]
            pieces_by_name[name] = [(fixed[name][..., a:b], float(scale[a])) for a, b in pairwise(ends)]
    return [piece for pieces in pieces_by_name.values() for piece in pieces]


@pytest.mark.parametrize("how", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_weights_have_the_scale_of_the_estimator_and_lie_on_its_grid(case: Case, bits: int, how: str):
    weights, expected = weights_of(case.quantized(weights=how, weight_bits=bits)), expected_weights(case)
    assert len(weights) == len(expected) == 6 * LAYERS + 2
    weights[:2] = sorted(weights[:2], key=lambda pair: len(pair[0]))  # tables and patches, in any order
    expected[:2] = sorted(expected[:2], key=len)
    for (integers, scale), tensor in zip(weights, expected, strict=True):
        weight = tensor.numpy().astype(np.float64)
        want = expected_scale(weight, bits, how)
        assert scale == pytest.approx(want, rel=1e-6)
        weight = (
            weight
            if weight.ndim == 4 or (weight.shape == integers.shape and integers.shape[0] != integers.shape[1])
            else weight.T
        )
        exact = weight / want
        sure = np.abs(exact % 1 - 0.5) > 1e-4  # not at a tie
        assert np.array_equal(integers[sure], np.clip(np.rint(exact), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)[sure])


def test_a_weight_without_a_negative_number_is_unsigned():
    weight = np.array([[0, 1], [2.55, 0.014]], np.float32)
    model = parse("g (float[B, 2] x) => (float[B, 2] y) { z = MatMul (x, w) y = MatMul (z, v) }", w=weight, v=weight)
    fixed = constants(quantized(model, [{"x": np.ones((1, 2), np.float32)}]))
    assert np.array_equal(fixed["w_uint8"], np.array([[0, 100], [255, 1]], np.uint8))
    assert fixed["w_uint8_step"] == pytest.approx(0.01)


LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")


def convolution(w: Array, b: Array, level: str, **params: Any) -> tuple[Array, Array]:
    """A 2 x 2 window on 8 pictures of 2 x 2 -> the INT8 outputs, and the exact ones."""
    model = parse(f"g (float[B, 1, 2, 2] x) => (float[B, {len(b)}, 1, 1] y) {{ y = Conv (x, w, b) }}", w=w, b=b)
    x = np.random.default_rng(0).normal(size=(8, 1, 2, 2)).astype(np.float32)
    int8 = quantized(model, [{"x": x}], head=True, **params)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(int8.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0][..., 0, 0], np.einsum("bchw,nchw->bn", x, w) + b


@pytest.mark.parametrize("level", LEVELS)
def test_a_convolution_with_a_scale_per_channel_has_such_a_bias(level: str):
    """With and without fusion by the runtime."""
    w = np.array([[1, 2, 3, 4], [-0.1, 0.2, -0.3, 0.4]], np.float32).reshape(2, 1, 2, 2)
    outputs, expected = convolution(w, np.array([5, -0.5], np.float32), level, per_channel=True)
    assert np.abs(outputs - expected).max() < 0.01 * np.ptp(expected)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_a_channel_with_tiny_weights_keeps_its_bias(level: str, per_channel: bool):
    """Folded norms give such channels. Their bias, too, is an int32 times both scales."""
    w = np.array([[1, 2, 3, 4], [1e-10, -1e-10, 1e-10, 0]], np.float32).reshape(2, 1, 2, 2)
    b = np.array([0, 3], np.float32)
    for channels in (slice(0, 2), slice(1, 2)):
        outputs, expected = convolution(w[channels], b[channels], level, per_channel=per_channel)
        assert np.abs(outputs - expected).max() < 0.01 * np.abs(expected).max()


def test_an_activation_of_6_bits_has_no_more_than_64_values(cases: dict[str, Case]):
    case = cases["opt"]
    model = case.quantized(activation_bits=6)
    scales = steps(model)
    run = tap(model, ["LayerNormalization_1_back", "Softmax_0_back"])
    low, high = paper.observe(case.model, case.feeds, paper.Params(batch=3))["LayerNormalization_1"]
    scale, zero = scales["LayerNormalization_1_cut"]
    assert scale == pytest.approx((high - low) / 63, rel=1e-6)
    for feed in feeds_of(case.tower, 4, seed=7):  # some values are beyond the calibrated range
        norm, chances = run(feed).values()
        assert {*np.rint(norm / scale + zero).reshape(-1)} <= {*range(64)}
        assert {*np.rint(chances * 63).reshape(-1)} <= {*range(64)}


def test_quantized_values_equal_golden_vectors():
    """Method reference A.6, computed outside this project's code: [-1, -.3, 0, .25, 3] over [-1, 3]."""
    scale, zero = scale_and_zero(-1.0, 3.0)
    integers = np.clip(np.rint(np.array([-1, -0.3, 0, 0.25, 3]) / scale) + zero, 0, 255)
    expected = [-1.00392157, -0.29803922, 0, 0.25098039, 2.99607843]
    np.testing.assert_allclose((integers - zero) * scale, expected, atol=1e-7)


# -- the accuracy


def test_the_runtime_multiplies_in_integers(case: Case, tmp_path: Path):
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(case.quantized().SerializeToString(), settings, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    gates = {"bert": 2 * LAYERS, "opt": LAYERS, "vit": 0, "clip": LAYERS}[case.kind]
    assert kinds["QLinearMatMul"] == 2 * LAYERS  # attention
    assert kinds["MatMulIntegerToFloat"] == 4 * LAYERS + (case.kind in ("vit", "clip"))  # their outputs get a bias
    assert kinds["QLinearConv"] == (case.kind == "vit")
    assert (kinds["MatMul"], kinds["Gemm"]) == (gates, 1)


def test_our_softmax_replaces_the_quantized_one(case: Case, library: Any):
    model = case.quantized()
    rewritten = rewrites.apply(model, rewrites.swaps())
    rule = "clipped_softmax" if case.kind in ("bert", "clip") else "softmax"
    assert {name: rewritten.counts[name] for name in ("clipped_softmax", "softmax")} == {
        "clipped_softmax": 0,
        "softmax": 0,
        rule: LAYERS,
    }
    for ops in (None, library):
        numbers = compare(onnx_run(model), onnx_run(rewritten.model, library=ops), feeds_of(case.tower, 4, seed=1))
        assert numbers["features"]["cosine_min"] > 0.999


def noise(case: Case, model: onnx.ModelProto, **params: Any) -> dict[str, float]:
    """The float graph ``model`` against its INT8 graph: the cosine, and the squared error over the squared output."""
    return agreement_of(case, model, quantized(model, case.feeds, **params))


def agreement_of(case: Case, model: onnx.ModelProto, other: onnx.ModelProto) -> dict[str, float]:
    agreement = compare(onnx_run(model), onnx_run(other), feeds_of(case.tower, 16, seed=1))["features"]
    return {"cosine": agreement["cosine"], "error": 10 ** (-agreement["sqnr_db"] / 10)}


def test_int8_towers_are_near_float_towers(case: Case):
    assert noise(case, case.model)["cosine"] > 0.999


def edited(model: onnx.ModelProto, arrays: Mapping[str, Array]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return copy


def matrices(model: onnx.ModelProto) -> list[str]:
    """The names of the blocks' weights, in the order of the graph: q k v, out, up, down, and so on."""
    names = find_sites(model).weights
    return [node.input[1] for node in model.graph.node if node.name in names and node.op_type == "MatMul"]


def planted(model: onnx.ModelProto, size: float) -> onnx.ModelProto:
    """One output channel of the first MLP is ``size`` times as large; its neighbour is the opposite, so the mean stays.
    The gains of the norms that read it restore the other channels, as in trained nets."""
    fixed = constants(model)
    arrays = {}
    for norm in ("blocks.1.norm1", "blocks.1.norm2", "norm_post"):
        arrays[f"{norm}.weight"] = fixed[f"{norm}.weight"] * np.float32(size * (2 / WIDTH) ** 0.5)
        arrays[f"{norm}.weight"][3:5] /= size
    for name in (matrices(model)[3], "blocks.0.mlp.down.bias"):
        arrays[name] = fixed[name].copy()
        arrays[name][..., 3] *= size
        arrays[name][..., 4] = -arrays[name][..., 3]
    return edited(model, arrays)


@pytest.mark.parametrize("kind", ["opt", "vit"])
def test_an_outlier_channel_costs_the_accuracy_of_the_others(cases: dict[str, Case], kind: str):
    """As the paper reports: the loss is small without the outlier and large with it."""
    case = cases[kind]
    assert noise(case, planted(case.model, 1.0))["error"] < 0.005
    assert noise(case, planted(case.model, 1000.0))["error"] > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_of_least_squared_error_help_against_a_weight_outlier(cases: dict[str, Case], kind: str):
    """One number of each matrix is 6 times the largest. With 4-bit minmax ranges, the others have 2 steps."""
    case, far = cases[kind], {}
    for name in matrices(case.model):
        far[name] = constants(case.model)[name].copy()
        far[name].reshape(-1)[7] = 6 * np.abs(far[name]).max()
    model = edited(case.model, far)
    assert noise(case, model, weight_bits=4)["error"] > 2 * noise(case, model, weight_bits=4, weights="mse")["error"]


def test_fast_leaves_no_product_in_float(case: Case):
    params = fast.Params()
    model = fast.quantize(case.model, fast.observe(case.model, case.feeds, params), params)
    assert not [product.name for product in count(model, {"B": 1, "T": 9}) if not product.int8]
    assert agreement_of(case, case.model, model)["cosine"] > 0.999
    plain = fast.Params(alpha=None)
    fixed = constants(fast.quantize(case.model, fast.observe(case.model, case.feeds, plain), plain))
    weight = case.state["projection.weight"].numpy().astype(np.float64)
    np.testing.assert_allclose(fixed["projection.weight_int8_step"], np.abs(weight).max(axis=1) / 127, rtol=1e-6)
