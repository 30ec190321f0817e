"""Softmax regression head: zero-shot logits with a factor and a bias for each label, fitted to pictures.

Source: Li et al. 2023 (arXiv 2304.13276), softmax regression: f(x) = softmax(A x), L(x) = |f(x) - b|^2 / 2,
         gradient A^T (diag f - f f^T) (f - b). Armijo 1966 for the length of a step.
In:     image [B, D], columns.text [C, D], unit rows.
Assets: factor float32 [C], bias float32 [C]: x, with A = [diag(zero-shot logits), I] of a picture, b its label.
Out:    logits float32 [B, C] = factor * scale * cosine + bias; scores sum to 1 over C.

The mean of L over the pictures is minimized, plus penalty / 2 times the squared distance from zero-shot (factor 1, bias
0). L is not convex; the descent starts at zero-shot.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array, Arrays
from calmclip.models.heads import HEADS, Asset, Columns, Examples, Fit, Head
from calmclip.models.heads.cosine import softmax

PENALTIES = (0.01, 0.1, 1.0, 10.0)
STEPS = 40
SUFFICIENT = 1e-4  # of the decrease that the gradient promises; Armijo's condition


class Params(FrozenModel):
    scale: float | None = Field(default=None, gt=0, le=1e4)  # None: the bundle's
    penalty: float | None = Field(default=None, gt=0, le=1e6)  # None: the pictures choose


def grid(examples: Examples) -> Mapping[str, Sequence[float]]:
    return {"scale": (examples.scale,), "penalty": PENALTIES}


def objective(zero_shot: Array, truth: Array, penalty: float) -> Callable[[Array], tuple[float, Array]]:
    """``zero_shot`` float64 [N, C] -> a function of x float64 [2, C], factors and biases: loss, gradient [2, C]."""
    targets, start = np.eye(zero_shot.shape[1])[truth], np.repeat([[1.0], [0.0]], zero_shot.shape[1], axis=1)

    def at(x: Array) -> tuple[float, Array]:
        f = softmax(zero_shot * x[0] + x[1])
        off, moved = f - targets, x - start
        back = f * (off - (f * off).sum(axis=1, keepdims=True))  # (diag f - f f^T) (f - b), for each picture
        slope = np.stack([(zero_shot * back).mean(axis=0), back.mean(axis=0)]) + penalty * moved
        return float((off**2).sum(axis=1).mean() + penalty * (moved**2).sum()) / 2, slope

    return at


def descend(at: Callable[[Array], tuple[float, Array]], x: Array) -> Array:
    """`STEPS` steps along the gradient. Each starts at twice the length of the last one and is halved until the loss
    falls by `SUFFICIENT` of what the gradient promises."""
    length = 1.0
    loss, slope = at(x)
    for _ in range(STEPS):
        promised = SUFFICIENT * float((slope**2).sum())
        while length > 1e-12:
            next_loss, next_slope = at(x - length * slope)
            if next_loss <= loss - length * promised:
                break
            length /= 2
        else:
            return x
        x, loss, slope, length = x - length * slope, next_loss, next_slope, 2 * length
    return x


def fit(examples: Examples, params: Params) -> Arrays:
    zero_shot = (params.scale or 0) * (examples.image @ examples.text.T).astype(np.float64)
    start = np.repeat([[1.0], [0.0]], zero_shot.shape[1], axis=1)
    factor, bias = descend(objective(zero_shot, examples.truth, params.penalty or 0), start).astype(np.float32)
    return {"factor": factor, "bias": bias}


def logits(image: Array, columns: Columns, params: Params) -> Array:
    zero_shot = np.float32(params.scale or 0) * (image @ columns.text.T)
    return zero_shot * columns.assets["factor"] + columns.assets["bias"]


ASSETS = {"factor": Asset(("C",)), "bias": Asset(("C",))}
HEADS.register("softmax_regression")(Head(Params, logits, softmax, ASSETS, Fit(fit, grid, ("penalty",))))
