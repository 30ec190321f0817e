"""OpenAI's CLIP with a ResNet (RN50 to RN50x64): the published .pt, a state dict, or an open_clip directory of it.

Source: Radford et al. 2021 (arXiv 2103.00020), section 2.4 and table 19. The blocks of each stage, width, side and
heads are read from shapes; the text tower's activation as in `calmclip.export.layouts.openai`.
"""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Settings, open_clip
from calmclip.export.layouts.common import openai_clip, resnet
from calmclip.export.layouts.openai import activation
from calmclip.export.towers.text import TextTransformer


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    return resnet.settings(state, activation(checkpoint))


def open_clip_settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """As the directory's config says."""
    config = open_clip.model_config(checkpoint)
    return Settings(
        image=resnet.image_tower(state),
        text=partial(TextTransformer, style=open_clip.text_style(config)),
        pixels=open_clip.image_preprocess(checkpoint, resnet.side(state)),
        **open_clip.text_parts(checkpoint, config),
    )


_KEYS = (
    "visual.attnpool.positional_embedding",
    "visual.layer1.0.conv1.weight",
    "token_embedding.weight",
    "logit_scale",
)
_RULES = (*resnet.IMAGE, *openai_clip.text(), *openai_clip.SCALARS)

LAYOUTS.register("openai_resnet")(
    Layout(
        title="OpenAI CLIP, ResNet",
        keys=_KEYS,
        no_file=open_clip.CONFIG,
        rules=_RULES,
        required=resnet.REQUIRED,
        facts=("activation",),
        settings=settings,
    )
)
LAYOUTS.register("open_clip_resnet")(
    Layout(
        title="open_clip, its own ResNet and text",
        keys=_KEYS,
        file=open_clip.CONFIG,
        rules=_RULES,
        required=resnet.REQUIRED,
        settings=open_clip_settings,
    )
)
