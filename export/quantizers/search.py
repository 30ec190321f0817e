"""Static U8S8 that searches for its settings: the first that reach the goal, in order of cost.

Source: static ranges: Jacob et al. 2017 (arXiv 1712.05877); one scale per output channel: Krishnamoorthi 2018
(arXiv 1806.08342), section 3; outliers moved into weights: Xiao et al. 2022 (arXiv 2211.10438), eq. 3-4; ranges of
least squared error: Banner et al. 2019 (arXiv 1810.05723), section 2, here found on a grid and, for matrix products,
by the output's error; bias correction: Nagel et al. 2019 (arXiv 1906.04721), section 4.2.

A graph with root-mean-square norms is a language model's: a few of its tokens have numbers a thousand times larger than
the others (Sun et al. 2024, arXiv 2402.17762), for which no static range is right. There the result is `rows`: without
data if it reaches the cosines, else with the first of a few alphas that does. Attention stays in float.

Each step builds on the best settings so far. The search stops when the goal is reached:

1. `smooth` with the first of ``alphas``, minima and maxima. A tensor that only a LeakyRelu reads has the range of least
   squared error behind it from the start: the activation makes the negative numbers small, on which minimum and maximum
   would spend most of the steps;
2. bias correction: E[float output - INT8 output] of each output channel, added to its bias. If it does not suffice, it
   is dropped until step 7;
3. equalized inputs of depthwise convolutions (`smooth.equalize`): their channels differ in size, and one scale for the
   tensor does not fit them (Nagel et al., section 3.1). No alpha helps against that loss;
4. the other ``alphas``;
5. an alpha for each tensor, by the least squared error of the outputs of its products on sampled rows;
6. a range for each tensor in the same way: percentiles, and fractions of the extremes (convolutions: by the least
   squared error of the values themselves; tensors that only a LeakyRelu reads keep theirs);
7. bias correction of these settings;
8. all depthwise convolutions in float: they are few of the multiply-accumulates, and one alone in float gains nothing;
9. other products in float. Each product that the coverage allows is measured alone in float. Then they go to float one
   after another, ordered by gain in cosine per multiply-accumulate, while it helps and the INT8 coverage stays at the
   goal.

The measure is the mean cosine of the graph's outputs, the least of them, less what their worst row lacks to the goal.
It is taken on held-out feeds: measured on the feeds that fitted steps 5 and 6, the built-in image tower had a cosine of
.98, on others .89. No range is observed on them. If the products with constants alone do not reach the INT8 coverage,
the products of activations that lead to a Softmax are quantized too, and if necessary those that read a Softmax. With
``attention`` = fits, all products of activations are quantized at the end if the goal is still reached, because fused
attention needs it. Last, a net of convolutions gets its biases corrected if that is better: a convolution and a Gemm
add the correction for nothing, and the built-in image tower then loses half as much. The result is a `smooth` with
params, so it can be recorded.

One pass over the feeds computes every tensor of interest. After that a candidate costs one graph, one session and a run
of the held-out feeds.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from pydantic import Field

from calmclip.export import parity
from calmclip.export.coverage import Product, count, coverage
from calmclip.export.graph import Draft, activation_products, depthwise, matrices, probabilities, products, readers
from calmclip.export.matching.rows import has_norm
from calmclip.export.qdq import quantize_weight, quantized_tensors, scale_and_zero
from calmclip.export.quantizers import QUANTIZERS, Feeds, Goal, Quantizer, Ranges, Settled, rows, smooth
from calmclip.export.quantizers.ranges import Observed, collect, extremes, widest
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays

_ROWS, _FEEDS = 16, 32  # sampled rows per feed, and sampled feeds
_VALUES = 4096  # sampled values per feed of a tensor that is not read by rows
_CUTS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # fractions of the extremes
_NEGATIVE = (1.0, 0.8, 0.6, 0.45, 0.35, 0.25, 0.2, 0.15, 0.1)  # parts of the minimum before a LeakyRelu
_PERCENTILES = (99.99, 99.9, 99.5)
_ROW_ALPHAS = (0.5, 0.65, 0.35)  # for `rows`
_ALONE = 24  # matrix products that are measured alone in float, the noisiest; convolutions: all

Adopt = Literal["better", "better or reached", "reached", "never"]  # when a candidate becomes the best one


class Params(FrozenModel):
    alphas: tuple[float | None, ...] = Field(default=(0.75, 0.6, 0.85, 0.5, 0.95, None), min_length=1)
    attention: Literal["never", "needed", "fits", "scores", "all"] = "fits"
    keep: tuple[str, ...] = ()  # names of nodes that stay in float in any case
    reduce_range: bool = False  # 7-bit weights; see `static`
    rows: bool = True  # `rows` in graphs with root-mean-square norms


@dataclass
class _Statistics:
    """Of one tensor: extremes [C] if matrix products read it, else two numbers; sampled rows [n, C] or values [n]; if a
    convolution reads it, the mean of each channel; if a depthwise one does, also their extremes, per feed."""

    low: Array
    high: Array
    sample: list[Array] = field(default_factory=list)
    means: list[Array] = field(default_factory=list)
    channels: list[tuple[Array, Array]] = field(default_factory=list)


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    """The first candidate, for callers that have ranges and do not search."""
    first = smooth.Params(alpha=params.alphas[0], keep=params.keep, reduce_range=params.reduce_range)
    return smooth.quantize(model, ranges, first)


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    return smooth.observe(model, feeds, smooth.Params())


def search(model: onnx.ModelProto, feeds: Feeds, held: Feeds, params: Params, goal: Goal) -> Settled:
    """-> the settings that reach ``goal`` on ``held``, or the best ones tried. Raises as `ranges.collect`; `BadRequest`
    if nothing is held out."""
    attention, every = (_attention(model, params, goal, last) for last in (False, True))
    first = smooth.Params(
        alpha=params.alphas[0], keep=params.keep, attention=attention, reduce_range=params.reduce_range
    )
    if not quantized_tensors(model, every):
        return Settled("smooth", first, {}, {"candidates": [], "reached": True, "cosine": 1.0})
    held = list(held)
    if held and params.rows and has_norm(model):
        return _by_row(_Trial(model, {}, held, goal), feeds, params)
    statistics = _statistics(model, feeds, every)
    if not held:
        raise BadRequest("the search has nothing to measure on; give more pictures (--images) or texts (--texts)")
    ranges = {name: (tensor.low.tolist(), tensor.high.tolist()) for name, tensor in statistics.items()}
    ranges |= _before_leaky(model, statistics)
    trial = _Trial(model, ranges, held, goal)
    trial.run(first, f"{_label(first.alpha)}, extremes")

    def corrected(nodes: Collection[str] | None = None) -> smooth.Params:
        """The best settings with the biases of all ``nodes`` corrected; None: of every product."""
        shifts = _shifts(model, _tune(model, statistics, params, trial.best), statistics, params)
        chosen = {name: shift for name, shift in shifts.items() if nodes is None or name in nodes}
        return trial.best.model_copy(update={"shifts": chosen})

    if not trial.reached:
        trial.run(corrected(), f"{_label(first.alpha)}, biases corrected", adopt="reached")
    if not trial.reached and (names := smooth.equalizable(model, params.keep)):
        channels = {name: widest(statistics[name].channels) for name in names}
        label = "equalized channels before depthwise convolutions"
        trial.run(trial.best.model_copy(update={"channels": True}), label, ranges={**ranges, **channels})
    for alpha in params.alphas[1:]:
        if not trial.reached:
            trial.run(trial.best.model_copy(update={"alpha": alpha}), f"{_label(alpha)}, extremes")
    if not trial.reached:
        tuned = _tune(model, statistics, params, trial.best, alphas=True)
        alphas = {name: best.alpha for name, best in tuned.items()}
        trial.run(trial.best.model_copy(update={"alphas": alphas}), "an alpha for each tensor")
    if not trial.reached:
        tuned = _tune(model, statistics, params, trial.best, clips=True)
        clips = {name: best.clip for name, best in tuned.items() if best.clip} | _clips(model, statistics)
        trial.run(trial.best.model_copy(update={"clips": clips}), "ranges of least error")
    if not trial.reached:
        trial.run(corrected(), "biases corrected")
    if not trial.reached and (names := _depthwise(trial, goal)):
        changed = {"keep": (*trial.best.keep, *names), "channels": False}
        label = f"{len(names)} depthwise convolutions in float"
        trial.run(trial.best.model_copy(update=changed), label, ranges=ranges)
    if not trial.reached:
        _give_up(trial, _tune(model, statistics, params, trial.best), goal)
    if trial.reached and every != attention:
        with_attention = trial.best.model_copy(update={"attention": every})
        trial.run(with_attention, "attention in INT8 too", adopt="better or reached")
    biased = {node.name: node.op_type for node in products(model, trial.best.keep) if node.op_type != "MatMul"}
    if not trial.best.shifts and Counter(biased.values())["Conv"] > 1:
        trial.run(corrected(biased), "biases corrected where they are free")
    return Settled("smooth", trial.best, trial.ranges, {**trial.history(), "held_out": len(held)}, statistics.starved)


def _by_row(trial: "_Trial", feeds: Feeds, params: Params) -> Settled:
    """The first `rows` that reaches the cosines, or the best one: without a division of columns, then by each alpha."""
    plain = rows.Params(keep=params.keep, reduce_range=params.reduce_range)
    ranges: Ranges = {}
    best, score, cosine, reached = plain, -np.inf, -1.0, False
    for alpha in (None, *_ROW_ALPHAS):
        if reached:
            break
        settings = plain.model_copy(update={"alpha": alpha})
        ranges = ranges or rows.observe(trial.model, feeds, settings)
        quantized = rows.quantize(trial.model, ranges, settings)
        measured, reached = trial.measure(quantized)
        better = measured.score(trial.goal) > score
        label = "each row in steps of its own" + ("" if alpha is None else f", {_label(alpha)}")
        trial.note(label, measured, count(quantized, trial.goal.dims), better)
        del quantized  # a large graph would stay in memory while the next one observes ranges
        if better:
            best, score, cosine = settings, measured.score(trial.goal), measured.cosine
    history = {**trial.history(), "reached": reached, "cosine": round(cosine, 6), "held_out": len(trial.held)}
    return Settled("rows", best, {} if best.alpha is None else ranges, history)


@dataclass(frozen=True)
class _Measured:
    """Of one output on the held-out feeds: the mean cosine, its standard error, and the cosine of the worst row."""

    cosine: float
    error: float
    worst: float

    def score(self, goal: Goal) -> float:
        return self.cosine - max(0.0, goal.worst - self.worst)

    def reaches(self, goal: Goal) -> bool:
        return self.cosine - 2 * self.error >= goal.cosine and self.worst >= goal.worst


class _Trial:
    """Measures candidates against the float graph, on the held-out feeds; ``best``: the best settings so far."""

    def __init__(self, model: onnx.ModelProto, ranges: Ranges, held: Sequence[Arrays], goal: Goal) -> None:
        self.model, self.ranges, self.held, self.goal = model, ranges, held, goal
        run = parity.onnx_run(model)
        self.answers = [run(feed) for feed in held]
        self.rows: list[dict[str, Any]] = []
        self.score, self.cosine, self.reached, self.best = -np.inf, -1.0, False, smooth.Params()
        self.products: list[Product] = []  # of the best graph

    def run(self, params: smooth.Params, label: str, *, ranges: Ranges | None = None, adopt: Adopt = "better") -> float:
        """-> the candidate's score. ``adopt``: it becomes the best if its score is higher (``better``), if it reaches
        the goal (``reached``), or ``never``."""
        ranges = ranges or self.ranges
        quantized = smooth.quantize(self.model, ranges, params)
        measured, reached = self.measure(quantized)
        score = measured.score(self.goal)
        if adopt == "never":
            return score
        products = count(quantized, self.goal.dims)
        higher = score > self.score
        better = {"better": higher, "better or reached": higher or reached, "reached": reached}[adopt]
        self.note(label, measured, products, better)
        if better:
            self.ranges = ranges
            self.best, self.products = params, products
            self.score, self.cosine, self.reached = score, measured.cosine, reached
        return score

    def measure(self, quantized: onnx.ModelProto) -> tuple[_Measured, bool]:
        """-> the worst output on the held-out feeds, and whether all reach the goal."""
        answers, run = iter(self.answers), parity.onnx_run(quantized)
        outputs = parity.compare(lambda feed: next(answers), run, self.held, self.goal.summary).values()
        each = [_Measured(output["cosine"], output["cosine_error"], output["cosine_min"]) for output in outputs]
        worst = min(each, key=lambda output: output.score(self.goal), default=_Measured(1.0, 0.0, 1.0))
        return worst, all(output.reaches(self.goal) for output in each)

    def note(self, label: str, measured: _Measured, products: Sequence[Product], better: bool) -> None:
        self.rows.append({
            "tried": label,
            "cosine": round(measured.cosine, 6),
            "standard_error": round(measured.error, 6),
            "worst": round(measured.worst, 6),
            "int8_coverage": round(coverage(products).part, 4),
            "better": better,
        })  # fmt: skip

    def history(self) -> dict[str, Any]:
        return {
            "goal": {"cosine": self.goal.cosine, "worst": self.goal.worst, "int8_coverage": self.goal.coverage},
            "reached": self.reached,
            "cosine": round(self.cosine, 6),
            "candidates": self.rows,
        }


def _statistics(model: onnx.ModelProto, feeds: Feeds, attention: Sequence[str]) -> Observed[_Statistics]:
    """One pass: the `_Statistics` of every tensor that may become 8-bit."""
    by_row = {node.input[0] for node in matrices(model)}
    by_map = {node.input[0] for node in products(model) if node.op_type == "Conv"}
    by_channel = {node.input[0] for node in depthwise(model)}
    statistics: dict[str, _Statistics] = {}

    def add(name: str, values: Array) -> None:
        flat = values.reshape(-1, values.shape[-1]) if name in by_row else values.reshape(-1)
        low, high = extremes(flat, 1 if name in by_row else None)
        tensor = statistics.setdefault(name, _Statistics(low, high))
        tensor.low, tensor.high = np.minimum(tensor.low, low), np.maximum(tensor.high, high)
        if name in by_channel:
            tensor.channels.append(extremes(values, 1))
        if name in by_map:
            tensor.means.append(values.mean(axis=(0, *range(2, values.ndim)), dtype=np.float64))
        if len(tensor.sample) < _FEEDS:
            most = min(len(flat), _ROWS if name in by_row else _VALUES)
            tensor.sample.append(flat[np.linspace(0, len(flat) - 1, most).round().astype(int)])

    observed = collect(model, feeds, quantized_tensors(model, attention), add)
    for name in probabilities(model.graph.node) & statistics.keys() - by_row:
        # up to 1, unless all are so small that steps of 1/255 would lose them
        tensor = statistics[name]
        tensor.low, tensor.high = np.asarray(0, np.float32), np.asarray(min(1.0, 2 * float(tensor.high)), np.float32)
    return observed.lent(statistics, _merged)


def _merged(lenders: Sequence[_Statistics]) -> _Statistics:
    """The statistics of an expert without tokens, of those of the other experts of its layer. No convolution reads
    them."""
    low, high = np.min([of.low for of in lenders], axis=0), np.max([of.high for of in lenders], axis=0)
    return _Statistics(low, high, [rows for of in lenders for rows in of.sample])


@dataclass(frozen=True)
class _Tuned:
    """Of a tensor that matrix products read: ``alpha``; ``clip`` after the division (None: the extremes); ``noise``,
    the lost part of the square of their outputs; and by node the mean of float minus INT8 output."""

    alpha: float | None
    clip: tuple[float, float] | None
    noise: float
    shifts: Mapping[str, Array]


def _tune(
    model: onnx.ModelProto, statistics: Mapping[str, _Statistics], params: Params, now: smooth.Params, *,
    alphas: bool = False, clips: bool = False,
) -> dict[str, _Tuned]:  # fmt: skip
    """By tensor: the alpha, or the clip, with the least squared error of its products on the sampled rows. The other
    settings stay as ``now``."""
    draft = Draft(model)
    groups: dict[str, list[onnx.NodeProto]] = {}
    for node in matrices(draft, now.keep):
        groups.setdefault(node.input[0], []).append(node)
    tuned = {}
    for name, nodes in groups.items():
        tensor, weights = statistics[name], [smooth.rows(draft, node) for node in nodes]
        weight = weights[0] if len(weights) == 1 else np.concatenate(weights, axis=1)
        rows = np.concatenate(tensor.sample).astype(np.float32)
        true = rows @ weight
        signal = max(float(np.square(true, dtype=np.float64).sum()), 1e-30)
        best = _Tuned(None, None, np.inf, {})
        current = now.alphas.get(name, now.alpha)
        for alpha in dict.fromkeys((current, *params.alphas)) if alphas else (current,):
            scale = _divisor(tensor, weight, alpha)
            divided, rounded = rows / scale, _rounded(weight * scale[:, None], 1, params.reduce_range)
            low, high = float((tensor.low / scale).min()), float((tensor.high / scale).max())
            options: list[tuple[float, float] | None] = [now.clips.get(name)]
            if clips:
                cuts = np.percentile(divided, [(100 - p, p) for p in _PERCENTILES])
                options = [None, *((low * cut, high * cut) for cut in _CUTS)]
                options += [(min(float(a), 0.0), max(float(b), 0.0)) for a, b in cuts]
            for clip in options:
                lost = true - _quantized(divided, *(clip or (low, high))) @ rounded
                noise = float(np.square(lost, dtype=np.float64).sum()) / signal
                if noise < best.noise:
                    means = np.split(lost.mean(axis=0), np.cumsum([w.shape[1] for w in weights])[:-1])
                    best = _Tuned(alpha, clip, noise, dict(zip((n.name for n in nodes), means, strict=True)))
        tuned[name] = best
    return tuned


def _divisor(tensor: _Statistics, weight: Array, alpha: float | None) -> Array:
    """s [C] of Xiao's eq. 4, as `smooth` computes it; ones if ``alpha`` is None."""
    if alpha is None:
        return np.ones(len(weight), np.float32)
    largest = np.maximum(np.abs(tensor.low), np.abs(tensor.high)).astype(np.float64)
    return smooth.factors(largest, np.abs(weight).max(axis=1), alpha).astype(np.float32)


