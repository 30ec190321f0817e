"""How much the loss of a net can grow when one layer alone is moved a little; which layers stand out along a path.

Source: Foret et al. 2021 (arXiv 2010.01412), equation 1, for sharpness as a maximum over a ball. A study of how CLIP's
weights interpolate (github.com/alirezaabdollahpour/CLIP_Mode_Connectivity, without code) takes it layer by layer and
along the path. For layer l with the weights theta_l:

    s_l = max over ||eps||_2 <= rho ||theta_l|| of L(theta + eps_l) - L(theta)

The maximum is searched by gradient ascent: eps becomes eps + r g / ||g||, and is scaled back to the ball's radius r if
it is longer. If the loss grows by less than a quarter of what g predicts (Armijo 1966), eps stays and the next step is
half as long; else it is twice as long, r at most. For a quadratic loss at its minimum this is the power method on
H + c I, which ends at the eigenvector of the largest eigenvalue: s = r^2 / 2 times it. The largest loss of all points
counts, and never less than 0. A search finds a lower bound of the maximum.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from calmclip.export import zero_shot
from calmclip.export.interpolate import Ends
from calmclip.export.nets import Net, ready
from calmclip.export.zero_shot import DataSet
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest, ExportError
from calmclip.models.evals.progress import progress

ROLES = ("image", "text")
_BLOCK = re.compile(r"(.*?\b(?:blocks|resblocks|layer\d+)\.\d+)\..*")
_SAME = 1e-3  # largest difference of unit vectors before and after folding that is rounding
_GRAPH = 32  # pictures of which a graph of gradients is kept at once

_ENOUGH = 0.25  # of the predicted growth; on a parabola the best step has half of it

Tensors = list[Tensor]
Loss = Callable[[], Iterable[Tensor]]  # terms whose sum is the loss; each has a graph of its own


class Ascent(FrozenModel):
    """``steps`` of ascent from the weights, in the direction of the gradient, and from each of ``restarts`` random
    points of the ball's surface. ``steps`` 0: the random points alone."""

    rho: float = Field(default=0.05, gt=0, le=10)
    steps: int = Field(default=5, ge=0, le=1000)
    restarts: int = Field(default=0, ge=0, le=1000)
    seed: int = Field(default=0, ge=0)


def sharpness(loss: Loss, weights: Sequence[Tensor], how: Ascent, *, number: int = 0) -> float:
    """The largest growth of ``loss`` that is found in the ball around ``weights``, the tensors of one layer, which the
    loss reads. They have their own bits again afterwards. ``number``: of the layer; it and the seed draw the restarts.

    Raises `BadRequest` if there is no point to try; `ExportError` for a loss that is not finite.
    """
    if not (how.steps or how.restarts):
        raise BadRequest("steps is 0 and restarts is 0; expected at least one of them above 0")
    start = [tensor.detach().clone() for tensor in weights]
    radius = how.rho * _length(start)
    seed = int(np.random.SeedSequence((how.seed, number)).generate_state(1)[0])
    draw = torch.Generator().manual_seed(seed)
    flags = [tensor.requires_grad for tensor in weights]
    try:
        for tensor in weights:
            tensor.requires_grad_(True)
        here, best = _ascend(loss, weights, start, [torch.zeros_like(t) for t in start], radius, how.steps, draw)
        for _ in range(how.restarts if radius else 0):
            _, value = _ascend(loss, weights, start, _random(start, radius, draw), radius, how.steps, draw)
            best = max(best, value)
        return best - here
    finally:
        for tensor, before, flag in zip(weights, start, flags, strict=True):
            with torch.no_grad():
                tensor.copy_(before)
            tensor.requires_grad_(flag)


def _ascend(
    loss: Loss,
    weights: Sequence[Tensor],
    start: Tensors,
    eps: Tensors,
    radius: float,
    steps: int,
    draw: torch.Generator,
) -> tuple[float, float]:
    """-> the loss at ``start`` + ``eps``, and the largest of the way from there."""

    def at(point: Tensors, *, gradient: bool) -> tuple[float, Tensors]:
        with torch.no_grad():
            for tensor, before, change in zip(weights, start, point, strict=True):
                tensor.copy_(before + change)
        return _measured(loss, weights, gradient=gradient)

    value, gradient = at(eps, gradient=steps > 0)
    here = best = value
    size = radius
    for left in range(steps - 1 if radius else -1, -1, -1):
        slope = _length(gradient)
        step = _to(gradient, size) if slope else _random(start, size, draw)
        moved = [change + more for change, more in zip(eps, step, strict=True)]
        moved = _to(moved, radius) if _length(moved) > radius else moved
        reached, there = at(moved, gradient=left > 0)
        best = max(best, reached)
        predicted = sum(float((g * (m - e)).double().sum()) for g, m, e in zip(gradient, moved, eps, strict=True))
        if reached > value + _ENOUGH * predicted or not slope:
            eps, value, gradient, size = moved, reached, there, min(2 * size, radius)
        else:
            size /= 2
    return here, best


