"""MobileCLIP as its authors published it: `image_encoder.model.*` and `text_encoder.*` in one file, no config.

Source: Vasu et al. 2024 (arXiv 2311.17049): S0, S1, S2 (FastViT, Vasu et al. 2023, arXiv 2303.14189; texts are not
causal; S0's text tower begins and ends with a convolution) and B (ViT after a stem of convolutions; causal). Pictures:
256 pixels (B: 224), bilinear, not normalized. The scale of the logits is at most 100.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.checkpoints.files import require_package
from calmclip.export.layouts import LAYOUTS, Layout, Rule, Settings, rename
from calmclip.export.layouts.common import openai_clip, timm_models
from calmclip.export.layouts.common.clip_bpe import CLEAN, tokenizer_json
from calmclip.export.towers import Style, count
from calmclip.export.towers.mixer import MixedText
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess

_MAX_SCALE = 100.0
_IMAGE, _TRUNK = "image_encoder.model", "image.trunk"


def _mobile_one(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A layer of parallel branches (MobileOne's) before they are folded."""
    names = {
        "rbr_conv.{rest}": "conv_kxk.{rest}",
        "rbr_scale.{rest}": "conv_scale.{rest}",
        "rbr_skip.{rest}": "identity.{rest}",
        "se.reduce.{p}": "se.fc1.{p}",
        "se.expand.{p}": "se.fc2.{p}",
    }
    return rename(f"{_IMAGE}.{theirs}", f"{_TRUNK}.{ours}", names)


def _mixers(theirs: int, ours: int) -> tuple[Rule, ...]:
    """A stage of blocks that mix tokens by convolutions."""
    block, our_block = f"network.{theirs}.{{i}}", f"stages.{ours}.blocks.{{i}}"
    names = {
        "token_mixer.layer_scale": "token_mixer.layer_scale.gamma",
        "layer_scale": "layer_scale.gamma",
        "convffn.{rest}": "mlp.{rest}",
    }
    return (
        *_mobile_one(f"{block}.token_mixer.norm", f"{our_block}.token_mixer.norm"),
        *_mobile_one(f"{block}.token_mixer.mixer", f"{our_block}.token_mixer.mixer"),
        *rename(f"{_IMAGE}.{block}", f"{_TRUNK}.{our_block}", names),
    )


def _downsample(theirs: int, ours: int) -> tuple[Rule, ...]:
    """The layer between two stages that halves the sides."""
    layer, our_layer = f"network.{theirs}.proj", f"stages.{ours}.downsample.proj"
    names = {
        "0.lkb_origin.{rest}": "0.large_conv.{rest}",
        "0.small_conv.{rest}": "0.small_conv.{rest}",
        "0.se.reduce.{p}": "0.se.fc1.{p}",
        "0.se.expand.{p}": "0.se.fc2.{p}",
    }
    return (
        *rename(f"{_IMAGE}.{layer}", f"{_TRUNK}.{our_layer}", names),
        *_mobile_one(f"{layer}.1", f"{our_layer}.1"),
    )


FASTVIT = (
    *_mobile_one("patch_embed.{i}", "stem.{i}"),
    *_mixers(0, 0),
    *_downsample(1, 1),
    *_mixers(2, 1),
    *_downsample(3, 2),
    *_mixers(4, 2),
    *_downsample(5, 3),
    *rename(
        _IMAGE,
        _TRUNK,
        {
            "network.6.pe.{p}": "stages.3.pos_emb.pos_enc.{p}",
            "network.7.{i}.norm.{rest}": "stages.3.blocks.{i}.norm.{rest}",
            "network.7.{i}.token_mixer.{rest}": "stages.3.blocks.{i}.token_mixer.{rest}",
            "network.7.{i}.convffn.{rest}": "stages.3.blocks.{i}.mlp.{rest}",
            "network.7.{i}.layer_scale_1": "stages.3.blocks.{i}.layer_scale_1.gamma",
            "network.7.{i}.layer_scale_2": "stages.3.blocks.{i}.layer_scale_2.gamma",
        },
    ),
    *_mobile_one("conv_exp", "final_conv"),
    Rule(f"{_IMAGE}.head.proj", "image.projection.weight", openai_clip.transposed),
)
VIT = (
    *rename(
        _IMAGE,
        _TRUNK,
        {
            "patch_emb.{i}.block.conv.{p}": "patch_embed.backbone.{i}.conv.{p}",
            "patch_emb.{i}.block.norm.{rest}": "patch_embed.backbone.{i}.bn.{rest}",
            "cls_token": "cls_token",
            "transformer.{i}.pre_norm_mha.0.{p}": "blocks.{i}.norm1.{p}",
            "transformer.{i}.pre_norm_mha.1.qkv_proj.{p}": "blocks.{i}.attn.qkv.{p}",
            "transformer.{i}.pre_norm_mha.1.out_proj.{p}": "blocks.{i}.attn.proj.{p}",
            "transformer.{i}.pre_norm_ffn.0.{p}": "blocks.{i}.norm2.{p}",
            "transformer.{i}.pre_norm_ffn.1.{p}": "blocks.{i}.mlp.fc1.{p}",
            "transformer.{i}.pre_norm_ffn.4.{p}": "blocks.{i}.mlp.fc2.{p}",
            "post_transformer_norm.{p}": "norm.{p}",
        },
    ),
    Rule(f"{_IMAGE}.pos_embed.pos_embed.pos_embed", f"{_TRUNK}.pos_embed", lambda tensor: tensor.squeeze(0)),
    Rule(f"{_IMAGE}.classifier.proj", "image.projection.weight", openai_clip.transposed),
)


