"""ViT from Hugging Face directories: a picture -> logits of the classes that it was trained with.

Source: Dosovitskiy et al. 2020 (arXiv 2010.11929), in the names of transformers' `ViTForImageClassification`.
Graph: logits, pixels float32 [B, 3, H, W] -> logits [B, C]; raw. labels.json names the classes in their order.

A norm of the embeddings, after the class token and the positions, is read if the checkpoint has it
(``vit.embeddings.layernorm``). transformers has none. Bondarenko et al. 2023 (arXiv 2306.12929) show that a ViT has few
outliers only with this norm.
"""

import json
from functools import partial
from typing import Any

from calmclip.export.checkpoints import Weights, hugging_face
from calmclip.export.layouts import DROP, Layout, Rule, concatenate, rename
from calmclip.export.layouts.common import attention_gates, openai_clip
from calmclip.export.layouts.hf_clip import style
from calmclip.export.nets import NETS, Net, NetPlugin, float32
from calmclip.export.nets.common.single_tower import open_checkpoint, recognise
from calmclip.export.towers.image import ImageClassifier
from calmclip.models.bundle.manifest import DefaultClassifier
from calmclip.models.errors import UnknownCheckpoint

_USUAL = {"num_attention_heads": 12, "num_hidden_layers": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
_HALF = (0.5, 0.5, 0.5)
_PROCESSOR = {"do_center_crop": False, "resample": 2, "image_mean": _HALF, "image_std": _HALF}  # of ViTImageProcessor
_BLOCK = {
    "attention.output.dense.{p}": "attn.out.{p}",
    "layernorm_before.{p}": "norm1.{p}",
    "layernorm_after.{p}": "norm2.{p}",
    "intermediate.dense.{p}": "mlp.up.{p}",
    "output.dense.{p}": "mlp.down.{p}",
}
_ATTENTION = "vit.encoder.layer.{i}.attention.attention"

LAYOUT = Layout(
    title="Hugging Face ViT",
    keys=("vit.embeddings.patch_embeddings.projection.weight", "classifier.weight"),
    model_type=("vit",),
    rules=(
        Rule("vit.embeddings.cls_token", "image.cls", convert=lambda t: t[0, 0], invert=lambda t: t[None, None]),
        Rule("vit.embeddings.position_embeddings", "image.positions", convert=lambda t: t[0], invert=lambda t: t[None]),
        Rule("vit.embeddings.mask_token", DROP),  # used in training alone
        Rule("vit.embeddings.patch_embeddings.projection.{p}", "image.patch.{p}"),
        Rule("vit.embeddings.layernorm.{p}", "image.norm_pre.{p}"),
        *rename("vit.encoder.layer.{i}", "image.blocks.{i}", _BLOCK),
        *concatenate(f"{_ATTENTION}.*.{{p}}", "image.blocks.{i}.attn.qkv.{p}", ("query", "key", "value")),
        *attention_gates.rules(f"{_ATTENTION}.alpha", "image.blocks.{i}"),
        Rule("vit.layernorm.{p}", "image.norm_post.{p}"),
        Rule("vit.pooler.dense.{p}", DROP),  # the classifier does not read it
        Rule("classifier.{p}", "image.projection.{p}"),
    ),
    required=(
        "image.cls",
        "image.positions",
        "image.patch.weight",
        "image.norm_post.weight",
        "image.projection.weight",
    ),
    after_read=attention_gates.stack_heads,
    before_write=attention_gates.unstack_heads,
)


def load(path: str, weights: Weights = Weights(), *, fold: bool = True) -> Net:  # noqa: B008 - frozen
    """Raises `UnknownCheckpoint` with the file and the tensor or setting that is missing or not supported, and
    `BadRequest` if the recipe has a section on weights."""
    opened = open_checkpoint((LAYOUT,), path, weights, fold)
    config, state = opened.config(_USUAL, "image.blocks."), opened.state
    positions, patch = len(state["image.positions"]), state["image.patch.weight"].shape[-1]
    side = (openai_clip.square(positions - 1) or 0) * patch
    if not side or config.get("image_size", side) != side:
        raise UnknownCheckpoint(
            f"{path}: {positions} positions are not those of a class token and the patches of {patch} pixels in a "
            f"square of {config.get('image_size', 'any size')}"
        )
    pixels = hugging_face.image_preprocess(_processor(hugging_face.processor(opened.checkpoint)), side)
    labels = _labels(config, len(state["image.projection.weight"]))
    return opened.net(
        "vit",
        "logits",
        opened.fill("image.", partial(ImageClassifier, style=style(config))),
        {pixels.input: float32("B", 3, *pixels.size)},
        {"logits": float32("B", len(labels))},
        pixels,
        {"labels.json": json.dumps(labels, ensure_ascii=False, indent=0).encode()},
        prefix="image.",
        classifier=DefaultClassifier(labels="labels.json"),
    )


def _processor(config: dict[str, Any]) -> dict[str, Any]:
    """The config of `ViTImageProcessor`, whose size may be one number for both sides."""
    settings = {**_PROCESSOR, **{name: value for name, value in config.items() if value is not None}}
    if isinstance(size := settings.get("size"), int) and not settings["do_center_crop"]:
        settings["size"] = {"height": size, "width": size}
    return settings


def _labels(config: dict[str, Any], classes: int) -> list[str]:
    """In the order of the logits. Raises `UnknownCheckpoint` if id2label has another number of classes."""
    names = {str(key): str(value) for key, value in (config.get("id2label") or {}).items()}
    names = names or {str(i): f"LABEL_{i}" for i in range(classes)}
    if names.keys() != {str(i) for i in range(classes)}:
        raise UnknownCheckpoint(f"config.json: id2label names {len(names)} classes; the weights have {classes}")
    return [names[str(i)] for i in range(classes)]


NETS.register("vit")(NetPlugin(recognise(("vit",), LAYOUT), load, partial(load, fold=False)))
