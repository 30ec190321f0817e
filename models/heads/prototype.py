"""Prototype head: nearest class mean.

Source: Mensink et al. 2013 (doi 10.1109/TPAMI.2013.83), nearest class mean; Snell et al. 2017 (arXiv 1703.05175),
         prototypes. Here prototypes are unit vectors, so the distance is the cosine.
In:     image [B, D], unit rows; columns.assets["prototypes"] [C, D], unit rows.
Assets: prototypes float32 [C, D], fitted.
Out:    logits float32 [B, C] = scale * cosine; scores sum to 1 over C.
"""

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays
from calmclip.models.heads import HEADS, Asset, Columns, Examples, Fit, Head
from calmclip.models.heads.cosine import softmax


class Params(FrozenModel):
    scale: float = Field(default=15.0, gt=0, le=1e4)  # of the cosines; `calibrate` finds the temperature


def fit(examples: Examples, params: Params) -> Arrays:
    """The unit mean of each label's unit rows, summed in float64. Raises `BadRequest` for a label without a picture."""
    counts = np.bincount(examples.truth, minlength=len(examples.labels))
    if not counts.all():
        raise BadRequest(
            f"the label {examples.labels[int(counts.argmin())]!r} has no picture; expected at least one for each label"
        )
    sums = np.zeros((len(examples.labels), examples.image.shape[1]))
    np.add.at(sums, examples.truth, examples.image)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return {"prototypes": (sums / np.maximum(lengths, 1e-12)).astype(np.float32)}


def logits(image: Array, columns: Columns, params: Params) -> Array:
    return np.float32(params.scale) * (image @ columns.assets["prototypes"].T)


HEADS.register("prototype")(Head(Params, logits, softmax, {"prototypes": Asset(("C", "D"))}, Fit(fit)))