def _measured(loss: Loss, weights: Sequence[Tensor], *, gradient: bool) -> tuple[float, Tensors]:
    """The loss, and its gradient: zeros for a tensor that it does not read. Raises `ExportError`."""
    total, sums = 0.0, [torch.zeros_like(tensor) for tensor in weights]
    with torch.set_grad_enabled(gradient):
        for term in loss():
            total += float(term.detach())
            parts = torch.autograd.grad(term, [*weights], allow_unused=True) if gradient and term.requires_grad else ()
            for place, part in enumerate(parts):
                if part is not None:
                    sums[place] += part
    if not math.isfinite(total):
        raise ExportError(f"the loss near the weights is {total}; a smaller rho may help")
    return total, sums


def _length(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors))


def _to(tensors: Tensors, length: float) -> Tensors:
    factor = length / _length(tensors)
    return [tensor * factor for tensor in tensors]


def _random(like: Tensors, radius: float, draw: torch.Generator) -> Tensors:
    """A point of the ball's surface, uniform."""
    return _to([torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype) for tensor in like], radius)


# --- the layers of a net ----------------------------------------------------------------------------------------------


def layers(net: Net, *, modules: bool = False) -> dict[str, list[str]]:
    """Layer -> our names of its parameters, in the order of the towers: the blocks, and each module outside of them;
    with ``modules`` each module that has parameters. A parameter of a tower itself is a layer."""
    named: dict[str, list[str]] = {}
    for role in ROLES:
        tower = net.towers[role]
        for name, _ in tower.module.named_parameters():
            block = None if modules else _BLOCK.fullmatch(name)
            layer = block[1] if block else name.rpartition(".")[0] or name
            named.setdefault(f"{tower.prefix}{layer}", []).append(f"{tower.prefix}{name}")
    return named


def check(net: Net, data: DataSet) -> None:
    """Raises `BadRequest` for a tower that computes only after folding, where its weights are no longer those of the
    checkpoint."""
    folded = ready(net)
    inputs = {"image": (data.pixels[:1],), "text": tuple(tokens[:1] for tokens in data.tokens)}
    for role in ROLES:
        with torch.inference_mode():
            expected = folded.towers[role].module(*inputs[role])
            try:
                same = torch.allclose(net.towers[role].module(*inputs[role]), expected, atol=_SAME)
            except (AttributeError, NotImplementedError, RuntimeError):  # a part that only folding completes
                same = False
        if not same:
            raise BadRequest(
                f"the {role} tower of {net.source.model} computes only after its layers are folded, so they cannot be "
                "moved one by one; sharpness does not support this architecture (interpolate does)"
            )


def measure(net: Net, data: DataSet, named: Mapping[str, Sequence[str]], how: Ascent, title: str) -> dict[str, float]:
    """Layer -> its sharpness for the mean zero-shot loss in nats. The other tower's vectors are computed once."""
    parameters = {
        f"{net.towers[role].prefix}{name}": tensor
        for role in ROLES
        for name, tensor in net.towers[role].module.named_parameters()
    }
    losses = dict(zip(ROLES, (_image_loss(net, data), _text_loss(net, data)), strict=True))
    every = [*layers(net, modules=True), *layers(net)]
    return {
        layer: sharpness(
            losses[layer.partition(".")[0]], [parameters[name] for name in names], how, number=every.index(layer)
        )
        for layer, names in progress(named.items(), title, "layer", len(named))
    }


def along(
    ends: Ends, alphas: Sequence[float], data: DataSet, named: Mapping[str, Sequence[str]], how: Ascent
) -> tuple[list[float], dict[str, list[float]]]:
    """-> the loss at each alpha, and layer -> its sharpness at each alpha."""
    losses: list[float] = []
    values: dict[str, list[float]] = {layer: [] for layer in named}
    for alpha in alphas:
        net = ends.load(ends.at(alpha))
        losses.append(zero_shot.score(net, data).loss)
        for layer, value in measure(net, data, named, how, f"alpha {alpha:g}").items():
            values[layer].append(value)
    return losses, values


def _image_loss(net: Net, data: DataSet) -> Loss:
    texts, module = zero_shot.labels(net, data).clone(), net.towers["image"].module
    factor, count = zero_shot.scale(net), len(data.truth)

    def terms() -> Iterator[Tensor]:
        for pixels, truth in zip(torch.split(data.pixels, _GRAPH), torch.split(data.truth, _GRAPH), strict=True):
            yield zero_shot.loss(factor * module(pixels) @ texts.T, truth) / count

    return terms


def _text_loss(net: Net, data: DataSet) -> Loss:
    images = zero_shot.pictures(net, data).clone()
    factor, count = zero_shot.scale(net), len(data.truth)

    def terms() -> Iterator[Tensor]:
        logits = factor * images @ zero_shot.labels(net, data, gradients=True).T
        yield zero_shot.loss(logits, data.truth) / count

    return terms


def stragglers(peaks: Mapping[str, float]) -> list[str]:
    """The layers that stand out, largest first. ``peaks``: layer -> its largest sharpness along the path.

    A peak stands out if it is more than a standard deviation above the mean of all peaks. If none is, the largest does,
    unless it is 0. By Cantelli's inequality at most half of the layers stand out.
    """
    falling = sorted((layer for layer in peaks if peaks[layer] > 0), key=lambda layer: -peaks[layer])
    values = np.array([*peaks.values()])
    return [layer for layer in falling if peaks[layer] > values.mean() + values.std()] or falling[:1]