def _text() -> tuple[Rule, ...]:
    block, our_block = "text_encoder.transformer.{i}", "text.blocks.{i}"
    names = {
        "pre_norm_mha.0.{p}": "norm1.{p}",
        "pre_norm_mha.1.qkv_proj.{p}": "attn.qkv.{p}",
        "pre_norm_mha.1.out_proj.{p}": "attn.out.{p}",
        "pre_norm_ffn.0.{p}": "norm2.{p}",
        "pre_norm_ffn.1.{p}": "mlp.up.{p}",
        "pre_norm_ffn.4.{p}": "mlp.down.{p}",
        "token_mixer.norm.rbr_skip.{rest}": "mix.minus.{rest}",
        "token_mixer.mixer.rbr_skip.{rest}": "mix.skip.{rest}",
        "token_mixer.mixer.rbr_conv.0.bn.{rest}": "mix.norm.{rest}",
        "convffn.conv.bn.{rest}": "norm.{rest}",
        "convffn.fc1.bias": "up.bias",
        "convffn.fc2.bias": "down.bias",
    }
    converted: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "token_mixer.mixer.rbr_conv.0.conv.weight": ("mix.conv.weight", _row),
        "token_mixer.layer_scale": ("mix.scale", torch.Tensor.flatten),
        "convffn.conv.conv.weight": ("conv.weight", _row),
        "convffn.fc1.weight": ("up.weight", _matrix),
        "convffn.fc2.weight": ("down.weight", _matrix),
        "layer_scale": ("scale", torch.Tensor.flatten),
    }
    return (
        Rule("text_encoder.embedding_layer.weight", "text.tokens.weight"),
        Rule("text_encoder.positional_embedding.pos_embed.pos_embed", "text.positions", lambda t: t.flatten(0, -2)),
        *rename(block, our_block, names),
        *(Rule(f"{block}.{name}", f"{our_block}.{ours}", convert) for name, (ours, convert) in converted.items()),
        Rule("text_encoder.final_layer_norm.{p}", "text.norm_post.{p}"),
        Rule("text_encoder.projection_layer", "text.projection.weight", openai_clip.transposed),
    )


def _row(kernel: Tensor) -> Tensor:
    """[W, 1, 1, K] -> [W, 1, K]"""
    return kernel.squeeze(2)


def _matrix(kernel: Tensor) -> Tensor:
    """[O, I, 1, 1] -> [O, I]"""
    return kernel.flatten(1)


def fastvit(tensors: Mapping[str, Tensor]) -> nn.Module:
    """FastViT with the depth and the widths of its tensors."""
    timm = require_package("timm", "MobileCLIP's image tower")
    first = [f"trunk.stages.{stage}.blocks.0.mlp.fc1.weight" for stage in range(4)]
    shapes = [tensors[name].shape for name in first]
    trunk = timm.create_model(
        "fastvit_mci0",
        layers=tuple(count(tensors, f"trunk.stages.{stage}.blocks.") for stage in range(4)),
        embed_dims=tuple(inputs for _, inputs, *_ in shapes),
        mlp_ratios=tuple(outputs / inputs for outputs, inputs, *_ in shapes),
        num_classes=0,
    )
    return timm_models.TimmTrunk(tensors, trunk)


def vit(tensors: Mapping[str, Tensor]) -> nn.Module:
    timm = require_package("timm", "MobileCLIP's image tower")
    depth, side = count(tensors, "trunk.blocks."), _side(tensors["trunk.pos_embed"])
    trunk = timm.create_model("vit_base_mci_224", depth=depth, img_size=side, num_classes=0, global_pool="token")
    return timm_models.TimmTrunk(tensors, trunk)


def _side(positions: Tensor) -> int:
    """[1, patches, W] -> pixels."""
    cells: int = round(positions.shape[1] ** 0.5)
    return 16 * cells


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """All settings follow from the kind of the image tower."""
    context, width = state["text.positions"].shape
    hybrid = "image.trunk.pos_embed" in state
    style = Style(heads=width // openai_clip.HEAD_WIDTH, activation="gelu", pool="eot", causal=hybrid)
    side = _side(state["image.trunk.pos_embed"]) if hybrid else 256  # convolutions take any size
    return Settings(
        image=vit if hybrid else fastvit,
        text=partial(MixedText, style=style),
        pixels=ImagePreprocess(
            size=(side, side), resize="shortest", shortest=side, crop_offset="round", resample="bilinear",
            mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
        ),
        tokens=TextPreprocess(
            context=context, pad="longest" if hybrid else "context", pad_id=0, clean=CLEAN
        ),
        tokenizer=tokenizer_json(),
    )  # fmt: skip


def clamped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "logit_scale": state["logit_scale"].clamp(max=math.log(_MAX_SCALE))}


NAMES = ("mobileclip", "mobileclip_b")
for _name, _key, _rules in (
    ("mobileclip", "patch_embed.{i}.rbr_conv.{e}.conv.weight", FASTVIT),
    ("mobileclip_b", "patch_emb.{i}.block.conv.weight", VIT),
):
    LAYOUTS.register(_name)(
        Layout(
            title="MobileCLIP, its authors' names" + (" (B)" if _name == "mobileclip_b" else ""),
            keys=("text_encoder.embedding_layer.weight", f"{_IMAGE}.{_key}"),
            rules=(*_rules, *_text(), *openai_clip.SCALARS),
            required=("image.projection.weight", *openai_clip.TEXT_REQUIRED),
            settings=settings,
            after_read=clamped,
        )
    )
