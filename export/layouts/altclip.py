"""AltCLIP: OpenAI's image tower and an XLM-R that was taught CLIP's text vectors (Hugging Face directories).

Source: Chen et al. 2022 (arXiv 2211.06679). Text: <s> words </s>, at most 77 tokens, padding masked; the state of <s>
through a norm and two products, which become one.
"""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Rule, Settings, _bert, _hugging_face, _openai, hf_clip
from calmclip.export.towers.image import VisionTransformer

CONTEXT = 77  # of its teacher; the table of positions is XLM-R's own, of 512
_TEXT = {"num_attention_heads": 16, "num_hidden_layers": 24}  # of AltCLIPTextConfig
NEEDS = (*_openai.IMAGE_NEEDS, *_bert.NEEDS, "text.transformation.weight", "text.projection.weight", "logit_scale")


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    vision = hf_clip.tower_config(checkpoint, "vision_config", state, "image.blocks.", hf_clip.VISION_USUAL)
    config = hf_clip.tower_config(checkpoint, "text_config", state, "text.blocks.", _TEXT)
    text, tokens = _bert.tower(config, state, _bert.ROBERTA, CONTEXT)
    return Settings(
        image=partial(VisionTransformer, style=hf_clip.style(vision, pool="cls")),
        text=text,
        pixels=_hugging_face.image_preprocess(_hugging_face.processor(checkpoint), _openai.side(state)),
        tokens=tokens,
        tokenizer=_bert.tokenizer(checkpoint, state).to_str().encode(),
        license=_hugging_face.license_of(checkpoint.directory),
    )


NAMES = ("altclip", "altclip_resaved")
# the published weights say layers, what transformers 5 saves says layer
for _name, _layers in (("altclip", "layers"), ("altclip_resaved", "layer")):
    LAYOUTS.register(_name)(
        Layout(
            title="Hugging Face AltCLIP" + " as transformers 5 saves it" * (_layers == "layer"),
            keys=(
                "text_model.roberta.embeddings.word_embeddings.weight",
                "vision_model.embeddings.class_embedding",
                f"vision_model.encoder.{_layers}.{{i}}.layer_norm1.weight",
            ),
            model_type=("altclip",),
            rules=(
                *hf_clip.vision_rules(_layers),
                *_bert.rules("text_model.roberta."),
                Rule("text_model.pre_LN.{p}", "text.norm_post.{p}"),
                Rule("text_model.transformation.{p}", "text.transformation.{p}"),
                Rule("text_projection.weight", "text.projection.weight"),
                Rule("logit_scale", "logit_scale"),
            ),
            needs=NEEDS,
            settings=settings,
        )
    )
