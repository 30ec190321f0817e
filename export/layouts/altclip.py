"""AltCLIP: OpenAI's image tower, and an XLM-R that was distilled from CLIP's text tower (Hugging Face directories).

Source: Chen et al. 2022 (arXiv 2211.06679). Text: <s> words </s>, at most 77 tokens, padding masked. The state of <s>
goes through a norm and two products, which export merges.
"""

from collections.abc import Mapping

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Rule, Settings, hf_clip
from calmclip.export.layouts.common import bert_text, openai_clip

CONTEXT = 77  # of the teacher; XLM-R's own table of positions has 512
_TEXT = {"num_attention_heads": 16, "num_hidden_layers": 24}  # defaults of AltCLIPTextConfig
REQUIRED = (
    *openai_clip.IMAGE_REQUIRED,
    *bert_text.REQUIRED,
    "text.transformation.weight",
    "text.projection.weight",
    "logit_scale",
)


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    image = hf_clip.image_settings(checkpoint, state)
    config = hf_clip.tower_config(checkpoint, "text_config", state, "text.blocks.", _TEXT)
    return Settings(
        **image,
        **bert_text.text_settings(checkpoint, config, state, bert_text.ROBERTA, CONTEXT),
    )


NAMES = ("altclip", "altclip_resaved")
# the published weights say layers, transformers 5 saves layer
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
                *bert_text.rules("text_model.roberta."),
                Rule("text_model.pre_LN.{p}", "text.norm_post.{p}"),
                Rule("text_model.transformation.{p}", "text.transformation.{p}"),
                Rule("text_projection.weight", "text.projection.weight"),
                Rule("logit_scale", "logit_scale"),
            ),
            required=REQUIRED,
            settings=settings,
        )
    )
