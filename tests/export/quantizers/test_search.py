"""The planted case: a small vision transformer in which LayerNorm gains of a few channels are 50 times larger.

Its vectors are centred, so that a cosine tells pictures apart instead of finding what all have in common.
"""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from calmclip.export.nets import Tower
from calmclip.export.parity import compare, onnx_run
from calmclip.export.quantizers import QUANTIZERS, Goal, Settled, search, smooth
from calmclip.export.share import count, share
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.errors import BadRequest, ExportError
from calmclip.models.flow import Array

WIDTH, BLOCKS, HEADS, TOKENS = 64, 4, 2, 17
Value = helper.make_tensor_value_info


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, HEADS, width // HEADS).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = torch.softmax(q @ k.transpose(2, 3) / (width // HEADS) ** 0.5, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """pixels [B, 3, 32, 32] -> unit vectors [B, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.first = nn.Parameter(torch.randn(WIDTH))
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.5)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.project = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32)

    def inside(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(patches.shape[0], 1, -1), patches], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.project(self.norm(x[:, 0]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        z = self.inside(pixels)
        return z / z.norm(dim=-1, keepdim=True)


def traced(module: nn.Module) -> onnx.ModelProto:
    specs = {"pixels": Tensor(dtype="float32", shape=("B", 3, 32, 32))}, {"y": Tensor(dtype="float32", shape=("B", 32))}
    return to_onnx(Tower(module.eval(), *specs, None, quantizer="search"))


FEEDS = [
    {"pixels": np.random.default_rng(seed).standard_normal((1, 3, 32, 32)).astype(np.float32)} for seed in range(64)
]
OTHERS = [
    {"pixels": np.random.default_rng(seed).standard_normal((1, 3, 32, 32)).astype(np.float32)}
    for seed in range(1000, 1064)
]


@pytest.fixture(scope="module")
def planted() -> onnx.ModelProto:
    torch.manual_seed(0)
    net = ViT()
    with torch.no_grad():
        for block in net.blocks:
            for layer in (block.qkv, block.out, block.up, block.down):
                layer.weight.mul_(2.0)
            block.norm2.weight[torch.randint(WIDTH, ())] *= 50
        pictures = torch.from_numpy(np.concatenate([feed["pixels"] for feed in FEEDS]))
        net.project.bias -= net.inside(pictures).mean(0)
    return traced(net)


@pytest.fixture(scope="module")
def found(planted: onnx.ModelProto) -> Settled:
    return search.search(planted, FEEDS, search.Params(), Goal())


def cosine(model: onnx.ModelProto, quantized: onnx.ModelProto, feeds: list) -> float:
    (numbers,) = compare(onnx_run(model), onnx_run(quantized), feeds).values()
    return numbers["cosine"]


def made(model: onnx.ModelProto, found: Settled) -> onnx.ModelProto:
    return QUANTIZERS.get(found.quantizer).quantize(model, found.ranges, found.params)


def plain(model: onnx.ModelProto, feeds: list) -> onnx.ModelProto:
    quantizer = QUANTIZERS.get("static")
    return quantizer.quantize(model, quantizer.observe(model, feeds, quantizer.params()), quantizer.params())


def test_the_search_recovers_what_plain_ranges_lose_on_pictures_it_never_saw(planted: onnx.ModelProto, found: Settled):
    assert cosine(planted, plain(planted, FEEDS), OTHERS) < 0.95
    quantized = made(planted, found)
    assert cosine(planted, quantized, OTHERS) >= 0.99
    assert share(count(quantized, {})).part >= 0.9
    assert found.history["reached"]
    assert found.history["candidates"][0]["tried"] == "alpha 0.75, extremes"
    assert "held out" in found.history["measured_on"]


def test_it_finds_the_same_twice(planted: onnx.ModelProto, found: Settled):
    assert search.search(planted, FEEDS, search.Params(), Goal()) == found


def test_it_stops_at_the_first_settings_that_reach_the_goal(planted: onnx.ModelProto):
    easy = search.search(planted, FEEDS, search.Params(aim=None, attention="needed"), Goal(cosine=0.5))
    assert [row["tried"] for row in easy.history["candidates"]] == [
        "alpha 0.75, extremes",
        "the same, extremes of all inputs",
    ]
    assert easy.params == smooth.Params()
    whole = smooth.observe(planted, FEEDS, smooth.Params())
    assert all(np.allclose(easy.ranges[name], whole[name]) for name in whole)


def test_a_goal_out_of_reach_answers_the_best_there_is_and_keeps_the_share(planted: onnx.ModelProto):
    few = FEEDS[:16]
    far = search.search(planted, few, search.Params(alphas=(0.75, 0.6), aim=1.0), Goal())
    rows = far.history["candidates"]
    tried = [row["tried"] for row in rows]
    assert not far.history["reached"]
    for step in ("alpha 0.6, extremes", "an alpha for each tensor", "ranges of least error", "biases corrected"):
        assert step in tried
    assert any(one.endswith(" in float") for one in tried)
    assert all(row["int8_share"] >= 0.9 for row in rows)
    assert far.history["cosine"] == max(row["cosine"] for row in rows)
    assert share(count(made(planted, far), {})).part >= 0.9
    assert far.params.keep  # some product was worth it
    assert cosine(planted, made(planted, far), few[3::4]) == pytest.approx(far.history["cosine"], abs=1e-6)


def test_ranges_are_not_fitted_to_what_they_are_measured_on(planted: onnx.ModelProto):
    few = search.search(planted, FEEDS[:15], search.Params(alphas=(0.75,), aim=1.0), Goal())
    assert "those it calibrated on" in few.history["measured_on"]
    assert not {row["tried"] for row in few.history["candidates"]} & {"ranges of least error", "biases corrected"}
    assert not few.params.clips
    assert not few.params.shifts


def test_attention_is_quantized_where_constants_alone_are_too_few(planted: onnx.ModelProto):
    products = count(planted, {})
    constant = sum(p.macs for p in products) - 2 * BLOCKS * TOKENS * TOKENS * WIDTH  # scores and mixes, by hand
    part = constant / sum(p.macs for p in products)
    params = search.Params(aim=None, attention="needed")
    easy = search.search(planted, FEEDS[:20], params, Goal(cosine=0.1, share=part - 0.001))
    assert easy.params.attention == ()
    first = search.search(planted, FEEDS[:20], params, Goal(cosine=0.1, share=part + 0.001))
    assert len(first.params.attention) == BLOCKS
    both = search.search(planted, FEEDS[:20], params, Goal(cosine=0.1, share=0.9999))
    assert len(both.params.attention) == 2 * BLOCKS
    assert share(count(made(planted, both), {})).part == 1.0
    assert cosine(planted, made(planted, both), FEEDS[:20]) > 0.9


def test_attention_is_quantized_at_the_end_where_the_goal_is_kept(planted: onnx.ModelProto):
    params = search.Params(aim=None)
    near = search.search(planted, FEEDS[:20], params, Goal(cosine=0.5))
    assert len(near.params.attention) == 2 * BLOCKS
    tried = [row["tried"] for row in near.history["candidates"]]
    assert tried == ["alpha 0.75, extremes", "attention in INT8 too", "the same, extremes of all inputs"]
    far = search.search(planted, FEEDS[:16], search.Params(alphas=(0.75,), aim=1.0), Goal())
    assert far.params.attention == ()


def matrix(weight: Array, bias: Array | None = None) -> onnx.ModelProto:
    """y = x W (+ b), x [B, T, C]."""
    nodes = [helper.make_node("MatMul", ["x", "W"], ["p" if bias is not None else "y"], "MatMul.p")]
    constants = [numpy_helper.from_array(weight, "W")]
    if bias is not None:
        nodes.append(helper.make_node("Add", ["p", "b"], ["y"], "Add.y"))
        constants.append(numpy_helper.from_array(bias, "b"))
    x = Value("x", TensorProto.FLOAT, ["B", "T", weight.shape[0]])
    y = Value("y", TensorProto.FLOAT, ["B", "T", weight.shape[1]])
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def drawn(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WEIGHT = drawn((32, 8), 0)


def test_texts_of_any_length_calibrate_it():
    feeds = [{"x": drawn((1, 2 + seed % 9, 32), seed)} for seed in range(40)]
    model = matrix(WEIGHT)
    found = search.search(model, feeds, search.Params(aim=0.99999), Goal(dims={"T": 8}))
    assert cosine(model, made(model, found), feeds) > 0.999


def test_nothing_to_calibrate_on_is_an_error_that_says_so():
    with pytest.raises(BadRequest, match=r"nothing to calibrate on; give pictures \(--images\) or texts"):
        search.search(matrix(WEIGHT), [], search.Params(), Goal())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_an_error_that_names_the_tensor(bad: float):
    feeds = [{"x": drawn((1, 4, 32), seed)} for seed in range(3)]
    feeds[1]["x"][0, 2, 7] = bad
    with pytest.raises(ExportError, match=r"tensor 'x' holds NaN or infinity on calibration input 2"):
        search.search(matrix(WEIGHT), feeds, search.Params(), Goal())


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_activations_that_never_change_have_a_range_all_the_same(value: float):
    """Exact: x is one number everywhere, and lies at an end of [0, x] or [x, 0]; only the weights are rounded."""
    feeds = [{"x": np.full((1, 4, 32), value, np.float32)} for _ in range(3)]
    model = matrix(WEIGHT, drawn((8,), 1))
    for params in (search.Params(), search.Params(alphas=(None,), aim=1.1)):
        found = search.search(model, feeds, params, Goal())
        y = onnx_run(made(model, found))(feeds[0])["y"]
        assert np.isfinite(y).all()
        half = np.abs(WEIGHT).max(0) / 127 / 2 * abs(value) * 32
        assert (np.abs(y - onnx_run(model)(feeds[0])["y"]) <= half + 1e-4).all()


def test_a_range_that_is_all_positive_still_holds_zero():
    feeds = [{"x": 5 + np.abs(drawn((1, 4, 32), seed))} for seed in range(3)]
    model = matrix(WEIGHT)
    quantized = made(model, search.search(model, feeds, search.Params(alphas=(None,), aim=None), Goal(cosine=0.5)))
    zero = {i.name: numpy_helper.to_array(i) for i in quantized.graph.initializer}
    (node,) = [n for n in quantized.graph.node if n.op_type == "QuantizeLinear"]
    largest = max(float(feed["x"].max()) for feed in feeds)
    assert int(zero[node.input[2]]) == 0
    assert float(zero[node.input[1]]) == pytest.approx(largest / 255)
    assert np.abs(onnx_run(quantized)({"x": np.zeros((1, 1, 32), np.float32)})["y"]).max() == 0


def test_a_graph_without_products_stays_as_it_is():
    x, y = (Value(name, TensorProto.FLOAT, ["B", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], "Relu.y")], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found = search.search(model, [], search.Params(), Goal())
    assert found.history["reached"]
    assert [n.op_type for n in made(model, found).graph.node] == ["Relu"]
    assert share(count(model, {})).part == 0.0


def test_a_bias_is_corrected_by_the_mean_error_of_each_channel():
    """x is nearly constant, so rounding errs the same way every time; the correction takes that out."""
    feeds = [{"x": (3.7 + 0.01 * drawn((1, 16, 32), seed)).astype(np.float32)} for seed in range(32)]
    for model in (matrix(WEIGHT), matrix(WEIGHT, drawn((8,), 3))):
        seen = search._look(model, iter(feeds), ())
        params = smooth.Params(alpha=None)
        ranges = {name: (one.low.tolist(), one.high.tolist()) for name, one in seen.items()}
        shifts = search._shifts(model, search._tune(model, seen, search.Params(), params), seen, search.Params())
        corrected = params.model_copy(update={"shifts": shifts})

        def lost(settings: smooth.Params, model=model, ranges=ranges) -> Array:
            run, true = onnx_run(smooth.quantize(model, ranges, settings)), onnx_run(model)
            return np.mean([true(f)["y"] - run(f)["y"] for f in feeds], axis=(0, 1, 2))

        expected = lost(params)
        assert np.abs(expected).max() > 0.02
        assert np.allclose(shifts["MatMul.p"], expected, atol=1e-3)
        assert np.abs(lost(corrected)).max() < 2e-3


def test_a_convolution_is_corrected_by_what_its_weights_lose_on_the_mean_input():
    weight = drawn((6, 2, 3, 3), 0)  # two groups of two inputs
    node = helper.make_node("Conv", ["x", "w"], ["y"], "Conv.y", group=2, kernel_shape=[3, 3])
    x, y = Value("x", TensorProto.FLOAT, ["B", 4, 9, 9]), Value("y", TensorProto.FLOAT, ["B", 6, 7, 7])
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    means = np.array([1.0, -2.0, 30.0, 4.0], np.float32).reshape(1, 4, 1, 1)
    feeds = [{"x": means + 0.01 * drawn((1, 4, 9, 9), seed)} for seed in range(4)]
    shifts = search._shifts(model, {}, search._look(model, iter(feeds), ()), search.Params())
    step = np.abs(weight).reshape(6, -1).max(1).reshape(6, 1, 1, 1) / 127
    lost = weight - np.rint(weight / step) * step
    expected = [(lost[o] * means[0, 2 * (o // 3) : 2 * (o // 3) + 2]).sum() for o in range(6)]
    assert np.allclose(shifts["Conv.y"], expected, atol=2e-3)
    assert np.abs(expected).max() > 0.05


def test_a_conv_net_is_searched_too():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.ReLU6(), nn.Conv2d(16, 16, 3, 2, groups=16), nn.ReLU6(), nn.Conv2d(16, 32, 3, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight[3] *= 40  # its values reach far over ReLU6, which a range must not follow
    model = traced(net)
    found = search.search(model, FEEDS, search.Params(aim=1.0), Goal(share=0.5))
    assert found.history["cosine"] >= found.history["candidates"][0]["cosine"]
    assert cosine(model, made(model, found), OTHERS) > 0.999
    assert {row["tried"] for row in found.history["candidates"]} >= {"ranges of least error", "biases corrected"}


@pytest.fixture(scope="module")
def depthwise() -> onnx.ModelProto:
    """A chain of depthwise convolutions whose first gives each channel a size of its own, and a product that evens
    them out: 8 bits for all channels together lose the small ones, in each link of the chain anew."""
    torch.manual_seed(0)
    gains = torch.logspace(-2.5, 0.5, 32)
    links = [nn.Conv2d(32, 32, 3, 1, 1, groups=32) for _ in range(4)]
    net = nn.Sequential(
        nn.Conv2d(3, 32, 7, 2), links[0], nn.GELU(), *links[1:],
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 32),
    )  # fmt: skip
    with torch.no_grad():
        for link in links:
            link.bias.zero_()
        links[0].weight *= gains.view(-1, 1, 1, 1)
        net[-1].weight /= gains.repeat_interleave(4)
        pictures = torch.from_numpy(np.concatenate([feed["pixels"] for feed in FEEDS]))
        net[-1].bias -= net(pictures).mean(0)
    return traced(net)


def test_depthwise_convolutions_go_to_float_together(depthwise: onnx.ModelProto):
    found = search.search(depthwise, FEEDS, search.Params(), Goal(share=0.75))
    rows = {row["tried"]: row for row in found.history["candidates"]}
    assert rows["biases corrected"]["cosine"] < 0.97
    assert found.history["reached"]
    assert rows["4 depthwise convolutions in float"]["better"]
    kept = [node for node in depthwise.graph.node if node.name in found.params.keep]
    assert [onnx.helper.get_node_attr_value(node, "group") for node in kept] == [32] * 4
    assert cosine(depthwise, made(depthwise, found), OTHERS) >= 0.99


def test_depthwise_convolutions_stay_where_the_share_asks_for_them(depthwise: onnx.ModelProto):
    found = search.search(depthwise, FEEDS, search.Params(), Goal(share=0.97))
    assert not any(row["tried"].endswith("depthwise convolutions in float") for row in found.history["candidates"])
    assert share(count(made(depthwise, found), {})).part >= 0.97


def test_channels_that_no_product_mixes_are_made_even_before_any_goes_to_float():
    """The second convolution evens out what the first one made of each size: only between them is anything to lose."""
    torch.manual_seed(0)
    gains = torch.logspace(-2.5, 0.5, 32)
    links = [nn.Conv2d(32, 32, 3, 1, 1, groups=32) for _ in range(2)]
    net = nn.Sequential(
        nn.Conv2d(3, 32, 7, 2), links[0], links[1], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 32)
    )
    with torch.no_grad():
        links[0].weight *= gains.view(-1, 1, 1, 1)
        links[0].bias *= gains
        links[1].weight /= gains.view(-1, 1, 1, 1)
        pictures = torch.from_numpy(np.concatenate([feed["pixels"] for feed in FEEDS]))
        net[-1].bias -= net(pictures).mean(0)
    model = traced(net)
    found = search.search(model, FEEDS, search.Params(), Goal(share=0.75))
    first, second, *others = found.history["candidates"]
    assert (first["better"], second["better"], second["int8_share"]) == (True, True, 1.0)
    assert first["cosine"] < 0.95
    assert found.history["reached"]
    assert [row["tried"] for row in others] == ["the same, extremes of all inputs"]
    assert found.written() == {"alpha": 0.75, "channels": True}
    assert cosine(model, made(model, found), OTHERS) >= 0.99
    # the extremes of all inputs, by hand: of each channel between the two
    with torch.no_grad():
        between = net[:2](pictures).numpy()
    lows = {name: low for name, (low, _) in found.ranges.items() if np.ndim(low) and len(low) == 32}
    (name,) = [name for name, low in lows.items() if np.allclose(low, between.min(axis=(0, 2, 3)), rtol=1e-3)]
    assert np.allclose(found.ranges[name][1], between.max(axis=(0, 2, 3)), rtol=1e-3)
