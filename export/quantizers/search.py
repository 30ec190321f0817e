"""Static U8S8 that finds its own settings: the first that reach the goal, from those that cost least to those that
give INT8 away.

Source: static ranges: Jacob et al. 2017 (arXiv 1712.05877); one scale an output channel: Krishnamoorthi 2018
(arXiv 1806.08342), section 3; outliers moved into weights: Xiao et al. 2022 (arXiv 2211.10438), eq. 3-4; ranges of
least squared error: Banner et al. 2019 (arXiv 1810.05723), section 2, here found on a grid and, for matrix products,
of the output's error; bias correction: Nagel et al. 2019 (arXiv 1906.04721), section 4.2.

What is tried, each step on top of the best so far, and only until the goal is reached:

1. `smooth` at the first of ``alphas``, minima and maxima;
2. what depthwise convolutions read made even, channel by channel (`smooth.even`): such channels differ in size, and one
   scale for the tensor does not serve them (Nagel et al., section 3.1). No alpha does what they lose any good;
3. the other ``alphas``;
4. an alpha for each tensor, by the least squared error of what its products make of sampled rows;
5. a range for each tensor in the same way: percentiles, and the extremes times a grid (convolutions: by the least
   squared error of the values themselves);
6. bias correction: E[float output - INT8 output] of each output channel, added to its bias; both only where there are
   feeds to hold out: measured on what it was fitted to, the built-in image tower had a cosine of .98, on others .89;
7. depthwise convolutions in float, all together: they are few of the multiply-accumulates, and left out one by one they
   gain nothing;
8. other products in float: each of those that fit is left out alone and measured; then, by gain in cosine for each
   multiply-accumulate given up, one after another while it helps, never below the goal's share of INT8.

Measured is the mean cosine of the graph's outputs, the least of them, on feeds held out: every fourth, where there are
enough. At the end minima and maxima are taken over all feeds, unless ranges or biases were fitted to some. Where the
constants alone are less than the share of INT8, the products of activations that lead to a Softmax are quantized too,
and if need be those that read one. At the end all of them are, where the goal is reached with them too (``attention``:
fits): it is what fused attention takes. What is settled on is a `smooth` with params, so it can be recorded.

One pass over the feeds with every tensor of interest as an output; after that a candidate costs one graph, one session
and the held-out feeds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import onnx
from pydantic import Field

from calmclip.export import parity
from calmclip.export.quantizers import QUANTIZERS, Feeds, Goal, Quantizer, Ranges, Settled, _qdq, smooth
from calmclip.export.share import Product, count, share
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array, Arrays

ENOUGH = 16  # feeds; with fewer all are both calibrated and measured on
HELD = 32  # feeds measured on, at most
_EVERY = 4
_ROWS, _FEEDS = 16, 32  # sampled rows of a feed, and feeds sampled
_VALUES = 4096  # sampled values of a feed, of tensors that are not read row by row
_CUTS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # of the extremes
_PERCENTILES = (99.99, 99.9, 99.5)
_ALONE = 24  # matrix products left in float one by one, the noisiest; convolutions: all


class Params(FrozenModel):
    alphas: tuple[float | None, ...] = Field((0.75, 0.6, 0.85, 0.5, 0.95, None), min_length=1)
    aim: float | None = Field(0.99, description="mean cosine to look for where the bars ask for less")
    attention: Literal["never", "needed", "fits", "scores", "all"] = "fits"
    keep: tuple[str, ...] = ()  # names of nodes that stay in float whatever is found
    reduce_range: bool = False  # 7-bit weights; see `static`


@dataclass
class _Seen:
    """Of one tensor: extremes [C] (numbers where it is not read row by row), sampled rows [n, C] or values [n], and
    where a convolution reads it the mean of each channel; of a depthwise one their extremes, feed by feed."""

    low: Array
    high: Array
    sample: list[Array] = field(default_factory=list)
    means: list[Array] = field(default_factory=list)
    channels: list[tuple[Array, Array]] = field(default_factory=list)


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    """The first candidate, for who has ranges and looks no further."""
    first = smooth.Params(alpha=params.alphas[0], keep=params.keep, reduce_range=params.reduce_range)
    return smooth.quantize(model, ranges, first)


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    return smooth.observe(model, feeds, smooth.Params())


def search(model: onnx.ModelProto, feeds: Feeds, params: Params, goal: Goal) -> Settled:
    """-> the settings that reach ``goal``, or the best there are. Raises as `_qdq.watch`."""
    attention, every = _attention(model, params, goal), _attention(model, _all(params), goal)
    first = smooth.Params(
        alpha=params.alphas[0], keep=params.keep, attention=attention, reduce_range=params.reduce_range
    )
    if not _qdq.watched(model, every):
        return Settled("smooth", first, {}, {"candidates": [], "reached": True, "cosine": 1.0})
    calibrating, held, apart = _split(feeds)
    seen = _look(model, calibrating, every)
    ranges = {name: (one.low.tolist(), one.high.tolist()) for name, one in seen.items()}
    trial = _Trial(model, ranges, held, goal, max(goal.cosine, params.aim or -1.0))
    trial.run(first, f"{_said(first.alpha)}, extremes")
    if not trial.reached and (separate := smooth.separate(model, params.keep)):
        each = {name: _qdq.widest(seen[name].channels) for name in separate}
        what = "channels before depthwise convolutions made even"
        trial.run(trial.best.model_copy(update={"channels": True}), what, ranges={**ranges, **each})
    for alpha in params.alphas[1:]:
        if not trial.reached:
            trial.run(trial.best.model_copy(update={"alpha": alpha}), f"{_said(alpha)}, extremes")
    if not trial.reached:
        alphas = {name: one.alpha for name, one in _tune(model, seen, params, trial.best, alphas=True).items()}
        trial.run(trial.best.model_copy(update={"alphas": alphas}), "an alpha for each tensor")
    if apart and not trial.reached:
        tuned = _tune(model, seen, params, trial.best, clips=True)
        clips = {name: one.clip for name, one in tuned.items() if one.clip} | _clips(model, seen, attention)
        trial.run(trial.best.model_copy(update={"clips": clips}), "ranges of least error")
    if apart and not trial.reached:
        shifts = _shifts(model, _tune(model, seen, params, trial.best), seen, params)
        trial.run(trial.best.model_copy(update={"shifts": shifts}), "biases corrected")
    if not trial.reached and (spared := _depthwise(trial, goal)):
        changed = {"keep": (*trial.best.keep, *spared), "channels": False}
        what = f"{len(spared)} depthwise convolutions in float"
        trial.run(trial.best.model_copy(update=changed), what, ranges=ranges)
    if not trial.reached:
        _give_up(trial, _tune(model, seen, params, trial.best), goal)
    if trial.reached and every != attention:
        trial.run(trial.best.model_copy(update={"attention": every}), "attention in INT8 too", enough=True)
    if apart and not (trial.best.clips or trial.best.shifts):
        more = smooth.observe(model, held, trial.best)
        wider = {name: _qdq.widest((limits, more[name])) for name, limits in trial.ranges.items() if name in more}
        trial.run(trial.best, "the same, extremes of all inputs", ranges=wider, enough=True)
    measured = f"{len(held)} inputs, {'held out' if apart else 'those it calibrated on: there were too few'}"
    return Settled("smooth", trial.best, trial.ranges, {**trial.history(), "measured_on": measured})


class _Trial:
    """Candidates beside the float graph, on the held-out feeds; ``best`` is what was best so far."""

    def __init__(self, model: onnx.ModelProto, ranges: Ranges, held: Sequence[Arrays], goal: Goal, aim: float) -> None:
        self.model, self.ranges, self.held, self.goal, self.aim = model, ranges, held, goal, aim
        run = parity.onnx_run(model)
        self.answers = [run(feed) for feed in held]
        self.rows: list[dict[str, Any]] = []
        self.cosine, self.error, self.best = -1.0, 0.0, smooth.Params()
        self.products: list[Product] = []  # of the best graph

    @property
    def reached(self) -> bool:
        return self.cosine - 2 * self.error >= self.aim

    def run(
        self,
        params: smooth.Params,
        what: str,
        *,
        ranges: Ranges | None = None,
        adopt: bool = True,
        enough: bool = False,
    ) -> float:
        """-> the candidate's cosine; it becomes the best where it is better (or ``enough``: reaches the aim), unless
        it is only looked at."""
        ranges = ranges or self.ranges
        made = smooth.quantize(self.model, ranges, params)
        answers = iter(self.answers)
        found = parity.compare(lambda feed: next(answers), parity.onnx_run(made), self.held, self.goal.summary)
        cosine, error = min(((one["cosine"], one["cosine_error"]) for one in found.values()), default=(1.0, 0.0))
        if not adopt:
            return cosine
        products = count(made, self.goal.dims)
        better = cosine > self.cosine or (enough and cosine - 2 * error >= self.aim)
        self.rows.append({
            "tried": what,
            "cosine": round(cosine, 6),
            "standard_error": round(error, 6),
            "int8_share": round(share(products).part, 4),
            "better": better,
        })  # fmt: skip
        if better:
            self.ranges = ranges
            self.best, self.cosine, self.error, self.products = params, cosine, error, products
        return cosine

    def history(self) -> dict[str, Any]:
        return {
            "goal": {"cosine": self.aim, "int8_share": self.goal.share},
            "reached": self.reached,
            "cosine": round(self.cosine, 6),
            "candidates": self.rows,
        }


def _split(feeds: Feeds) -> tuple[Iterator[Arrays], list[Arrays], bool]:
    """-> what to calibrate on, what to measure on (complete once the first was read to its end), and whether the two
    are apart."""
    rest = iter(feeds)
    first = list(islice(rest, ENOUGH))
    if len(first) < ENOUGH:
        return iter(first), first, False
    held: list[Arrays] = []

    def others() -> Iterator[Arrays]:
        for number, feed in enumerate(chain(first, rest), 1):
            if number % _EVERY == 0 and len(held) < HELD:
                held.append(feed)
            else:
                yield feed

    return others(), held, True


def _look(model: onnx.ModelProto, feeds: Feeds, attention: Sequence[str]) -> dict[str, _Seen]:
    """One pass: what the search needs to know of every tensor that may become 8 bits."""
    by_row = {node.input[0] for node in smooth.matrices(model)}
    by_map = {node.input[0] for node in _qdq.products(model) if node.op_type == "Conv"}
    depthwise = {node.input[0] for node in _qdq.depthwise(model)}
    seen: dict[str, _Seen] = {}

    def see(name: str, values: Array) -> None:
        flat = values.reshape(-1, values.shape[-1]) if name in by_row else values.reshape(-1)
        low, high = flat.min(axis=0), flat.max(axis=0)
        one = seen.setdefault(name, _Seen(low, high))
        one.low, one.high = np.minimum(one.low, low), np.maximum(one.high, high)
        if name in depthwise:
            one.channels.append(_qdq.extremes(values, 1))
        if len(one.sample) < _FEEDS:
            most = min(len(flat), _ROWS if name in by_row else _VALUES)
            one.sample.append(flat[np.linspace(0, len(flat) - 1, most).round().astype(int)])
            if name in by_map:
                one.means.append(values.mean(axis=(0, *range(2, values.ndim)), dtype=np.float64))

    _qdq.watch(model, feeds, _qdq.watched(model, attention), see)
    for name in _qdq.probabilities(model.graph.node) & seen.keys() - by_row:
        # as far as 1, unless all are so small that steps of 1/255 would lose them
        seen[name].low, seen[name].high = np.float32(0), np.float32(min(1.0, 2 * float(seen[name].high)))
    return seen


@dataclass(frozen=True)
class _Tuned:
    """Of what matrix products read: ``alpha``, ``clip`` after the division (None: the extremes), what is lost there of
    their output's square, and by node the mean of float minus INT8 output."""

    alpha: float | None
    clip: tuple[float, float] | None
    noise: float
    shifts: Mapping[str, Array]


