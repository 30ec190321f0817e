"""Chinese-CLIP: OpenAI's image tower and a Chinese BERT, as its authors publish it and as Hugging Face does.

Source: Yang et al. 2022 (arXiv 2211.01335). Text: [CLS] words [SEP], at most 52 tokens, padding masked, the state of
[CLS] projected. Pictures are resized to a square, their proportions not kept.

The authors' .pt brings neither config nor vocabulary: put the vocab.txt of its BERT (21128 lines) beside it.
"""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Rule, Settings, _bert, _hugging_face, _openai, hf_clip
from calmclip.export.towers import Style
from calmclip.export.towers.image import VisionTransformer
from calmclip.models.bundle.manifest import ImagePreprocess

CONTEXT = 52  # of training; the table of positions is BERT's own, of 512
LONGEST_WORD = 200  # characters, in the authors' WordPiece; a longer word is [UNK]
TEMPLATES = ("一张{}的照片。",)


def pixels(side: int) -> ImagePreprocess:
    return ImagePreprocess(
        size=(side, side), resize="exact", resample="bicubic", mean=_openai.MEAN, std=_openai.STD
    )  # fmt: skip


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    heads = state["image.patch.weight"].shape[0] // _openai.HEAD_WIDTH
    text, tokens = _bert.tower({}, state, _bert.BERT, CONTEXT)
    tokenizer = _bert.tokenizer(checkpoint, state)
    tokenizer.model.max_input_chars_per_word = LONGEST_WORD
    return Settings(
        image=partial(VisionTransformer, style=Style(heads=heads, activation="quick_gelu", pool="cls")),
        text=text,
        pixels=pixels(_openai.side(state)),
        tokens=tokens,
        tokenizer=tokenizer.to_str().encode(),
        templates=TEMPLATES,
    )


def hf_settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    vision = hf_clip.tower_config(checkpoint, "vision_config", state, "image.blocks.", hf_clip.VISION_USUAL)
    usual = {"num_attention_heads": 12, "num_hidden_layers": 12}
    config = hf_clip.tower_config(checkpoint, "text_config", state, "text.blocks.", usual)
    text, tokens = _bert.tower(config, state, _bert.BERT, CONTEXT)
    return Settings(
        image=partial(VisionTransformer, style=hf_clip.style(vision, pool="cls")),
        text=text,
        pixels=_hugging_face.image_preprocess(_hugging_face.processor(checkpoint), _openai.side(state)),
        tokens=tokens,
        tokenizer=_bert.tokenizer(checkpoint, state).to_str().encode(),
        license=_hugging_face.license_of(checkpoint.directory),
        templates=TEMPLATES,
    )


LAYOUTS.register("chinese_clip")(
    Layout(
        title="Chinese-CLIP, its authors' names, ViT",
        keys=("visual.conv1.weight", "visual.class_embedding", "bert.embeddings.word_embeddings.weight"),
        rules=(
            *_openai.IMAGE,
            *_bert.rules("bert."),
            Rule("text_projection", "text.projection.weight", _openai.transposed),
            *_openai.SCALARS,
        ),
        needs=(*_openai.IMAGE_NEEDS, *_bert.NEEDS, "text.projection.weight", "logit_scale"),
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
            *_bert.rules("text_model."),
            Rule("text_projection.weight", "text.projection.weight"),
            Rule("logit_scale", "logit_scale"),
        ),
        needs=(*_openai.IMAGE_NEEDS, *_bert.NEEDS, "text.projection.weight", "logit_scale"),
        settings=hf_settings,
    )
)
