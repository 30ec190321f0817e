"""Tip head: zero-shot logits plus votes of the pictures that it was shown, by their nearness (Tip-Adapter).

Source: Zhang et al. 2022 (arXiv 2111.03930), without training.
In:     image [B, D], columns.text [C, D], unit rows.
Assets: keys float32 [N, D], the unit rows of the pictures; values float32 [N, C], 1 for the label of each, else 0.
Out:    logits float32 [B, C] = scale * cosine + alpha * exp(-beta (1 - image . keys)) values; scores sum to 1 over C.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array, Arrays
from calmclip.models.heads import HEADS, Asset, Columns, Examples, Fit, Head
from calmclip.models.heads.cosine import softmax

ALPHAS = np.array([0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])  # of the zero-shot scale
BETAS = (1.0, 2.0, 5.5, 10.0, 20.0)


class Params(FrozenModel):
    scale: float | None = Field(default=None, gt=0, le=1e4)  # None: the bundle's
    alpha: float | None = Field(default=None, ge=0, le=1e6)  # None: the pictures choose
    beta: float | None = Field(default=None, ge=0, le=1e4)  # None: the pictures choose


def grid(examples: Examples) -> Mapping[str, Sequence[float]]:
    """`alpha` grows with the scale of zero-shot, beside which it stands; 0 is zero-shot."""
    return {"scale": (examples.scale,), "alpha": (examples.scale * ALPHAS).tolist(), "beta": BETAS}


def fit(examples: Examples, params: FrozenModel) -> Arrays:
    values = np.eye(len(examples.labels), dtype=np.float32)[examples.truth]
    return {"keys": examples.image.astype(np.float32), "values": values}


def zero_shot(image: Array, columns: Columns, scale: float | None) -> Array:
    return np.float32(scale or 0) * (image @ columns.text.T)


def votes(near: Array, columns: Columns, beta: float | None) -> Array:
    """``near`` float32 [B, N], cosines to the keys -> [B, C]."""
    summed: Array = np.exp(np.float32(beta or 0) * (near - 1)) @ columns.assets["values"]
    return summed


def logits(image: Array, columns: Columns, params: Params) -> Array:
    cache = votes(image @ columns.assets["keys"].T, columns, params.beta)
    return zero_shot(image, columns, params.scale) + np.float32(params.alpha or 0) * cache


ASSETS = {"keys": Asset(("N", "D")), "values": Asset(("N", "C"))}
HEADS.register("tip")(Head(Params, logits, softmax, ASSETS, Fit(fit, grid, affine=("alpha",))))
