"""open_clip directories with an image tower of timm: SigLIP's ViT becomes ours, timm builds any other.

Source: Ilharco et al., OpenCLIP (doi 10.5281/zenodo.5143773), `TimmModel`: ``visual.trunk`` and ``visual.head``.
SigLIP: Zhai et al. 2023 (arXiv 2303.15343); MobileCLIP: Vasu et al. 2024 (arXiv 2311.17049); ViTamin: Chen et al. 2024
(arXiv 2404.02132); EVA: Sun et al. 2023 (arXiv 2303.15389).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.checkpoints.files import require_package
from calmclip.export.layouts import LAYOUTS, Layout, Rule, Settings, concatenate, open_clip, rename
from calmclip.export.layouts.common import openai_clip, timm_models
from calmclip.export.towers import Style
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer
from calmclip.models.errors import UnknownCheckpoint

_NAME = f"{open_clip.CONFIG}: vision_cfg.timm_model_name"
SIGLIP = (
    Rule("visual.trunk.patch_embed.proj.{p}", "image.patch.{p}"),
    Rule("visual.trunk.pos_embed", "image.positions", lambda tensor: tensor.squeeze(0)),
    *rename("visual.trunk.blocks.{i}", "image.blocks.{i}", timm_models.BLOCK),
    Rule("visual.trunk.norm.{p}", "image.norm_post.{p}"),
    Rule("visual.trunk.attn_pool.latent", "image.pool.probe", torch.Tensor.flatten),
    *concatenate("visual.trunk.attn_pool.*.{p}", "image.pool.qkv.{p}", ("q", "kv")),
    *rename(
        "visual.trunk.attn_pool",
        "image.pool",
        {"proj.{p}": "out.{p}", "norm.{p}": "norm.{p}", "mlp.fc1.{p}": "mlp.up.{p}", "mlp.fc2.{p}": "mlp.down.{p}"},
    ),
    Rule("visual.head.proj.{p}", "image.projection.{p}"),
)
TRUNK = tuple(Rule(f"visual.{part}.{{rest}}", f"image.trunk.{part}.{{rest}}") for part in ("trunk", "head"))
_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}


def is_siglip(checkpoint: Checkpoint) -> bool:
    vision = (checkpoint.configs.get(open_clip.CONFIG, {}).get("model_cfg") or {}).get("vision_cfg") or {}
    return "siglip" in str(vision.get("timm_model_name")) and vision.get("timm_pool") == "map"


def siglip(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    config = open_clip.model_config(checkpoint)
    return _settings(checkpoint, config, state, siglip_tower(config))


def siglip_tower(config: Mapping[str, Any]) -> Callable[[Mapping[str, Tensor]], nn.Module]:
    return partial(VisionTransformer, style=_style(config["vision_cfg"]))


def _style(vision: Mapping[str, Any]) -> Style:
    """The facts that shapes do not say, from timm's own model of this name, built without memory for its weights."""
    timm = require_package("timm", "an image tower of timm's")
    name = timm_models.model_name(vision.get("timm_model_name"), _NAME)
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    block = model.blocks[0]
    kind = type(block.mlp.act).__name__
    if kind not in _ACTIVATIONS:
        raise UnknownCheckpoint(f"{_NAME} {name!r} has the activation {kind}; expected {' or '.join(_ACTIVATIONS)}")
    tanh = getattr(block.mlp.act, "approximate", "none") == "tanh"
    return Style(
        heads=block.attn.num_heads,
        activation="gelu_tanh" if tanh else _ACTIVATIONS[kind],  # type: ignore[arg-type]
        eps=block.norm1.eps,
        pool="map",
    )


def trunk(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    config = open_clip.model_config(checkpoint)
    return _settings(checkpoint, config, state, trunk_tower(config))


def trunk_tower(config: Mapping[str, Any]) -> Callable[[Mapping[str, Tensor]], nn.Module]:
    return partial(_build, config=config)


def _build(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """The empty tower that open_clip's adapter builds."""
    adapter = require_package("open_clip.timm_model", "an open_clip directory")
    vision = config["vision_cfg"]
    name = timm_models.model_name(vision.get("timm_model_name"), _NAME)
    options = {new: vision[f"timm_{new}"] for new in ("pool", "proj", "proj_bias") if f"timm_{new}" in vision}
    try:
        tower = adapter.TimmModel(name, config["embed_dim"], vision.get("image_size", 224), **options)
    except Exception as error:  # the builders of timm raise any kind
        raise UnknownCheckpoint(f"{_NAME} {name!r} with {options} cannot be built: {error}") from None
    return timm_models.TimmTrunk(tensors, tower)


def _settings(checkpoint: Checkpoint, config: Mapping[str, Any], state: Mapping[str, Tensor], image: Any) -> Settings:
    open_clip.require_usual(config, "text_cfg")
    if (dim := state["text.projection.weight"].shape[0]) != config["embed_dim"]:
        raise UnknownCheckpoint(
            f"{open_clip.CONFIG}: embed_dim is {config['embed_dim']}; the shape of text_projection makes it {dim}"
        )
    return Settings(
        image=image,
        text=partial(TextTransformer, style=open_clip.text_style(config)),
        pixels=open_clip.image_preprocess(checkpoint, config["vision_cfg"].get("image_size", 224)),
        **open_clip.text_parts(checkpoint, config),
    )


LAYOUTS.register("open_clip_siglip")(
    Layout(
        title="open_clip, SigLIP's ViT of timm",
        keys=("visual.trunk.patch_embed.proj.weight", "visual.trunk.attn_pool.latent", "text.token_embedding.weight"),
        file=open_clip.CONFIG,
        condition=is_siglip,
        rules=(*SIGLIP, *openai_clip.text("text."), *openai_clip.SCALARS),
        required=(
            "image.patch.weight", "image.positions", "image.pool.probe", "image.norm_post.weight",
            *openai_clip.TEXT_REQUIRED,
        ),
        settings=siglip,
    )
)  # fmt: skip
NAMES = ("open_clip_timm", "open_clip_timm_custom_text")
for _name, _prefix in (("open_clip_timm", ""), ("open_clip_timm_custom_text", "text.")):
    LAYOUTS.register(_name)(
        Layout(
            title="open_clip, an image tower of timm's" + (" (custom text)" if _prefix else ""),
            keys=(f"{_prefix}token_embedding.weight", "visual.trunk.{rest}"),
            file=open_clip.CONFIG,
            condition=lambda checkpoint: not is_siglip(checkpoint),
            without=("adapter.{rest}",),  # the net `ranking`
            rules=(*TRUNK, *openai_clip.text(_prefix), *openai_clip.SCALARS),
            required=openai_clip.TEXT_REQUIRED,
            settings=trunk,
        )
    )
