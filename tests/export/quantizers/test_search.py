"""The search on a small vision transformer. Its outliers: LayerNorm gains of a few channels are 50 times larger.

Its outputs are centred. Otherwise every cosine would be near 1.
"""

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from calmclip.export.calibrate import hold_out
from calmclip.export.coverage import count, coverage
from calmclip.export.nets import Tower
from calmclip.export.parity import compare, onnx_run
from calmclip.export.quantizers import QUANTIZERS, Goal, Settled, search, smooth
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.errors import BadRequest, ExportError
from calmclip.models.flow import Array
from tests.export.graphs import normal, parse

WIDTH, BLOCKS, HEADS, TOKENS = 64, 4, 2, 17


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


FEEDS = [{"pixels": normal(1, 3, 32, 32, seed=seed)} for seed in range(64)]
OTHERS = [{"pixels": normal(1, 3, 32, 32, seed=seed)} for seed in range(1000, 1064)]
PICTURES = torch.from_numpy(np.concatenate([feed["pixels"] for feed in FEEDS]))


@pytest.fixture(scope="module")
def planted() -> onnx.ModelProto:
    torch.manual_seed(0)
    net = ViT()
    with torch.no_grad():
        for block in net.blocks:
            for layer in (block.qkv, block.out, block.up, block.down):
                layer.weight.mul_(2.0)
            block.norm2.weight[torch.randint(WIDTH, ())] *= 50
        net.project.bias -= net.inside(PICTURES).mean(0)
    return traced(net)


@pytest.fixture(scope="module")
def settled(planted: onnx.ModelProto) -> Settled:
    return find(planted, FEEDS)


def find(model: onnx.ModelProto, feeds: list, params: search.Params | None = None, goal: Goal | None = None) -> Settled:
    """The search, with every fourth of ``feeds`` held out."""
    return search.search(model, *hold_out(feeds), params or search.Params(), goal or Goal())


def cosine(model: onnx.ModelProto, quantized: onnx.ModelProto, feeds: list) -> float:
    (numbers,) = compare(onnx_run(model), onnx_run(quantized), feeds).values()
    return numbers["cosine"]


def quantize(model: onnx.ModelProto, settled: Settled) -> onnx.ModelProto:
    return QUANTIZERS.get(settled.quantizer).quantize(model, settled.ranges, settled.params)


def plain(model: onnx.ModelProto, feeds: list) -> onnx.ModelProto:
    quantizer = QUANTIZERS.get("static")
    return quantizer.quantize(model, quantizer.observe(model, feeds, quantizer.params()), quantizer.params())


def test_the_search_recovers_the_loss_of_plain_ranges_on_other_pictures(planted: onnx.ModelProto, settled: Settled):
    assert cosine(planted, plain(planted, FEEDS), OTHERS) < 0.95
    quantized = quantize(planted, settled)
    assert cosine(planted, quantized, OTHERS) >= 0.99
    assert coverage(count(quantized, {})).part >= 0.9
    assert settled.history["reached"]
    assert settled.history["candidates"][0]["tried"] == "alpha 0.75, extremes"
    assert settled.history["held_out"] == 16
    assert find(planted, FEEDS) == settled  # it is deterministic


def test_it_stops_at_the_first_settings_that_reach_the_goal(planted: onnx.ModelProto):
    easy = find(planted, FEEDS, search.Params(attention="needed"), Goal(cosine=0.5))
    assert [row["tried"] for row in easy.history["candidates"]] == ["alpha 0.75, extremes"]
    assert easy.params == smooth.Params()
    ranges = smooth.observe(planted, hold_out(FEEDS)[0], smooth.Params())
    assert all(np.allclose(easy.ranges[name], ranges[name]) for name in ranges)


def test_an_unreachable_goal_gives_the_best_candidate_and_keeps_the_coverage(planted: onnx.ModelProto):
    few = FEEDS[:16]
    far = find(planted, few, search.Params(alphas=(0.75, 0.6)), Goal(cosine=1.0))
    rows = far.history["candidates"]
    tried = [row["tried"] for row in rows]
    assert not far.history["reached"]
    for step in ("alpha 0.6, extremes", "an alpha for each tensor", "ranges of least error", "biases corrected"):
        assert step in tried
    assert any(name.endswith(" in float") for name in tried)
    assert all(row["int8_coverage"] >= 0.9 for row in rows)
    assert far.history["cosine"] == max(row["cosine"] for row in rows)
    assert coverage(count(quantize(planted, far), {})).part >= 0.9
    assert far.params.keep  # some product stays in float
    assert cosine(planted, quantize(planted, far), few[3::4]) == pytest.approx(far.history["cosine"], abs=1e-6)


