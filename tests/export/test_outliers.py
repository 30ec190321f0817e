"""Outliers of a graph. Oracles: float64, tensor names counted by hand, a planted outlier."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from calmclip.export import outliers
from calmclip.export.graph import module_of, tap
from calmclip.export.nets import Tower
from calmclip.export.parity import onnx_run
from calmclip.export.quantizers import static
from calmclip.export.towers import Style
from calmclip.export.towers.bert import BertText
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Tensor as Spec
from calmclip.models.errors import ExportError
from calmclip.models.flow import Array, Arrays
from tests.export.graphs import parse

WIDTH, HIDDEN, WORDS, CONTEXT, OUT, LAYERS = 32, 48, 50, 12, 16, 2
EMBEDS = {"embeds": Spec(dtype="float32", shape=("B", OUT))}
IDS = Spec(dtype="int64", shape=("B", "T"))
PIXELS = Spec(dtype="float32", shape=("B", 3, 16, 16))


def state(first: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random weights; no norm is 1 and no bias is 0."""
    shapes = {**first, "projection.weight": (OUT, WIDTH)}
    for i in range(LAYERS):
        layers = {
            "attn.qkv": (3 * WIDTH, WIDTH), "attn.out": (WIDTH, WIDTH),
            "mlp.up": (HIDDEN, WIDTH), "mlp.down": (WIDTH, HIDDEN),
        }  # fmt: skip
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in layers.items()}
        shapes |= {f"blocks.{i}.{name}.bias": shape[:1] for name, shape in layers.items()}
        shapes |= {f"blocks.{i}.{name}.{kind}": (WIDTH,) for name in ("norm1", "norm2") for kind in ("weight", "bias")}
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    return {name: 1 + t if "norm" in name and name.endswith("weight") else t for name, t in tensors.items()}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": (WIDTH,) for kind in ("weight", "bias")}


TEXT = {"tokens.weight": (WORDS, WIDTH), "positions": (CONTEXT, WIDTH)}
VISION = {
    "patch.weight": (WIDTH, 3, 4, 4), "patch.bias": (WIDTH,), "cls": (WIDTH,), "positions": (17, WIDTH),
    **norm("norm_pre"), **norm("norm_post"),
}  # fmt: skip


def vision() -> tuple[nn.Module, dict[str, Spec]]:
    weights = state(VISION)
    return filled(VisionTransformer(weights, Style(heads=2, pool="cls")), weights), {"pixels": PIXELS}


def text() -> tuple[nn.Module, dict[str, Spec]]:
    weights = state({**TEXT, **norm("norm_post")})
    return filled(TextTransformer(weights, Style(heads=2, pool="eot", causal=True)), weights), {"ids": IDS}


def bert() -> tuple[nn.Module, dict[str, Spec]]:
    weights = state({**TEXT, "types": (1, WIDTH), **norm("norm_pre")})
    return filled(BertText(weights, Style(heads=2, pool="mean"), CONTEXT), weights), {"ids": IDS, "mask": IDS}


def filled(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(weights)
    return module.requires_grad_(False)


TOWERS = {"vit": vision, "text": text, "bert": bert}


@pytest.fixture(scope="module")
def traced() -> dict[str, onnx.ModelProto]:
    models = {}
    for name, make in TOWERS.items():
        module, inputs = make()
        module.fold()
        models[name] = to_onnx(Tower(module, inputs, EMBEDS, None, quantizer="none"))
    return models


def pre_norm(block: str) -> list[str]:
    layers = ("norm1", "attn.out", "attn.out (sum)", "norm2", "mlp.down", "mlp.down (sum)")
    return [f"{block}.{name}" for name in layers]


def post_norm(block: str) -> list[str]:
    layers = ("attn.out", "attn.out (sum)", "norm1", "mlp.down", "mlp.down (sum)", "norm2")
    return [f"{block}.{name}" for name in layers]


# The last block of "vit" and "text" has one token.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", ["patch", "norm_pre (input)", "norm_pre", *pre_norm("blocks.0"), *pre_norm("blocks.1"), "norm_post"]),
        ("text", ["blocks.0.norm1 (input)", *pre_norm("blocks.0"), *pre_norm("blocks.1"), "norm_post"]),
        ("bert", ["norm_pre (input)", "norm_pre", *post_norm("blocks.0"), *post_norm("blocks.1")]),
    ],
)
def test_the_papers_tensors_are_measured_in_order_of_depth(traced, name: str, expected: list[str]):
    assert [*outliers.tensors(traced[name]).values()] == expected


