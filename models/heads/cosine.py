"""Cosine head: softmax over the labels.

Source: Radford et al. 2021 (arXiv 2103.00020), figure 3: logits = exp(t) * I T^T, softmax over the classes.
In:     image [B, D], columns.text [C, D], unit rows.
Assets: none.
Out:    logits float32 [B, C] = scale * cosine; scores sum to 1 over C.
"""

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array
from calmclip.models.heads import HEADS, Columns, Head


class Params(FrozenModel):
    scale: float = Field(default=100.0, gt=0, le=1e4)  # exp of the learned log temperature


def logits(image: Array, columns: Columns, params: Params) -> Array:
    return np.float32(params.scale) * (image @ columns.text.T)


def softmax(logits: Array) -> Array:
    """Over the last axis, with the maximum subtracted; float32."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: Array = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


HEADS.register("cosine")(Head(Params, logits, softmax))
