"""Sigmoid head: each label has its own probability, so several labels or none may be true.

Source: Zhai et al. 2023 (arXiv 2303.15343), section 3.2: p = sigmoid(t * I T^T + b).
In:     image [B, D], columns.text [C, D], unit rows.
Assets: none.
Out:    logits float32 [B, C] = scale * cosine + bias; scores in (0, 1), independent of each other.
"""

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array
from calmclip.models.heads import HEADS, Columns, Head


class Params(FrozenModel):
    scale: float = Field(default=10.0, gt=0, le=1e4)  # exp of the learned log temperature
    bias: float = Field(default=-10.0, ge=-1e4, le=1e4)


def logits(image: Array, columns: Columns, params: Params) -> Array:
    return np.float32(params.scale) * (image @ columns.text.T) + np.float32(params.bias)


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow at either end; float32."""
    half = np.float32(0.5)
    return half * (1 + np.tanh(half * logits))


HEADS.register("sigmoid")(Head(Params, logits, sigmoid, exclusive=False))