@pytest.fixture(scope="module")
def small() -> onnx.ModelProto:
    """A residual block: embeddings, norm, product with bias and scale, sum. The paper does not measure the sum with a
    mask, nor the norm behind an activation."""
    return parse(
        """g (float[B, T, 6] words, float[B, T, 1] mask) => (float[B, T, 6] y) {
            x = Add (words, place)
            n = LayerNormalization <axis = -1> (x, gain)
            p = MatMul (n, w)
            b = Add (p, bias)
            s = Mul (b, scale)
            masked = Add (n, mask)
            other = Mul (masked, scale)
            y = Add (x, s)
            r = Relu (y)
            head = LayerNormalization <axis = -1> (r, gain)
        }""",
        {"place": (6,), "gain": (6,), "w": (6, 6), "bias": (6,), "scale": (6,)},
    )


def rows() -> list[Arrays]:
    """Two rows of different lengths. The second contains an outlier."""
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((1, tokens, 6)).astype(np.float32) for tokens in (4, 7)]
    arrays[1][0, 3, 2] = 80.0
    return [{"words": array, "mask": np.ones((1, array.shape[1], 1), np.float32)} for array in arrays]


def test_each_row_is_measured_and_rows_are_averaged(small: onnx.ModelProto):
    """The formula in exact fractions, on tensors computed in float64."""
    fixed = {item.name: numpy_helper.to_array(item).astype(np.float64) for item in small.graph.initializer}

    def inside(row: Arrays) -> dict[str, Array]:
        x = row["words"].astype(np.float64) + fixed["place"]
        b = normed(x) @ fixed["w"] + fixed["bias"]
        y = x + b * fixed["scale"]
        return {
            "LayerNormalization.n (input)": x,
            "LayerNormalization.n": normed(x),
            "MatMul.p": b,
            "MatMul.p (sum)": y,
        }

    def normed(x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * fixed["gain"]

    def peak(values: Array) -> float:
        flat = [Fraction(float(value)) for value in values.ravel()]
        mean = sum(flat) / len(flat)
        variance = sum((item - mean) ** 2 for item in flat) / (len(flat) - 1)
        return float(sum((item - mean) ** 4 for item in flat) / len(flat) / (variance**2 + Fraction(1, 10**6)))

    wanted = [inside(row) for row in rows()]
    expected = {
        name: (np.mean([np.abs(item[name]).max() for item in wanted]), np.mean([peak(item[name]) for item in wanted]))
        for name in wanted[0]
    }
    measured = outliers.measure(small, iter(rows()))
    assert [*measured["tensors"]] == [*expected]
    for name, pair in expected.items():
        assert measured["tensors"][name] == pytest.approx(pair, rel=1e-4), name
    norms, peaks = (np.array([pair[place] for pair in expected.values()]) for place in (0, 1))
    summary = [measured[f"{of}_{statistic}"] for statistic in ("inf_norm", "kurtosis") for of in ("max", "avg")]
    assert summary == pytest.approx([norms.max(), norms.mean(), peaks.max(), peaks.mean()], rel=1e-4)
    assert measured["inputs"] == 2
    assert f"{peaks[0]:.2g}" == f"{peaks.max():.2g}"
    assert peaks[0] < peaks.max()
    assert measured["worst"][0] == "LayerNormalization.n (input)"  # equal to two digits; the first tensor is named


def test_kurtosis_of_known_numbers():
    """0 0 0 4: mean 1, fourth powers 1 1 1 81, variance 12 / 3. 767 zeros and one 100: 764.0078, by exact fractions.
    Gaussian noise: near 3."""
    assert outliers.kurtosis(np.array([0.0, 0.0, 0.0, 4.0])) == pytest.approx(21 / (16 + 1e-6), rel=1e-12)
    spike = np.zeros((16, 48), np.float32)
    spike[3, 5] = 100.0
    assert outliers.kurtosis(spike) == pytest.approx(764.0078, abs=1e-3)
    assert outliers.kurtosis(np.random.default_rng(0).standard_normal(100_000)) == pytest.approx(3.0, abs=0.1)
    assert outliers.kurtosis(np.ones(7)) == 0.0


def test_a_row_without_tokens_does_not_count(small: onnx.ModelProto):
    empty = {"words": np.zeros((1, 0, 6), np.float32), "mask": np.ones((1, 0, 1), np.float32)}
    measured = outliers.measure(small, [*rows(), empty])
    assert measured == outliers.measure(small, rows()) | {"inputs": 3}
    assert outliers.measure(small, [empty]) == {}


def test_nan_is_an_error_that_names_the_tensor(small: onnx.ModelProto):
    broken, _ = rows()
    broken["words"][0, 1, 1] = np.nan
    with pytest.raises(ExportError, match=r"LayerNormalization\.n \(input\) holds NaN or infinity"):
        outliers.measure(small, [broken])


def test_two_calls_of_a_module_have_two_names(small: onnx.ModelProto):
    model = onnx.ModelProto()
    model.CopyFrom(small)
    again = onnx.helper.make_node("LayerNormalization", ["y", "gain"], ["z"], "LayerNormalization.n", axis=-1)
    model.graph.node.append(again)
    names = [*outliers.tensors(model).values()]
    assert [name for name in names if "(" not in name] == [
        "LayerNormalization.n at n",
        "MatMul.p",
        "LayerNormalization.n at z",
    ]


def test_a_graph_without_layers_has_no_outliers():
    model = parse("g (float[B] x) => (float[B] y) { y = Relu (x) }")
    assert outliers.measure(model, [{"x": np.ones(3, np.float32)}]) == {}


def inputs(kind: str, seed: int) -> Iterator[Arrays]:
    rng = np.random.default_rng(seed)
    for _ in range(16):
        ids = rng.integers(0, WORDS, (1, 10))
        pixels = rng.standard_normal((1, 3, 16, 16)).astype(np.float32)
        yield {"bert": {"ids": ids, "mask": np.ones_like(ids)}, "vit": {"pixels": pixels}}[kind]


CHANNEL, FACTOR = 5, 1000
DOWN = "blocks.0.mlp.down"


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_planted_outlier_is_named_first_and_costs_int8_accuracy(traced, kind: str):
    """One output channel of a feed-forward network, times 1000."""
    plain, planted = traced[kind], plant(traced[kind])
    before, after = (outliers.measure(model, inputs(kind, seed=1)) for model in (plain, planted))
    assert after["worst"][0] == DOWN

    product, bias = down(plain)
    run = tap(plain, [product.output[0], bias.output[0]])
    outputs = [[*run(feed).values()] for feed in inputs(kind, seed=1)]
    added = [FACTOR * p[..., CHANNEL] + (s - p)[..., CHANNEL] for p, s in outputs]
    assert after["tensors"][DOWN][0] == pytest.approx(np.mean([np.abs(p).max() for p in added]), rel=1e-4)
    assert after["max_inf_norm"] > 100 * before["max_inf_norm"]
    assert after["max_kurtosis"] > 10 * before["max_kurtosis"]
    assert error(planted, kind) > 1.5 * error(plain, kind)


def plant(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the weights of one output channel times `FACTOR`."""
    planted = onnx.ModelProto()
    planted.CopyFrom(model)
    product, _ = down(planted)
    (weight,) = (tensor for tensor in planted.graph.initializer if tensor.name == product.input[1])
    values = numpy_helper.to_array(weight).copy()  # [in, out]
    values[:, CHANNEL] *= FACTOR
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    return planted


def down(model: onnx.ModelProto) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """-> the product and the sum with its bias."""
    product, bias = (node for node in model.graph.node if module_of(node) == DOWN)
    return product, bias


def error(model: onnx.ModelProto, kind: str) -> float:
    """The distance from INT8 to float32, over the distance between answers to different inputs."""
    params = static.Params()
    quantized = static.quantize(model, static.observe(model, inputs(kind, seed=2), params), params)
    runs = (onnx_run(model), onnx_run(quantized))
    float32, int8 = (np.concatenate([run(feed)["embeds"] for feed in inputs(kind, seed=3)]) for run in runs)
    return float(np.linalg.norm(float32 - int8) / np.linalg.norm(float32 - float32.mean(axis=0)))
