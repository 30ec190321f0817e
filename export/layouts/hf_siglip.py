"""Hugging Face SigLIP and SigLIP 2 directories of fixed resolution: config.json (model_type "siglip").

Source: Zhai et al. 2023 (arXiv 2303.15343); SigLIP 2: Tschannen et al. 2025 (arXiv 2502.14786); in the names of
transformers' `SiglipModel`. A learned query pools the patches; the text's vector is that of its 64th token, and tokens
attend to padding. The head is a sigmoid with a bias.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from calmclip.export.checkpoints import Checkpoint, hugging_face
from calmclip.export.layouts import DROP, LAYOUTS, Layout, Rule, Settings
from calmclip.export.layouts.common import openai_clip, siglip_tokenizer
from calmclip.export.layouts.hf_clip import TEXT_MODEL, blocks, style, tower_config
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.errors import UnknownCheckpoint


def of_fixed_resolution(patch: Tensor) -> Tensor:
    """The kernel of the patches [W, 3, P, P]. Raises `UnknownCheckpoint` for NaFlex's matrix."""
    if patch.ndim != 4:
        raise UnknownCheckpoint(
            "the checkpoint is a SigLIP 2 of the NaFlex kind (model_type siglip2), which takes pictures of any shape "
            "as packed patches; only a fixed resolution (model_type siglip) is supported"
        )
    return patch


VISION = (
    Rule("vision_model.embeddings.patch_embedding.weight", "image.patch.weight", of_fixed_resolution),
    Rule("vision_model.embeddings.patch_embedding.bias", "image.patch.bias"),
    Rule("vision_model.embeddings.position_embedding.weight", "image.positions"),
    Rule("vision_model.embeddings.position_ids", DROP),
    *blocks("vision_model.encoder.layers", "image"),
    Rule("vision_model.post_layernorm.{p}", "image.norm_post.{p}"),
    Rule("vision_model.head.probe", "image.pool.probe", torch.Tensor.flatten),
    Rule("vision_model.head.attention.in_proj_{p}", "image.pool.qkv.{p}"),
    Rule("vision_model.head.attention.out_proj.{p}", "image.pool.out.{p}"),
    Rule("vision_model.head.layernorm.{p}", "image.pool.norm.{p}"),
    Rule("vision_model.head.mlp.fc1.{p}", "image.pool.mlp.up.{p}"),
    Rule("vision_model.head.mlp.fc2.{p}", "image.pool.mlp.down.{p}"),
)
TEXT = (*TEXT_MODEL, Rule("text_model.head.{p}", "text.projection.{p}"))
REQUIRED = (
    "image.patch.weight",
    "image.positions",
    "image.norm_post.weight",
    "image.pool.probe",
    "image.pool.qkv.weight",
    *openai_clip.TEXT_REQUIRED,
    "logit_bias",
)
# defaults of SiglipTextConfig and SiglipVisionConfig, which a config saved as a difference leaves out
_USUAL = {
    "num_attention_heads": 12, "layer_norm_eps": 1e-6, "num_hidden_layers": 12, "hidden_act": "gelu_pytorch_tanh"
}  # fmt: skip
_STEPS = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_center_crop": None,
}


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """Raises `UnknownCheckpoint` with the setting that is not supported."""
    vision = tower_config(checkpoint, "vision_config", state, "image.blocks.", _USUAL)
    text = tower_config(checkpoint, "text_config", state, "text.blocks.", _USUAL)
    widths = state["text.projection.weight"].shape[0], state["image.norm_post.weight"].shape[0]
    if widths[0] != widths[1]:
        raise UnknownCheckpoint(
            f"{checkpoint.path}: text_model.head.weight makes vectors of {widths[0]} numbers, "
            f"the image tower of {widths[1]}"
        )
    tokenizer, pad = siglip_tokenizer.read_tokenizer(checkpoint)
    return Settings(
        image=partial(VisionTransformer, style=style(vision, pool="map")),
        text=partial(TextTransformer, style=style(text, pool="last")),
        pixels=image_preprocess(hugging_face.processor(checkpoint), openai_clip.side(state)),
        tokens=TextPreprocess(context=state["text.positions"].shape[0], pad="context", pad_id=pad),
        tokenizer=tokenizer,
        license=hugging_face.license_of(checkpoint.directory),
    )


def image_preprocess(config: dict[str, Any], side: int) -> ImagePreprocess:
    """The config of `SiglipImageProcessor` -> ours: both sides resized to ``side``, without regard to their ratio.

    Raises `UnknownCheckpoint` with the setting that is not SigLIP's, or a size that is not the model's.
    """
    config = {name: value for name, value in config.items() if value is not None}
    for name, usual in _STEPS.items():
        value = config.get(name, usual)
        if value != usual and not (usual is None and value is False):
            raise UnknownCheckpoint(f"the image processor has {name} = {value}; only SigLIP's own {usual} is supported")
    size = config.get("size", {"height": 224, "width": 224})
    if size != {"height": side, "width": side}:
        raise UnknownCheckpoint(
            f"the image processor's size is {size}; the weights have positions for {side} x {side} pixels"
        )
    if (resample := config.get("resample", 3)) not in hugging_face.RESAMPLE:
        raise UnknownCheckpoint(f"the image processor has resample = {resample}; expected 2 (bilinear) or 3 (bicubic)")
    return ImagePreprocess(
        size=(side, side),
        resize="exact",
        resample=hugging_face.RESAMPLE[resample],  # type: ignore[arg-type]
        mean=config.get("image_mean", (0.5,) * 3),
        std=config.get("image_std", (0.5,) * 3),
    )


LAYOUTS.register("hf_siglip")(
    Layout(
        title="Hugging Face SigLIP and SigLIP 2",
        keys=("vision_model.head.probe", "text_model.embeddings.token_embedding.weight"),
        file="config.json",
        model_type=("siglip", "siglip2"),
        rules=(*VISION, *TEXT, *openai_clip.SCALARS),
        required=REQUIRED,
        settings=settings,
    )
)