def _clips(model: onnx.ModelProto, statistics: Mapping[str, _Statistics]) -> dict[str, tuple[float, float]]:
    """Of the inputs and outputs of convolutions: the range of the least squared error of the values (Banner et al.)."""
    others = {node.input[0] for node in matrices(model)} | probabilities(model.graph.node)
    others |= _slopes(model).keys()
    clips = {}
    for name in quantized_tensors(model):
        if name not in others:
            tensor = statistics[name]
            values, low, high = np.concatenate(tensor.sample), float(tensor.low), float(tensor.high)
            options = [(low * cut, high * cut) for cut in (1.0, *_CUTS)]
            errors = [np.square(values - _quantized(values, *option), dtype=np.float64).sum() for option in options]
            clips[name] = options[int(np.argmin(errors))]
    return clips


def _before_leaky(model: onnx.ModelProto, statistics: Mapping[str, _Statistics]) -> dict[str, tuple[float, float]]:
    """Of the tensors that only a LeakyRelu reads: the range of the least squared error behind it."""
    chosen = {}
    for name, slope in _slopes(model).items():
        if name not in statistics:
            continue
        tensor = statistics[name]
        values, low, high = np.concatenate(tensor.sample), float(tensor.low), float(tensor.high)
        options = [(low * part, high * cut) for part in _NEGATIVE for cut in (1.0, *_CUTS)]
        errors = [_bent(values, slope) - _bent(_quantized(values, *option), slope) for option in options]
        chosen[name] = options[int(np.argmin([np.square(error, dtype=np.float64).sum() for error in errors]))]
    return chosen


