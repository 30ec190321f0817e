"""Mixture head: each picture chooses two of several prompts, and its labels have the mean of their vectors.

Source: MoCoOp, Du et al. 2024 (arXiv 2409.12011), mixture of prompts: a linear router on the picture's vector, the two
best experts, softmax over their two logits. As in the paper's code, the mixture of two unit vectors is not made a unit
vector again. The bank is folded at export, so no text is embedded.
In:     image [B, D], unit rows.
Assets: bank float32 [G, C, D], unit rows: a label's vector by each expert; gate float32 [G, D]; bias float32 [G].
Out:    logits float32 [B, C] = scale * x . sum over the two best experts of p_g bank_g; scores sum to 1 over C.
"""

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array, Arrays
from calmclip.models.heads import HEADS, Asset, Columns, Head
from calmclip.models.heads.cosine import softmax

TOP = 2  # experts of a picture


class Params(FrozenModel):
    scale: float = Field(default=100.0, gt=0, le=1e4)  # exp of the learned log temperature


def logits(image: Array, columns: Columns, params: Params) -> Array:
    bank, gate, bias = (columns.assets[name] for name in ("bank", "gate", "bias"))
    routes = image @ gate.T + bias
    best = np.argsort(-routes, axis=1, kind="stable")[:, :TOP]
    parts = softmax(np.take_along_axis(routes, best, axis=1))
    # x . (p t + q u) = p (x . t) + q (x . u): the experts' logits are summed, and no row of the bank is copied
    rows = [
        sum(p * (bank[g] @ x) for g, p in zip(*two, strict=True)) for x, *two in zip(image, best, parts, strict=True)
    ]
    return np.float32(params.scale) * np.stack(rows)


def vectors(assets: Arrays) -> Array:
    """[C, D] unit rows: the mean of a label's vectors over all experts."""
    means = assets["bank"].mean(axis=0)
    units: Array = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return units


HEADS.register("mixture")(
    Head(
        Params,
        logits,
        softmax,
        {"bank": Asset(("G", "C", "D")), "gate": Asset(("G", "D")), "bias": Asset(("G",))},
        vectors=vectors,
    )
)