def test_no_range_comes_from_the_inputs_that_measure_it(planted: onnx.ModelProto):
    """The held inputs are a hundred times larger, and no range holds them."""
    calibrating, held = hold_out(FEEDS[:16])
    louder = [{"pixels": 100 * feed["pixels"]} for feed in held]
    (settled, other) = (
        search.search(
            planted, calibrating, measured, search.Params(alphas=(0.75,), attention="needed"), Goal(cosine=0.1)
        )
        for measured in (held, louder)
    )
    assert settled.ranges == other.ranges == {
        name: tuple(limits) for name, limits in smooth.observe(planted, calibrating, smooth.Params()).items()
    }  # fmt: skip
    with pytest.raises(BadRequest, match="nothing to measure on; give more pictures"):
        search.search(planted, calibrating, [], search.Params(), Goal())


def test_the_worst_row_counts(planted: onnx.ModelProto):
    """The first settings have the mean that the goal wants, and a row below the least that it wants."""
    params = search.Params(attention="never")
    first = find(planted, FEEDS, params, Goal(cosine=0.5)).history["candidates"][0]
    goal = Goal(cosine=first["cosine"] - 2 * first["standard_error"] - 1e-3, worst=first["worst"] + 1e-3)
    assert first["worst"] < goal.cosine - 1e-3
    rows = find(planted, FEEDS, params, goal).history["candidates"]
    assert len(rows) > 1
    assert rows[-1]["worst"] >= goal.worst
    scores = [row["cosine"] - max(0.0, goal.worst - row["worst"]) for row in rows]
    assert [row["better"] for row in rows] == [
        score > max(scores[:place], default=-2) for place, score in enumerate(scores)
    ]


def test_attention_is_quantized_if_constant_weights_give_too_little_coverage(planted: onnx.ModelProto):
    products = count(planted, {})
    constant = sum(p.macs for p in products) - 2 * BLOCKS * TOKENS * TOKENS * WIDTH  # scores, products with v
    part = constant / sum(p.macs for p in products)
    params = search.Params(attention="needed")
    easy = find(planted, FEEDS[:20], params, Goal(cosine=0.1, coverage=part - 0.001))
    assert easy.params.attention == ()
    first = find(planted, FEEDS[:20], params, Goal(cosine=0.1, coverage=part + 0.001))
    assert len(first.params.attention) == BLOCKS
    both = find(planted, FEEDS[:20], params, Goal(cosine=0.1, coverage=0.9999))
    assert len(both.params.attention) == 2 * BLOCKS
    assert coverage(count(quantize(planted, both), {})).part == 1.0
    assert cosine(planted, quantize(planted, both), FEEDS[:20]) > 0.9


def test_attention_is_quantized_last_if_the_goal_holds(planted: onnx.ModelProto):
    near = find(planted, FEEDS[:20], goal=Goal(cosine=0.5))
    assert len(near.params.attention) == 2 * BLOCKS
    tried = [row["tried"] for row in near.history["candidates"]]
    assert tried == ["alpha 0.75, extremes", "attention in INT8 too"]
    far = find(planted, FEEDS[:16], search.Params(alphas=(0.75,)), Goal(cosine=1.0))
    assert far.params.attention == ()


def matrix(weight: Array, bias: Array | None = None) -> onnx.ModelProto:
    """y = x W (+ b), x [B, T, C]."""
    ends = f"g (float[B, T, {weight.shape[0]}] x) => (float[B, T, {weight.shape[1]}] y)"
    if bias is None:
        return parse(f"{ends} {{ y = MatMul (x, W) }}", W=weight)
    return parse(f"{ends} {{ p = MatMul (x, W) y = Add (p, b) }}", W=weight, b=bias)


WEIGHT = normal(32, 8)