def _slopes(model: onnx.ModelProto) -> dict[str, float]:
    """The tensors that only a LeakyRelu reads -> its slope."""
    ends = {value.name for value in model.graph.output}
    return {
        name: next((item.f for item in nodes[0].attribute if item.name == "alpha"), 0.01)
        for name, nodes in readers(model.graph.node).items()
        if [node.op_type for node in nodes] == ["LeakyRelu"] and name not in ends
    }


def _bent(values: Array, slope: float) -> Array:
    return np.where(values < 0, slope * values, values)


def _shifts(
    model: onnx.ModelProto, tuned: Mapping[str, _Tuned], statistics: Mapping[str, _Statistics], params: Params
) -> dict[str, tuple[float, ...]]:
    """By node: E[float output - INT8 output] of each output channel. Matrix products: on the sampled rows, errors of
    weights and activations. Convolutions: the rounding error of the weights times the mean of each input channel."""
    shifts = {node: shift for best in tuned.values() for node, shift in best.shifts.items()}
    draft = Draft(model)
    for node in products(draft):
        if node.op_type != "Conv":
            continue
        weight = draft.array(node.input[1])
        lost = (weight - _rounded(weight, 0, params.reduce_range)).reshape(*weight.shape[:2], -1).sum(axis=2)
        means = np.mean(statistics[node.input[0]].means, axis=0).reshape(-1, weight.shape[1])  # [groups, inputs each]
        group = np.arange(len(weight)) // (len(weight) // len(means))
        shifts[node.name] = np.sum(lost * means[group], axis=1)
    return {name: tuple(float(f"{number:.6g}") for number in shift) for name, shift in shifts.items()}


