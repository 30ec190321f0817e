"""CLOOB: OpenAI's towers, trained with a Hopfield loss; the temperature is called ``logit_inv_tau``.

Source: Fürst et al. 2022, CLOOB (arXiv 2110.11316). Only the loss uses the Hopfield retrieval; zero-shot uses the plain
cosine. Of its two classes one keeps the text tower under ``transformer.``, the other beside the image tower. QuickGELU.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Rule, Settings
from calmclip.export.layouts.common import openai_clip, resnet


def resnet_settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    return resnet.settings(state, checkpoint.facts.activation or "quick_gelu")


NAMES = ("cloob", "cloob_flat", "cloob_vit", "cloob_vit_flat")
_IMAGES = {  # key, rules, required names, settings
    "cloob": ("visual.attnpool.positional_embedding", resnet.IMAGE, resnet.REQUIRED, resnet_settings),
    "cloob_vit": (
        "visual.class_embedding", openai_clip.IMAGE, openai_clip.REQUIRED, openai_clip.quick_gelu_settings,
    ),
}  # fmt: skip
for _name, (_key, _image, _required, _settings) in _IMAGES.items():
    for _suffix, _prefix in (("", "transformer."), ("_flat", "")):
        LAYOUTS.register(_name + _suffix)(
            Layout(
                title=f"CLOOB, {'ViT' if 'vit' in _name else 'ResNet'}{', text tower beside it' if _suffix else ''}",
                keys=(_key, f"{_prefix}token_embedding.weight", "logit_inv_tau"),
                rules=(
                    *_image,
                    *openai_clip.text(_prefix),
                    *openai_clip.DROP_MARKS,
                    Rule("logit_inv_tau", "logit_scale", torch.Tensor.squeeze),
                ),
                required=_required,
                facts=("activation",),
                settings=_settings,
            )
        )
