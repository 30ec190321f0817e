"""Chinese-CLIP: OpenAI's image tower and a Chinese BERT, in the names of its authors and of Hugging Face.

Source: Yang et al. 2022 (arXiv 2211.01335). Text: [CLS] words [SEP], at most 52 tokens, padding masked, the state of
[CLS] projected. Pictures are resized to a square without regard to their aspect ratio.

The authors' .pt contains neither config nor vocabulary: put the vocab.txt of its BERT (21128 lines) beside it.
"""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Rule, Settings, hf_clip
from calmclip.export.layouts.common import bert_text, openai_clip
from calmclip.export.towers import Style
from calmclip.export.towers.image import VisionTransformer
from calmclip.models.bundle.manifest import ImagePreprocess

CONTEXT = 52  # of training; BERT's own table of positions has 512
LONGEST_WORD = 200  # characters, in the authors' WordPiece; a longer word is [UNK]
TEMPLATES = ("一张{}的照片。",)
REQUIRED = (*openai_clip.IMAGE_REQUIRED, *bert_text.REQUIRED, "text.projection.weight", "logit_scale")


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    heads, side = state["image.patch.weight"].shape[0] // openai_clip.HEAD_WIDTH, openai_clip.side(state)
    text, tokens = bert_text.tower({}, state, bert_text.BERT, CONTEXT)
    tokenizer = bert_text.read_tokenizer(checkpoint)
    tokenizer.model.max_input_chars_per_word = LONGEST_WORD
    return Settings(
        image=partial(VisionTransformer, style=Style(heads=heads, activation="quick_gelu", pool="cls")),
        text=text,
        pixels=ImagePreprocess(
            size=(side, side), resize="exact", resample="bicubic", mean=openai_clip.MEAN, std=openai_clip.STD
        ),
        tokens=tokens,
        tokenizer=tokenizer.to_str().encode(),
        templates=TEMPLATES,
    )


def hf_settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    usual = {"num_attention_heads": 12, "num_hidden_layers": 12}
    image = hf_clip.image_settings(checkpoint, state)
    config = hf_clip.tower_config(checkpoint, "text_config", state, "text.blocks.", usual)
    return Settings(
        **image,
        **bert_text.text_settings(checkpoint, config, state, bert_text.BERT, CONTEXT),
        templates=TEMPLATES,
    )


LAYOUTS.register("chinese_clip")(
    Layout(
        title="Chinese-CLIP, its authors' names, ViT",
        keys=("visual.conv1.weight", "visual.class_embedding", "bert.embeddings.word_embeddings.weight"),
        rules=(
            *openai_clip.IMAGE,
            *bert_text.rules("bert."),
            Rule("text_projection", "text.projection.weight", openai_clip.transposed),
            *openai_clip.SCALARS,
        ),
        required=REQUIRED,
        settings=settings,
    )
)
LAYOUTS.register("hf_chinese_clip")(
    Layout(
        title="Hugging Face Chinese-CLIP",
        keys=("vision_model.embeddings.class_embedding", "text_model.embeddings.word_embeddings.weight"),
        model_type=("chinese_clip",),
        rules=(
            *hf_clip.VISION,
            *bert_text.rules("text_model."),
            Rule("text_projection.weight", "text.projection.weight"),
            Rule("logit_scale", "logit_scale"),
        ),
        required=REQUIRED,
        settings=hf_settings,
    )
)