def _depthwise(trial: _Trial, goal: Goal) -> list[str]:
    """The depthwise convolutions in INT8, if the goal's coverage is reached without them; else none."""
    now = coverage(trial.products)
    macs = {product.name: product.macs for product in trial.products if product.int8}
    names = [node.name for node in depthwise(trial.model, trial.best.keep) if node.name in macs]
    return names if now.int8 - sum(macs[name] for name in names) >= goal.coverage * now.macs else []


def _give_up(trial: _Trial, tuned: Mapping[str, _Tuned], goal: Goal) -> None:
    """Put products into float, ordered by gain in score per multiply-accumulate, until the goal or its coverage."""
    start = trial.best
    noise = {node: best.noise for best in tuned.values() for node in best.shifts}
    now = coverage(trial.products)
    spare = now.int8 - goal.coverage * now.macs
    cost = {product.name: product.macs for product in trial.products if product.int8 and product.macs <= spare}
    names = [node.name for node in products(trial.model, start.keep) if node.name in cost]
    noisy = sorted((name for name in names if name in noise), key=lambda name: -noise[name])[:_ALONE]
    gains = {}
    for name in names:
        if name not in noise or name in noisy:
            gains[name] = trial.run(_without(start, name), "", adopt="never") - trial.score
    for name in sorted(gains, key=lambda name: -gains[name] / max(cost[name], 1)):
        if trial.reached or gains[name] <= 0:
            break
        if cost[name] <= spare:
            before = trial.score
            trial.run(_without(trial.best, name), f"{name} in float")
            spare -= cost[name] if trial.score > before else 0


