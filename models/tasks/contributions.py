"""How much each word of a caption contributes to its cosine with a picture: the methods of the task explain.

leave_one_out  contribution of word w = s(caption) - s(caption without w), with s the cosine with the picture. The
               n + 1 texts are one batch of the graph `text`. Of a caption of one word the word contributes s. For a
               scorer that sums vectors of words this is the exact contribution. The weight of w is the distance of the
               two texts' vectors, so a contribution is weight times the cosine of picture and the way from one text to
               the other.
gradient       `gradient` has it; it needs the graph `attribution`.

Source: CLIP4DM, Nam et al. 2024 (arXiv 2412.18404), for signed contributions of words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Manifest
from calmclip.models.flow import Array, Flow
from calmclip.models.tasks.features import texts
from calmclip.models.tasks.words import Span, without


@dataclass(frozen=True)
class Scene:
    """``spans``: the words of the caption, at least one. ``image`` float32 [D]: the unit row of the picture."""

    caption: str
    spans: Sequence[Span]
    image: Array


@dataclass(frozen=True)
class Told:
    """``score``: the cosine of picture and caption. ``contributions`` float64 [N]: of each word. ``weights`` float64
    [N], not negative: how much each word means for the caption, whatever the picture; None: unknown."""

    score: float
    contributions: Array
    weights: Array | None = None

    def margins(self, expected: float) -> Array:
        """float64 [N]: contributions beyond ``expected`` for each unit of weight."""
        if self.weights is None:
            return self.contributions
        beyond: Array = self.contributions - expected * self.weights
        return beyond


@dataclass(frozen=True)
class Method:
    """``role``: the graph that it needs beside `image` and `text`, or empty; ``remedy``: how to get a bundle that has
    this graph. ``threshold``: of margins, for a bundle to which none was fitted."""

    flow: Callable[[Bundle, Scene], Flow[Told]]
    threshold: float
    role: str = ""
    remedy: str = ""

    def fits(self, manifest: Manifest) -> bool:
        return not self.role or self.role in manifest.graphs


def leave_one_out(bundle: Bundle, scene: Scene) -> Flow[Told]:
    shorter = [without(scene.caption, span) for span in scene.spans]
    remaining = [place for place, text in enumerate(shorter) if text]
    rows = yield from texts(bundle, (scene.caption, *(shorter[place] for place in remaining)))
    vectors = rows.astype(np.float64)
    moves = np.tile(vectors[0], (len(shorter), 1))
    moves[remaining] -= vectors[1:]
    image = scene.image.astype(np.float64)
    return Told(float(vectors[0] @ image), moves @ image, np.linalg.norm(moves, axis=1))
