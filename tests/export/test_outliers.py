"""What is measured, against float64 written here; of which tensors, counted by hand; an outlier that was planted."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser
from torch import Tensor, nn

from calmclip.export import outliers
from calmclip.export.nets import Tower
from calmclip.export.parity import onnx_run
from calmclip.export.quantizers import _qdq, static
from calmclip.export.towers import Style
from calmclip.export.towers.bert import BertText
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer
from calmclip.export.trace import module_of, to_onnx
from calmclip.models.bundle.manifest import Tensor as Spec
from calmclip.models.errors import ExportError
from calmclip.models.flow import Array, Arrays

WIDTH, HIDDEN, WORDS, CONTEXT, OUT, LAYERS = 32, 48, 50, 12, 16, 2
EMBEDS = {"embeds": Spec(dtype="float32", shape=("B", OUT))}
IDS = Spec(dtype="int64", shape=("B", "T"))
PIXELS = Spec(dtype="float32", shape=("B", 3, 16, 16))


def state(first: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Seeded; no norm at 1 and no bias at 0."""
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
    made = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    return {name: 1 + one if "norm" in name and name.endswith("weight") else one for name, one in made.items()}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": (WIDTH,) for kind in ("weight", "bias")}


TEXT = {"tokens.weight": (WORDS, WIDTH), "positions": (CONTEXT, WIDTH)}
VISION = {
    "patch.weight": (WIDTH, 3, 4, 4), "patch.bias": (WIDTH,), "cls": (WIDTH,), "positions": (17, WIDTH),
    **norm("norm_pre"), **norm("norm_post"),
}  # fmt: skip


def vision() -> tuple[nn.Module, dict[str, Spec]]:
    given = state(VISION)
    return filled(VisionTransformer(given, Style(heads=2, pool="cls")), given), {"pixels": PIXELS}


def text() -> tuple[nn.Module, dict[str, Spec]]:
    given = state({**TEXT, **norm("norm_post")})
    return filled(TextTransformer(given, Style(heads=2, pool="eot", causal=True)), given), {"ids": IDS}


def bert() -> tuple[nn.Module, dict[str, Spec]]:
    given = state({**TEXT, "types": (1, WIDTH), **norm("norm_pre")})
    return filled(BertText(given, Style(heads=2, pool="mean"), CONTEXT), given), {"ids": IDS, "mask": IDS}


def filled(module: nn.Module, given: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(given)
    return module.requires_grad_(False)


TOWERS = {"vit": vision, "text": text, "bert": bert}


@pytest.fixture(scope="module")
def traced() -> dict[str, onnx.ModelProto]:
    found = {}
    for name, make in TOWERS.items():
        module, inputs = make()
        module.fold()
        found[name] = to_onnx(Tower(module, inputs, EMBEDS, None, quantizer="none"))
    return found


def pre_norm(block: str) -> list[str]:
    layers = ("norm1", "attn.out", "attn.out (sum)", "norm2", "mlp.down", "mlp.down (sum)")
    return [f"{block}.{name}" for name in layers]


def post_norm(block: str) -> list[str]:
    layers = ("attn.out", "attn.out (sum)", "norm1", "mlp.down", "mlp.down (sum)", "norm2")
    return [f"{block}.{name}" for name in layers]


# The last block of "vit" and "text" is of one token.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", ["patch", "norm_pre (input)", "norm_pre", *pre_norm("blocks.0"), *pre_norm("blocks.1"), "norm_post"]),
        ("text", ["blocks.0.norm1 (input)", *pre_norm("blocks.0"), *pre_norm("blocks.1"), "norm_post"]),
        ("bert", ["norm_pre (input)", "norm_pre", *post_norm("blocks.0"), *post_norm("blocks.1")]),
    ],
)
def test_the_papers_tensors_are_looked_at_in_order_of_depth(traced, name: str, expected: list[str]):
    assert [*outliers.tensors(traced[name]).values()] == expected