def _tune(
    model: onnx.ModelProto,
    seen: Mapping[str, _Seen],
    params: Params,
    now: smooth.Params,
    *,
    alphas: bool = False,
    clips: bool = False,
) -> dict[str, _Tuned]:
    """By tensor: the alpha, or the clip, of the least squared error of its products on the sampled rows; what is not
    asked for stays as it is ``now``."""
    draft = _qdq.Draft(model)
    groups: dict[str, list[onnx.NodeProto]] = {}
    for node in smooth.matrices(draft, now.keep):
        groups.setdefault(node.input[0], []).append(node)
    found = {}
    for name, nodes in groups.items():
        one, weights = seen[name], [smooth.rows(draft, node) for node in nodes]
        weight = weights[0] if len(weights) == 1 else np.concatenate(weights, axis=1)
        rows = np.concatenate(one.sample).astype(np.float32)
        true = rows @ weight
        signal = max(float(np.square(true, dtype=np.float64).sum()), 1e-30)
        best = _Tuned(None, None, np.inf, {})
        here = now.alphas.get(name, now.alpha)
        for alpha in dict.fromkeys((here, *params.alphas)) if alphas else (here,):
            scale = _division(one, weight, alpha)
            divided, integer = rows / scale, _rounded(weight * scale[:, None], 1, params.reduce_range)
            low, high = float((one.low / scale).min()), float((one.high / scale).max())
            options: list[tuple[float, float] | None] = [now.clips.get(name)]
            if clips:
                cuts = np.percentile(divided, [(100 - p, p) for p in _PERCENTILES])
                options = [None, *((low * cut, high * cut) for cut in _CUTS)]
                options += [(min(float(a), 0.0), max(float(b), 0.0)) for a, b in cuts]
            for clip in options:
                lost = true - _through(divided, *(clip or (low, high))) @ integer
                noise = float(np.square(lost, dtype=np.float64).sum()) / signal
                if noise < best.noise:
                    means = np.split(lost.mean(axis=0), np.cumsum([w.shape[1] for w in weights])[:-1])
                    best = _Tuned(alpha, clip, noise, dict(zip((n.name for n in nodes), means, strict=True)))
        found[name] = best
    return found


