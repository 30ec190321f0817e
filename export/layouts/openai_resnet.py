"""OpenAI's CLIP with a ResNet (RN50 to RN50x64): the published .pt, a state dict, or an open_clip directory of it.

Source: Radford et al. 2021 (arXiv 2103.00020), section 2.4 and table 19. Blocks of each stage, width, side and heads
are read from shapes. The text tower's activation is found as in `calmclip.export.layouts.openai`.
"""

from collections.abc import Mapping

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Settings, _openai, _resnet, open_clip
from calmclip.export.layouts._clip_bpe import tokenizer_json
from calmclip.export.layouts.openai import activation
from calmclip.export.towers.text import TextTransformer


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    return Settings(
        image=_resnet.image_tower(state),
        text=_openai.text_tower(state, activation(checkpoint)),
        pixels=_openai.pixels(_resnet.side(state)),
        tokens=_openai.tokens(state),
        tokenizer=tokenizer_json(),
    )


def open_clip_settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """As the directory's config says."""
    config = open_clip.model_config(checkpoint)
    return Settings(
        image=_resnet.image_tower(state),
        text=lambda tensors: TextTransformer(tensors, open_clip.text_style(config)),
        pixels=open_clip.image_preprocess(
            checkpoint.configs[open_clip.CONFIG].get("preprocess_cfg") or {}, _resnet.side(state)
        ),
        **open_clip.text_parts(checkpoint, config),
    )


_KEYS = (
    "visual.attnpool.positional_embedding",
    "visual.layer1.0.conv1.weight",
    "token_embedding.weight",
    "logit_scale",
)
_RULES = (*_resnet.IMAGE, *_openai.text(), *_openai.SCALARS)

LAYOUTS.register("openai_resnet")(
    Layout(
        title="OpenAI CLIP, ResNet",
        keys=_KEYS,
        no_file=open_clip.CONFIG,
        rules=_RULES,
        needs=_resnet.NEEDS,
        asks=("activation",),
        settings=settings,
    )
)
LAYOUTS.register("open_clip_resnet")(
    Layout(
        title="open_clip, its own ResNet and text",
        keys=_KEYS,
        file=open_clip.CONFIG,
        rules=_RULES,
        needs=_resnet.NEEDS,
        settings=open_clip_settings,
    )
)