@pytest.fixture(scope="module")
def small() -> onnx.ModelProto:
    """Words in a place, a norm, a product with its bias and a factor, added to what went around them; a mask is added,
    and what is behind an activation has a norm: the paper looks at neither."""
    made = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[B, T, 6] words, float[B, T, 1] mask) => (float[B, T, 6] y) {
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
        }""")
    rng = np.random.default_rng(0)
    for name, shape in {"place": (6,), "gain": (6,), "w": (6, 6), "bias": (6,), "scale": (6,)}.items():
        made.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    for node in made.graph.node:
        node.name = f"{node.op_type}.{node.output[0]}"
    return made


def rows() -> list[Arrays]:
    """Of two lengths, the second with a number far from all others."""
    rng = np.random.default_rng(1)
    made = [rng.standard_normal((1, tokens, 6)).astype(np.float32) for tokens in (4, 7)]
    made[1][0, 3, 2] = 80.0
    return [{"words": one, "mask": np.ones((1, one.shape[1], 1), np.float32)} for one in made]


def test_each_row_is_measured_as_a_whole_and_rows_are_averaged(small: onnx.ModelProto):
    """Against the formula in exact fractions, of tensors worked out in float64."""
    fixed = {one.name: numpy_helper.to_array(one).astype(np.float64) for one in small.graph.initializer}

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
        variance = sum((one - mean) ** 2 for one in flat) / (len(flat) - 1)
        return float(sum((one - mean) ** 4 for one in flat) / len(flat) / (variance**2 + Fraction(1, 10**6)))

    wanted = [inside(row) for row in rows()]
    expected = {
        name: (np.mean([np.abs(one[name]).max() for one in wanted]), np.mean([peak(one[name]) for one in wanted]))
        for name in wanted[0]
    }
    found = outliers.measure(small, iter(rows()))
    assert [*found["tensors"]] == [*expected]
    for name, pair in expected.items():
        assert found["tensors"][name] == pytest.approx(pair, rel=1e-4), name
    norms, peaks = (np.array([pair[place] for pair in expected.values()]) for place in (0, 1))
    summary = [found[f"{of}_{what}"] for what in ("inf_norm", "kurtosis") for of in ("max", "avg")]
    assert summary == pytest.approx([norms.max(), norms.mean(), peaks.max(), peaks.mean()], rel=1e-4)
    assert found["inputs"] == 2
    assert f"{peaks[0]:.2g}" == f"{peaks.max():.2g}"
    assert peaks[0] < peaks.max()
    assert found["worst"][0] == "LayerNormalization.n (input)"  # what comes later is no worse to two digits


def test_kurtosis_of_known_numbers():
    """0 0 0 4: mean 1, fourth powers 1 1 1 81, variance 12 / 3. 767 zeros and one 100, worked out with exact fractions:
    764.0078. Gaussian noise: near 3."""
    assert outliers.kurtosis(np.array([0.0, 0.0, 0.0, 4.0])) == pytest.approx(21 / (16 + 1e-6), rel=1e-12)
    spike = np.zeros((16, 48), np.float32)
    spike[3, 5] = 100.0
    assert outliers.kurtosis(spike) == pytest.approx(764.0078, abs=1e-3)
    assert outliers.kurtosis(np.random.default_rng(0).standard_normal(100_000)) == pytest.approx(3.0, abs=0.1)
    assert outliers.kurtosis(np.ones(7)) == 0.0


def test_what_no_token_reached_is_left_out_of_that_row(small: onnx.ModelProto):
    empty = {"words": np.zeros((1, 0, 6), np.float32), "mask": np.ones((1, 0, 1), np.float32)}
    found = outliers.measure(small, [*rows(), empty])
    assert found == outliers.measure(small, rows()) | {"inputs": 3}
    assert outliers.measure(small, [empty]) == {}


def test_nan_is_told_by_the_name_of_its_tensor(small: onnx.ModelProto):
    broken, _ = rows()
    broken["words"][0, 1, 1] = np.nan
    with pytest.raises(ExportError, match=r"LayerNormalization\.n \(input\) holds NaN or infinity"):
        outliers.measure(small, [broken])


def test_a_module_that_is_called_twice_is_told_apart(small: onnx.ModelProto):
    made = onnx.ModelProto()
    made.CopyFrom(small)
    again = onnx.helper.make_node("LayerNormalization", ["y", "gain"], ["z"], "LayerNormalization.n", axis=-1)
    made.graph.node.append(again)
    names = [*outliers.tensors(made).values()]
    assert [name for name in names if "(" not in name] == [
        "LayerNormalization.n at n",
        "MatMul.p",
        "LayerNormalization.n at z",
    ]


def test_a_graph_without_layers_has_no_outliers():
    made = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[B] x) => (float[B] y) { y = Relu (x) }'
    )
    assert outliers.measure(made, [{"x": np.ones(3, np.float32)}]) == {}


def inputs(kind: str, seed: int) -> Iterator[Arrays]:
    rng = np.random.default_rng(seed)
    for _ in range(16):
        ids = rng.integers(0, WORDS, (1, 10))
        pixels = rng.standard_normal((1, 3, 16, 16)).astype(np.float32)
        yield {"bert": {"ids": ids, "mask": np.ones_like(ids)}, "vit": {"pixels": pixels}}[kind]


CHANNEL, FACTOR = 5, 1000
DOWN = "blocks.0.mlp.down"


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_an_outlier_that_was_planted_is_named_first_and_costs_8_bits_accuracy(traced, kind: str):
    """One channel that a feed-forward network writes, made a thousand times as large."""
    plain, planted = traced[kind], plant(traced[kind])
    before, after = (outliers.measure(model, inputs(kind, seed=1)) for model in (plain, planted))
    assert after["worst"][0] == DOWN

    product, bias = down(plain)
    run = _qdq.tap(plain, [product.output[0], bias.output[0]])
    whole = [[*run(feed).values()] for feed in inputs(kind, seed=1)]
    added = [FACTOR * one[..., CHANNEL] + (other - one)[..., CHANNEL] for one, other in whole]
    assert after["tensors"][DOWN][0] == pytest.approx(np.mean([np.abs(one).max() for one in added]), rel=1e-4)
    assert after["max_inf_norm"] > 100 * before["max_inf_norm"]
    assert after["max_kurtosis"] > 10 * before["max_kurtosis"]
    assert error(planted, kind) > 1.5 * error(plain, kind)


def plant(model: onnx.ModelProto) -> onnx.ModelProto:
    """The weights of one output, times `FACTOR`."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    product, _ = down(made)
    (weight,) = (one for one in made.graph.initializer if one.name == product.input[1])
    values = numpy_helper.to_array(weight).copy()  # [in, out]
    values[:, CHANNEL] *= FACTOR
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    return made


def down(model: onnx.ModelProto) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """The product, and the sum with its bias."""
    product, bias = (node for node in model.graph.node if module_of(node) == DOWN)
    return product, bias


def error(model: onnx.ModelProto, kind: str) -> float:
    """Of INT8 beside float, as a part of that by which answers to different inputs differ."""
    params = static.Params()
    small = static.quantize(model, static.observe(model, inputs(kind, seed=2), params), params)
    whole, eight = (
        np.concatenate([run(feed)["embeds"] for feed in inputs(kind, seed=3)]) for run in map(onnx_run, (model, small))
    )
    return float(np.linalg.norm(whole - eight) / np.linalg.norm(whole - whole.mean(axis=0)))