def _division(one: _Seen, weight: Array, alpha: float | None) -> Array:
    """s [C] of Xiao's eq. 4, as `smooth` works it out; ones for none."""
    if alpha is None:
        return np.ones(len(weight), np.float32)
    largest = np.maximum(np.abs(one.low), np.abs(one.high)).astype(np.float64)
    return smooth.factors(largest, np.abs(weight).max(axis=1), alpha).astype(np.float32)


def _clips(
    model: onnx.ModelProto, seen: Mapping[str, _Seen], attention: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Of what convolutions read and write: the range of the least squared error of the values (Banner et al.)."""
    others = {node.input[0] for node in smooth.matrices(model)} | _qdq.probabilities(model.graph.node)
    found = {}
    for name in _qdq.watched(model):
        if name in others:
            continue
        values, low, high = np.concatenate(seen[name].sample), float(seen[name].low), float(seen[name].high)
        options = [(low * cut, high * cut) for cut in (1.0, *_CUTS)]
        errors = [np.square(values - _through(values, *option), dtype=np.float64).sum() for option in options]
        found[name] = options[int(np.argmin(errors))]
    return found


def _shifts(
    model: onnx.ModelProto, tuned: Mapping[str, _Tuned], seen: Mapping[str, _Seen], params: Params
) -> dict[str, tuple[float, ...]]:
    """By node: E[float output - INT8 output] of each output channel. Matrix products: on the sampled rows, weights and
    activations. Convolutions: of the weights' rounding, times the mean of each input channel."""
    found = {name: shift for one in tuned.values() for name, shift in one.shifts.items()}
    draft = _qdq.Draft(model)
    for node in _qdq.products(draft):
        if node.op_type != "Conv":
            continue
        weight = draft.array(node.input[1])
        lost = (weight - _rounded(weight, 0, params.reduce_range)).reshape(*weight.shape[:2], -1).sum(axis=2)
        means = np.mean(seen[node.input[0]].means, axis=0).reshape(-1, weight.shape[1])  # [groups, inputs of one]
        owner = np.arange(len(weight)) // (len(weight) // len(means))
        found[node.name] = np.sum(lost * means[owner], axis=1)
    return {name: tuple(np.asarray(shift, np.float64).tolist()) for name, shift in found.items()}


def _depthwise(trial: _Trial, goal: Goal) -> list[str]:
    """The depthwise convolutions in INT8, where the goal's share is kept without them; else none."""
    whole = share(trial.products)
    macs = {one.name: one.macs for one in trial.products if one.int8}
    found = [node.name for node in _qdq.depthwise(trial.model, trial.best.keep) if node.name in macs]
    return found if whole.int8 - sum(macs[name] for name in found) >= goal.share * whole.macs else []


def _give_up(trial: _Trial, tuned: Mapping[str, _Tuned], goal: Goal) -> None:
    """Products in float, by gain in cosine for each multiply-accumulate given up, until the goal or its share."""
    start = trial.best
    noise = {name: one.noise for one in tuned.values() for name in one.shifts}
    whole = share(trial.products)
    left = whole.int8 - goal.share * whole.macs
    cost = {one.name: one.macs for one in trial.products if one.int8 and one.macs <= left}
    nodes = [node.name for node in _qdq.products(trial.model, start.keep) if node.name in cost]
    noisy = sorted((name for name in nodes if name in noise), key=lambda name: -noise[name])[:_ALONE]
    gains = {}
    for name in nodes:
        if name not in noise or name in noisy:
            gains[name] = trial.run(_without(start, name), "", adopt=False) - trial.cosine
    for name in sorted(gains, key=lambda name: -gains[name] / max(cost[name], 1)):
        if trial.reached or gains[name] <= 0:
            break
        if cost[name] <= left:
            before = trial.cosine
            trial.run(_without(trial.best, name), f"{name} in float")
            left -= cost[name] if trial.cosine > before else 0


def _said(alpha: float | None) -> str:
    return "no alpha" if alpha is None else f"alpha {alpha}"


def _without(params: smooth.Params, name: str) -> smooth.Params:
    return params.model_copy(update={"keep": (*params.keep, name)})


def _all(params: Params) -> Params:
    """What is tried in the end."""
    return params.model_copy(update={"attention": "all"}) if params.attention == "fits" else params


def _attention(model: onnx.ModelProto, params: Params, goal: Goal) -> tuple[str, ...]:
    """The products of activations to quantize: none, as long as the others are the share that is asked for."""
    followers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            followers.setdefault(name, []).append(node)

    def scores(node: onnx.NodeProto, steps: int = 4) -> bool:
        after = followers.get(node.output[0], [])
        return any(one.op_type == "Softmax" or (steps > 1 and scores(one, steps - 1)) for one in after)

    mixers = _qdq.probabilities(model.graph.node)
    twos = _qdq.pairs(model)
    first = tuple(node.name for node in twos if node.input[0] not in mixers and scores(node))
    both = tuple(node.name for node in twos if node.name in first or node.input[0] in mixers)
    if params.attention not in ("needed", "fits"):
        return {"never": (), "scores": first, "all": both}[params.attention]
    macs = {one.name: one.macs for one in count(model, goal.dims)}
    total = sum(macs.values())
    constant = sum(macs[node.name] for node in _qdq.products(model, params.keep))
    for chosen in ((), first):
        if constant + sum(macs[name] for name in chosen) >= goal.share * total:
            return chosen
    return both


def _rounded(weight: Array, axis: int, reduce_range: bool) -> Array:
    """What a weight is after 8 bits, float32."""
    whole, scale = _qdq.integers(weight, axis, reduce_range)
    return (whole * scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])).astype(np.float32)


def _through(values: Array, low: float, high: float) -> Array:
    """What an activation is after 8 bits over [low, high], float32."""
    step, zero = _qdq.step(low, high)
    whole: Array = (np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step
    return whole


QUANTIZERS.register("search")(Quantizer(Params, quantize, observe, search))
