"""The tower of the graph `attribution`, without a module: its inputs, its outputs and how two runs are compared."""

from dataclasses import replace

import numpy as np

from calmclip.export.nets import Tower, float32
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.flow import Arrays

ROLE = "attribution"
LAYERS = 1  # the best with the built-in model (docs/evaluation.md); CLIP4DM names no number that we could confirm


def borrower(text: Tower, image: Tensor) -> Tower:
    """``text``: the tower of texts, whose inputs and weights it has; ``image``: the vector of a picture."""
    length = next(iter(text.inputs.values())).shape[1]
    return replace(
        text,
        inputs={**text.inputs, "image_embeds": image},
        outputs={"contributions": float32("B", length), "score": float32("B")},
        preprocess=None,
        quantizer="none",
        quantizer_params={},
        prefix="",
        summary=summary,
        graph=None,
        reads={**dict.fromkeys(text.inputs, "text"), "image_embeds": "image"},
        borrows="text",
    )


def summary(outputs: Arrays) -> Arrays:
    """Contributions and score of a text as one row [B, T + 1]. The sign of a score near 0 alone says nothing."""
    return {"contributions": np.concatenate([outputs["contributions"], outputs["score"][:, None]], axis=1)}
