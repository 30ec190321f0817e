"""Windows in detail, put together, and mixed over the whole picture by the affinity of its patches.

Source: Trident, Shi et al. 2025 (arXiv 2411.09219), section 3 and its code, whose constants are the defaults. There
the affinity over the whole picture is the attention of SAM. Here it is the cosine of the keys of `dense`, the tower's
own or those of a graph that the user brings. The paper's last step, masks refined by SAM, is left out.
Reads:  patches and keys of `dense`, exported with --dense guided or --dinoiser.
Out:    scale * cosine(mixed patch, label); the background is the best of its words + bias.
"""

from functools import partial

from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import GUIDE, FrozenModel, Manifest
from calmclip.models.flow import Flow, Work
from calmclip.models.segmenters import SEGMENTERS, Scene, ScoreMap, Segmenter, Windows
from calmclip.models.segmenters.affinity import over_mean, pooled
from calmclip.models.segmenters.maps import Maps, compared, dense_maps, inside, without_dense

WINDOWS = Windows(size=1.0, stride=2 / 3)  # of 336 pixels, 224 apart, over a short side of 336


class Params(FrozenModel):
    factor: float = Field(
        default=1.2,
        ge=0,
        le=10,
        description="patches are mixed whose cosine is over this times the mean of the row, at most over 0.9",
    )
    scale: float = Field(default=40.0, gt=0, le=1e4, description="times the cosine: the logit of a label")
    bias: float = Field(default=0.0, ge=-100, le=100, description="added to the logit of the background")


def why_not(manifest: Manifest) -> str | None:
    if lack := without_dense(manifest):
        return lack
    dense = manifest.graphs["dense"]
    if "keys" not in dense.outputs and GUIDE not in dense.inputs:
        return "its graph 'dense' has no output 'keys'; export the checkpoint with --dense guided"
    return None


def flow(bundle: Bundle, scene: Scene, params: Params) -> Flow[ScoreMap]:
    maps = yield from dense_maps(bundle, scene.image, scene.windows or WINDOWS)
    scores: ScoreMap = yield Work("postprocess", partial(scored, inside(maps), scene, params))
    return scores


def scored(maps: Maps, scene: Scene, params: Params) -> ScoreMap:
    assert maps.keys is not None  # `why_not`
    patches = pooled(maps.patches, maps.keys, over_mean(params.factor))
    return compared(patches, scene.text, scene.background, params.scale, params.bias, maps.frame)


SEGMENTERS.register("trident")(
    Segmenter(Params, "windows, mixed over the whole picture by affinity", why_not, flow, rank=1)
)
