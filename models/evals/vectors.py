"""Shared by evals of vectors: pictures and texts -> unit rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calmclip.models.errors import BadRequest
from calmclip.models.evals.progress import progress
from calmclip.models.flow import Array
from calmclip.models.runner import Picture, Runner
from calmclip.models.vector_files import TEXT_VECTORS

_CHUNK = 64  # texts in one call


def vectors(
    runner: Runner,
    pictures: Sequence[Picture],
    captions: Sequence[str],
    made: Mapping[str, Array] | None = None,
) -> tuple[Array, Array]:
    """-> float32 [P, D] of the pictures and [C, D] of the captions, with progress bars. Both have at least one.

    ``made``: caption -> what the language model of a bundle that reads vectors made of it; other bundles read the
    caption. None: the eval reads no such vectors. Raises `BadRequest` for a caption without a vector.
    """
    name, made_of = runner.bundle.name, made if made is not None and runner.bundle.reads_vectors else None
    if made_of is not None and (bare := [caption for caption in captions if caption not in made_of]):
        raise BadRequest(
            f"bundle {name!r} reads {runner.bundle.vectors().wanted}, and {len(bare)} of {len(captions)} captions have "
            f"none, such as {bare[0][:40]!r}; expected them in {TEXT_VECTORS} beside the captions: arrays `texts` and "
            "`vectors`"
        )
    images = runner.embed(images=progress(pictures, f"pictures {name}", "picture", len(pictures)))
    rows = []
    for start in progress(range(0, len(captions), _CHUNK), f"captions {name}", f"{_CHUNK} captions"):
        part = captions[start : start + _CHUNK]
        given: dict[str, Any] = (
            {"texts": part} if made_of is None else {"vectors": [made_of[caption] for caption in part]}
        )
        rows.append(runner.embed(**given))
    return images, np.concatenate(rows)
