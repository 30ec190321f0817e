"""Shared by evals of vectors: pictures and texts -> unit rows."""

from collections.abc import Sequence

import numpy as np

from calmclip.models.evals.progress import progress
from calmclip.models.flow import Array
from calmclip.models.runner import Picture, Runner

_CHUNK = 64  # texts in one call


def vectors(runner: Runner, pictures: Sequence[Picture], captions: Sequence[str]) -> tuple[Array, Array]:
    """-> float32 [P, D] of the pictures and [C, D] of the captions, with progress bars. Both have at least one."""
    name = runner.bundle.name
    images = runner.embed(images=progress(pictures, f"pictures {name}", "picture", len(pictures)))
    chunks = progress(range(0, len(captions), _CHUNK), f"captions {name}", f"{_CHUNK} captions")
    return images, np.concatenate([runner.embed(texts=captions[i : i + _CHUNK]) for i in chunks])
