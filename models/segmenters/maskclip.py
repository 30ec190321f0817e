"""Each patch by the label whose text it is nearest to.

Source: MaskCLIP, Zhou et al. 2022 (arXiv 2112.01071), section 3.2, without its prompt denoising; the scale as in the
code of CLIP-DINOiser, Wysoczanska et al. 2024 (arXiv 2312.12359).
Reads:  patches of `dense`.
Out:    scale * cosine(patch, label); the background is the best of its words + bias.
"""

from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Flow
from calmclip.models.segmenters import SEGMENTERS, Scene, ScoreMap, Segmenter
from calmclip.models.segmenters.maps import compared, dense_maps, without_dense


class Params(FrozenModel):
    scale: float = Field(default=100.0, gt=0, le=1e4, description="times the cosine: the logit of a label")
    bias: float = Field(default=0.0, ge=-100, le=100, description="added to the logit of the background")


def flow(bundle: Bundle, scene: Scene, params: Params) -> Flow[ScoreMap]:
    maps = yield from dense_maps(bundle, scene.image, scene.windows)
    return compared(maps.patches, scene.text, scene.background, params.scale, params.bias, maps.frame)


SEGMENTERS.register("maskclip")(Segmenter(Params, "each patch by its nearest text", without_dense, flow, rank=0))
