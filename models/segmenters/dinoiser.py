"""Patches pooled over the patches of the same thing, then each by the label whose text it is nearest to.

Source: CLIP-DINOiser, Wysoczanska et al. 2024 (arXiv 2312.12359), section 3 and its code, whose constants are the
defaults. There the background is the first of the classes; here it is a plane of its own.
Reads:  patches, keys and objectness of `dense`, exported with --dinoiser.
Out:    scale * cosine(pooled patch, label). A patch that no label is sure of (delta) and that shows no thing (an
        objectness of at most 0.5) belongs to the background, whatever its words say.
"""

from functools import partial

import numpy as np
from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import FrozenModel, Manifest
from calmclip.models.flow import Array, Flow, Work
from calmclip.models.heads.cosine import softmax
from calmclip.models.segmenters import SEGMENTERS, Scene, ScoreMap, Segmenter
from calmclip.models.segmenters.affinity import over, pooled
from calmclip.models.segmenters.maps import Maps, compared, dense_maps, inside, without_dense

CERTAIN = 10.0  # logits between the background and the best label where the rule decides: a probability over .9999
THING = 0.5  # a patch of a higher objectness shows a thing


class Params(FrozenModel):
    gamma: float = Field(default=0.2, ge=0, le=1, description="least cosine of the keys of two patches that are pooled")
    delta: float = Field(
        default=0.99,
        ge=0,
        le=1,
        description="a patch without a thing is background if its best label is less likely; 0: no such rule",
    )
    scale: float = Field(default=100.0, gt=0, le=1e4, description="times the cosine: the logit of a label")
    bias: float = Field(default=0.0, ge=-100, le=100, description="added to the logit of the background")


def why_not(manifest: Manifest) -> str | None:
    if lack := without_dense(manifest):
        return lack
    if not {"keys", "objectness"} <= manifest.graphs["dense"].outputs.keys():
        return "its graph 'dense' has no outputs 'keys' and 'objectness'; export the checkpoint with --dinoiser FILE"
    return None


def flow(bundle: Bundle, scene: Scene, params: Params) -> Flow[ScoreMap]:
    maps = yield from dense_maps(bundle, scene.image, scene.windows)
    scores: ScoreMap = yield Work("postprocess", partial(scored, inside(maps), scene, params))
    return scores


def scored(maps: Maps, scene: Scene, params: Params) -> ScoreMap:
    assert maps.keys is not None  # `why_not`
    assert maps.objectness is not None
    patches = pooled(maps.patches, maps.keys, over(params.gamma))
    scores = compared(patches, scene.text, scene.background, params.scale, params.bias, maps.frame)
    if not params.delta:
        return scores
    background = ruled(scores.labels, scores.background, maps.objectness, params.delta)
    return ScoreMap(scores.labels, background, scores.frame)


def ruled(labels: Array, background: Array, objectness: Array, delta: float) -> Array:
    """-> logits of the background [h, w]: `CERTAIN` above the best label where the rule decides; elsewhere
    ``background``, or `CERTAIN` below the best label where that is -inf."""
    best = labels.max(axis=0)
    likely = softmax(np.concatenate((labels, background[None])).transpose(1, 2, 0)).max(axis=2)
    nothing = (likely < delta) & (objectness <= THING)
    others = np.where(np.isneginf(background), best - CERTAIN, background)
    return np.where(nothing, np.maximum(others, best + CERTAIN), others).astype(np.float32)


SEGMENTERS.register("dinoiser")(
    Segmenter(Params, "patches pooled over the patches of the same thing", why_not, flow, rank=2)
)