def test_texts_of_any_length_calibrate():
    feeds = [{"x": normal(1, 2 + seed % 9, 32, seed=seed)} for seed in range(40)]
    model = matrix(WEIGHT)
    settled = find(model, feeds, goal=Goal(cosine=0.99999, dims={"T": 8}))
    assert cosine(model, quantize(model, settled), feeds) > 0.999


def test_no_calibration_input_is_an_error():
    with pytest.raises(BadRequest, match=r"nothing to calibrate on; give pictures \(--images\) or texts"):
        search.search(matrix(WEIGHT), [], [], search.Params(), Goal())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_errors_that_name_the_tensor(bad: float):
    feeds = [{"x": normal(1, 4, 32, seed=seed)} for seed in range(3)]
    feeds[1]["x"][0, 2, 7] = bad
    with pytest.raises(ExportError, match=r"tensor 'x' holds NaN or infinity on calibration input 2"):
        search.search(matrix(WEIGHT), feeds, feeds[:1], search.Params(), Goal())


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_activations_have_a_range(value: float):
    """All numbers of x are equal, so x is an end of the range and exact. Only the weights are rounded."""
    feeds = [{"x": np.full((1, 4, 32), value, np.float32)} for _ in range(3)]
    model = matrix(WEIGHT, normal(8, seed=1))
    for params, goal in ((search.Params(), Goal()), (search.Params(alphas=(None,)), Goal(cosine=1.1))):
        settled = search.search(model, feeds[1:], feeds[:1], params, goal)
        y = onnx_run(quantize(model, settled))(feeds[0])["y"]
        assert np.isfinite(y).all()
        half = np.abs(WEIGHT).max(0) / 127 / 2 * abs(value) * 32
        assert (np.abs(y - onnx_run(model)(feeds[0])["y"]) <= half + 1e-4).all()


def test_a_range_of_positive_numbers_contains_zero():
    feeds = [{"x": 5 + np.abs(normal(1, 4, 32, seed=seed))} for seed in range(3)]
    model = matrix(WEIGHT)
    settled = search.search(model, feeds, feeds[:1], search.Params(alphas=(None,)), Goal(cosine=0.5))
    quantized = quantize(model, settled)
    zero = {i.name: numpy_helper.to_array(i) for i in quantized.graph.initializer}
    (node,) = [n for n in quantized.graph.node if n.op_type == "QuantizeLinear"]
    largest = max(float(feed["x"].max()) for feed in feeds)
    assert int(zero[node.input[2]]) == 0
    assert float(zero[node.input[1]]) == pytest.approx(largest / 255)
    assert np.abs(onnx_run(quantized)({"x": np.zeros((1, 1, 32), np.float32)})["y"]).max() == 0


def test_a_graph_without_products_stays_as_it_is():
    model = parse("g (float[B, 4] x) => (float[B, 4] y) { y = Relu (x) }")
    settled = search.search(model, [], [], search.Params(), Goal())
    assert settled.history["reached"]
    assert [n.op_type for n in quantize(model, settled).graph.node] == ["Relu"]
    assert coverage(count(model, {})).part == 0.0


def test_a_bias_is_corrected_by_the_mean_error_of_each_channel():
    """x is nearly constant, so the error of rounding is too; the correction removes it."""
    feeds = [{"x": (3.7 + 0.01 * normal(1, 16, 32, seed=seed)).astype(np.float32)} for seed in range(32)]
    for model in (matrix(WEIGHT), matrix(WEIGHT, normal(8, seed=3))):
        statistics = search._statistics(model, iter(feeds), ())
        params = smooth.Params(alpha=None)
        ranges = {name: (statistic.low.tolist(), statistic.high.tolist()) for name, statistic in statistics.items()}
        tuned = search._tune(model, statistics, search.Params(), params)
        shifts = search._shifts(model, tuned, statistics, search.Params())
        corrected = params.model_copy(update={"shifts": shifts})

        def lost(settings: smooth.Params, model=model, ranges=ranges) -> Array:
            run, true = onnx_run(smooth.quantize(model, ranges, settings)), onnx_run(model)
            return np.mean([true(f)["y"] - run(f)["y"] for f in feeds], axis=(0, 1, 2))

        expected = lost(params)
        assert np.abs(expected).max() > 0.02
        assert np.allclose(shifts[model.graph.node[0].name], expected, atol=1e-3)
        assert np.abs(lost(corrected)).max() < 2e-3


