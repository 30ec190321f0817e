"""CLOOB: OpenAI's towers, trained with a Hopfield loss; the temperature is called ``logit_inv_tau``.

Source: Fürst et al. 2022, CLOOB (arXiv 2110.11316). The Hopfield retrieval is of the loss alone: zero-shot is the plain
cosine. The text tower lies under ``transformer.`` in its general class, beside the image tower in the other. QuickGELU.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Rule, Settings, _openai, _resnet, long_clip
from calmclip.export.layouts._clip_bpe import tokenizer_json


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    return long_clip.settings(checkpoint, state)


def resnet_settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    return Settings(
        image=_resnet.image_tower(state),
        text=_openai.text_tower(state, checkpoint.given.activation or "quick_gelu"),
        pixels=_openai.pixels(_resnet.side(state)),
        tokens=_openai.tokens(state),
        tokenizer=tokenizer_json(),
    )


NAMES = ("cloob", "cloob_flat", "cloob_vit", "cloob_vit_flat")
_IMAGES = {  # what decides, its rules, what is always there, its settings
    "cloob": ("visual.attnpool.positional_embedding", _resnet.IMAGE, _resnet.NEEDS, resnet_settings),
    "cloob_vit": ("visual.class_embedding", _openai.IMAGE, _openai.NEEDS, settings),
}
for _name, (_key, _image, _needs, _settings) in _IMAGES.items():
    for _suffix, _prefix in (("", "transformer."), ("_flat", "")):
        LAYOUTS.register(_name + _suffix)(
            Layout(
                title=f"CLOOB, {'ViT' if 'vit' in _name else 'ResNet'}{', text tower beside it' if _suffix else ''}",
                keys=(_key, f"{_prefix}token_embedding.weight", "logit_inv_tau"),
                rules=(
                    *_image,
                    *_openai.text(_prefix),
                    *_openai.MARKS,
                    Rule("logit_inv_tau", "logit_scale", torch.Tensor.squeeze),
                ),
                needs=_needs,
                asks=("activation",),
                settings=_settings,
            )
        )