def _label(alpha: float | None) -> str:
    return "no alpha" if alpha is None else f"alpha {alpha}"


def _without(params: smooth.Params, name: str) -> smooth.Params:
    return params.model_copy(update={"keep": (*params.keep, name)})


def _attention(model: onnx.ModelProto, params: Params, goal: Goal, last: bool) -> tuple[str, ...]:
    """The products of activations to quantize, in the ``last`` candidate or before; "needed": to reach the coverage."""
    by_tensor = readers(model.graph.node)

    def leads_to_softmax(node: onnx.NodeProto, steps: int = 4) -> bool:
        return any(
            reader.op_type == "Softmax" or (steps > 1 and leads_to_softmax(reader, steps - 1))
            for reader in by_tensor.get(node.output[0], [])
        )

    mixers = probabilities(model.graph.node)
    candidates = activation_products(model)
    first = tuple(node.name for node in candidates if node.input[0] not in mixers and leads_to_softmax(node))
    both = tuple(node.name for node in candidates if node.name in first or node.input[0] in mixers)
    if params.attention not in ("needed", "fits") or (last and params.attention == "fits"):
        return {"never": (), "scores": first, "all": both, "fits": both}[params.attention]
    macs = {product.name: product.macs for product in count(model, goal.dims)}
    constant = sum(macs[node.name] for node in products(model, params.keep))
    for chosen in ((), first):
        if constant + sum(macs[name] for name in chosen) >= goal.coverage * sum(macs.values()):
            return chosen
    return both


def _rounded(weight: Array, axis: int, reduce_range: bool) -> Array:
    """A weight after quantization, float32."""
    integers, scale = quantize_weight(weight, axis, reduce_range)
    return (integers * scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])).astype(np.float32)


def _quantized(values: Array, low: float, high: float) -> Array:
    """An activation after quantization over [low, high], float32."""
    scale, zero = scale_and_zero(low, high)
    return np.asarray((np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale)


QUANTIZERS.register("search")(Quantizer(Params, quantize, observe, search))