def test_a_convolution_is_corrected_by_the_error_of_its_weights_on_the_mean_input():
    weight = normal(6, 2, 3, 3)  # two groups of two inputs
    text = "g (float[B, 4, 9, 9] x) => (float[B, 6, 7, 7] y) { y = Conv <group = 2, kernel_shape = [3, 3]> (x, w) }"
    model = parse(text, w=weight)
    means = np.array([1.0, -2.0, 30.0, 4.0], np.float32).reshape(1, 4, 1, 1)
    feeds = [{"x": means + 0.01 * normal(1, 4, 9, 9, seed=seed)} for seed in range(4)]
    shifts = search._shifts(model, {}, search._statistics(model, iter(feeds), ()), search.Params())
    step = np.abs(weight).reshape(6, -1).max(1).reshape(6, 1, 1, 1) / 127
    lost = weight - np.rint(weight / step) * step
    expected = [(lost[o] * means[0, 2 * (o // 3) : 2 * (o // 3) + 2]).sum() for o in range(6)]
    assert np.allclose(shifts["Conv.y"], expected, atol=2e-3)
    assert np.abs(expected).max() > 0.05


def test_the_search_on_a_convolutional_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.ReLU6(), nn.Conv2d(16, 16, 3, 2, groups=16), nn.ReLU6(), nn.Conv2d(16, 32, 3, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight[3] *= 40  # its values exceed ReLU6; a range must not contain them
    model = traced(net)
    settled = find(model, FEEDS, goal=Goal(cosine=1.0, coverage=0.5))
    assert settled.history["cosine"] >= settled.history["candidates"][0]["cosine"]
    assert cosine(model, quantize(model, settled), OTHERS) > 0.999
    assert {row["tried"] for row in settled.history["candidates"]} >= {"ranges of least error", "biases corrected"}
    # an easy goal is reached at once, and biases are corrected all the same
    easy = find(model, FEEDS, goal=Goal(cosine=0.5))
    assert [row["tried"] for row in easy.history["candidates"]][1:] == ["biases corrected where they are free"]
    assert {*easy.params.shifts} == {node.name for node in model.graph.node if node.op_type == "Conv"}
    without = Settled("smooth", easy.params.model_copy(update={"shifts": {}}), easy.ranges)
    lost = [1 - cosine(model, quantize(model, each), OTHERS) for each in (easy, without)]
    assert lost[0] < 0.9 * lost[1]


def leaky(activation: str, outputs: str = "") -> onnx.ModelProto:
    """c is x; l is what ``activation`` makes of it, and y is l."""
    ends = f"(float[B, 1, 20, 20] x) => (float[B, 1, 20, 20] y{outputs})"
    unit = np.ones((1, 1, 1, 1), np.float32)
    return parse(f"g {ends} {{ c = Conv (x, unit) {activation} y = Conv (l, unit) }}", unit=unit)


def lost(values: Array, low: float, high: float, slope: float) -> float:
    """The squared error behind a LeakyRelu of values in steps of [low, high], float64."""
    step = (high - low) / 255
    zero = np.rint(-low / step)
    rounded = (np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step
    return float(np.square(np.where(values < 0, slope, 1) * values - np.where(rounded < 0, slope, 1) * rounded).sum())


@pytest.mark.parametrize(
    ("text", "slope", "gain"), [("", 0.01, 2), ("<alpha = 0.1>", 0.1, 1.01), ("<alpha = 30.0>", 30, 1.1)]
)
def test_the_range_before_a_leaky_activation_has_the_least_error_behind_it(text: str, slope: float, gain: float):
    """As good as the best of 640 ranges, but for a tenth, and better than the extremes by ``gain``."""
    model = leaky(f"l = LeakyRelu {text} (c)")
    feeds = [{"x": normal(1, 1, 20, 20, seed=seed) ** 3} for seed in range(4)]
    values = np.stack([feed["x"] for feed in feeds]).astype(np.float64)
    low, high = values.min(), values.max()
    settled = search.search(model, feeds, feeds[:1], search.Params(), Goal(cosine=0.1))
    grid = itertools.product(np.linspace(0.1, 1, 40), np.linspace(0.5, 1, 16))
    least = min(lost(values, low * a, high * b, slope) for a, b in grid)
    chosen = lost(values, *settled.ranges["c"], slope)
    assert chosen <= 1.1 * least
    assert chosen * gain < lost(values, low, high, slope)
    assert "c" not in search._clips(model, search._statistics(model, iter(feeds), ()))


@pytest.mark.parametrize(
    ("activation", "outputs"),
    [
        ("l = LeakyRelu <alpha = 0.1> (c)", ", float[B, 1, 20, 20] c"),
        ("m = LeakyRelu <alpha = 0.1> (c) l = Add (m, c)", ""),
        ("l = Elu (c)", ""),
    ],
    ids=["an output of the graph", "read by a sum too", "another activation"],
)
def test_a_tensor_that_others_read_keeps_its_negative_numbers(activation: str, outputs: str):
    feeds = [{"x": normal(1, 1, 20, 20, seed=seed)} for seed in range(4)]
    settled = search.search(leaky(activation, outputs), feeds, feeds[:1], search.Params(), Goal(cosine=0.1))
    values = np.stack([feed["x"] for feed in feeds])
    assert settled.ranges["c"] == (values.min(), values.max())


@pytest.fixture(scope="module")
def depthwise() -> onnx.ModelProto:
    """A chain of depthwise convolutions. The first gives each channel another size; the last product equalizes them.
    One scale for all channels loses the small ones at each link of the chain."""
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
        net[-1].bias -= net(PICTURES).mean(0)
    return traced(net)


def test_depthwise_convolutions_go_to_float_together(depthwise: onnx.ModelProto):
    settled = find(depthwise, FEEDS, goal=Goal(coverage=0.75))
    rows = {row["tried"]: row for row in settled.history["candidates"]}
    assert rows["biases corrected"]["cosine"] < 0.97
    assert settled.history["reached"]
    assert rows["4 depthwise convolutions in float"]["better"]
    in_float = [node for node in depthwise.graph.node if node.name in settled.params.keep]
    assert [onnx.helper.get_node_attr_value(node, "group") for node in in_float] == [32] * 4
    assert cosine(depthwise, quantize(depthwise, settled), OTHERS) >= 0.99


def test_depthwise_convolutions_stay_in_int8_if_the_coverage_needs_them(depthwise: onnx.ModelProto):
    settled = find(depthwise, FEEDS, goal=Goal(coverage=0.97))
    assert not any(row["tried"].endswith("depthwise convolutions in float") for row in settled.history["candidates"])
    assert coverage(count(quantize(depthwise, settled), {})).part >= 0.97


def test_channels_are_equalized_before_any_product_goes_to_float():
    """The second convolution restores the sizes that the first changes, so accuracy is lost only between them."""
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
        net[-1].bias -= net(PICTURES).mean(0)
    model = traced(net)
    settled = find(model, FEEDS, goal=Goal(coverage=0.75))
    first, early, second, last = settled.history["candidates"]
    assert (early["tried"], early["better"]) == ("alpha 0.75, biases corrected", False)
    assert last["tried"] == "biases corrected where they are free"
    assert (first["better"], second["better"], second["int8_coverage"]) == (True, True, 1.0)
    assert first["cosine"] < 0.95
    assert settled.history["reached"]
    assert {**settled.written(), "shifts": None} == {"alpha": 0.75, "channels": True, "shifts": None}
    assert cosine(model, quantize(model, settled), OTHERS) >= 0.99
    # the extremes of each channel between the two, by hand
    with torch.no_grad():
        between = net[:2](torch.from_numpy(np.concatenate([feed["pixels"] for feed in hold_out(FEEDS)[0]]))).numpy()
    lows = {name: low for name, (low, _) in settled.ranges.items() if np.ndim(low) and len(low) == 32}
    (name,) = [name for name, low in lows.items() if np.allclose(low, between.min(axis=(0, 2, 3)), rtol=1e-3)]
    assert np.allclose(settled.ranges[name][1], between.max(axis=(0, 2, 3)), rtol=1e-3)
