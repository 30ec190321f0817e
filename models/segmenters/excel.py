"""Labels enriched by the attributes of their descriptions, and what is common to all labels taken out of each patch.

Source: ExCEL, Yang et al. 2025 (arXiv 2503.20826), section 3 and its code; feature surgery: CLIP Surgery, Li et al.
2023 (arXiv 2304.05653), section 3.3. The learned calibration of ExCEL and its trained decoder are left out.
Reads:  patches of `dense`, best exported with --dense self; the vector of `image`.
Out:    scale * relevance, by default stretched to 0 to 1 over the patches of each label; the background is the best of
        its words + bias.
"""

from functools import partial

import numpy as np
from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import FrozenModel, ImagePreprocess, Manifest
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Flow, Work
from calmclip.models.heads.cosine import softmax
from calmclip.models.segmenters import SEGMENTERS, Scene, ScoreMap, Segmenter
from calmclip.models.segmenters.attributes import bank, enriched
from calmclip.models.segmenters.maps import Maps, dense_maps, inside, without_dense
from calmclip.models.tasks.features import picture, unit

SHARPNESS = 2.0  # of the picture's softmax over labels
SCALES = {True: 10.0, False: 100.0}  # with and without stretch


class Params(FrozenModel):
    attributes: tuple[str, ...] = Field(
        default=(),
        max_length=5000,
        description="sentences that describe the labels; empty: the descriptions of the classifier",
    )
    centres: int = Field(default=112, ge=1, le=1000, description="attributes of the bank, at most one for a sentence")
    stretch: bool = Field(
        default=True, description="each label from 0 to 1 over the patches, as in the paper; false: some may be absent"
    )
    scale: float | None = Field(
        default=None, gt=0, le=1e4, description="times the relevance: the logit of a label; 10, without stretch 100"
    )
    bias: float = Field(default=0.0, ge=-100, le=100, description="added to the logit of the background")


def why_not(manifest: Manifest) -> str | None:
    if lack := without_dense(manifest):
        return lack
    image = manifest.graphs.get("image")
    if image is None or not isinstance(image.preprocess, ImagePreprocess):
        return "it has no graph 'image' for pictures"
    return None


def flow(bundle: Bundle, scene: Scene, params: Params) -> Flow[ScoreMap]:
    """Raises `BadRequest` for one label without background words, which would have nothing to be compared with."""
    if len(scene.text) + len(scene.background) < 2:
        raise BadRequest(
            "method 'excel' takes out of a patch what all labels have in common, and there is one label; expected two "
            "labels, or one and background words"
        )
    sentences = params.attributes or scene.descriptions
    text = scene.text
    if sentences:
        text = enriched(text, (yield from bank(bundle, sentences, params.centres)))
    (vector,) = yield from picture(bundle, scene.image)
    maps = yield from dense_maps(bundle, scene.image, scene.windows)
    scores: ScoreMap = yield Work("postprocess", partial(scored, inside(maps), vector, text, scene.background, params))
    return scores


def scored(maps: Maps, vector: Array, text: Array, background: Array, params: Params) -> ScoreMap:
    rows, columns, width = maps.patches.shape
    relevance = surgery(unit(maps.patches.reshape(-1, width)), np.concatenate((text, background)), vector)
    relevance = stretched(relevance) if params.stretch else relevance
    scale = params.scale or SCALES[params.stretch]
    planes = np.float32(scale) * relevance.T.reshape(-1, rows, columns)
    labels, words = planes[: len(text)], planes[len(text) :]
    others = np.full((rows, columns), -np.inf, np.float32)
    if len(words):
        others = words.max(axis=0) + np.float32(params.bias)
    return ScoreMap(labels, others, maps.frame)


def surgery(patches: Array, text: Array, vector: Array) -> Array:
    """Unit rows x [N, D] of patches and t [C, D] of texts, the picture's vector [D] -> float32 [N, C]: the sum over d
    of x_d t_cd w_c, minus its mean over the texts. w: how much the picture is like each text, by a softmax, 1 on
    average."""
    weights = softmax(SHARPNESS * (text @ vector))
    products = (patches @ text.T) * (weights / weights.mean())
    relevance: Array = products - products.mean(axis=1, keepdims=True)
    return relevance


def stretched(relevance: Array) -> Array:
    """[N, C] -> each column from 0 to 1; a column without differences is 0."""
    least = relevance.min(axis=0)
    extent = relevance.max(axis=0) - least
    columns: Array = (relevance - least) / np.where(extent > 0, extent, 1)
    return columns


SEGMENTERS.register("excel")(
    Segmenter(Params, "labels enriched by attributes; what labels have in common is taken out", why_not, flow)
)
