"""ViT out of Hugging Face directories: what a picture shows, of the classes it was trained with.

Source: Dosovitskiy et al. 2020 (arXiv 2010.11929), in the names of transformers' `ViTForImageClassification`.
Graph: logits, pixels float32 [B, 3, H, W] -> logits [B, C]; raw. labels.json names the classes in their order.

A norm of the embeddings, behind the class token and the positions, is read where it is
(``vit.embeddings.layernorm``): transformers has none, Bondarenko et al. 2023 (arXiv 2306.12929) show that a norm there
is what alone tames a ViT's outliers.
"""

import json
from functools import partial
from typing import Any

from calmclip.export.checkpoints import Weights
from calmclip.export.layouts import DROP, Layout, Rule, _attention, _hugging_face
from calmclip.export.nets import NETS, Net, NetPlugin, Tower
from calmclip.export.nets._hugging_face import RAW, opened, promises, recognise
from calmclip.export.towers import Style
from calmclip.export.towers.attention import AttentionSpec
from calmclip.export.towers.image import ImageClassifier
from calmclip.models.bundle.manifest import DefaultClassifier
from calmclip.models.bundle.manifest import Tensor as Spec
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

LAYOUT = Layout(
    title="Hugging Face ViT",
    keys=("vit.embeddings.patch_embeddings.projection.weight", "classifier.weight"),
    model_type=("vit",),
    rules=(
        Rule("vit.embeddings.cls_token", "image.cls", how=lambda t: t[0, 0], undo=lambda t: t[None, None]),
        Rule("vit.embeddings.position_embeddings", "image.positions", how=lambda t: t[0], undo=lambda t: t[None]),
        Rule("vit.embeddings.mask_token", DROP),  # of its training
        Rule("vit.embeddings.patch_embeddings.projection.{p}", "image.patch.{p}"),
        Rule("vit.embeddings.layernorm.{p}", "image.norm_pre.{p}"),
        *(Rule(f"vit.encoder.layer.{{i}}.{one}", f"image.blocks.{{i}}.{other}") for one, other in _BLOCK.items()),
        *(
            Rule(
                f"vit.encoder.layer.{{i}}.attention.attention.{name}.{{p}}", "image.blocks.{i}.attn.qkv.{p}",
                piece=piece,
            )
            for piece, name in enumerate(("query", "key", "value"))
        ),
        *_attention.rules("vit.encoder.layer.{i}.attention.attention.alpha", "image.blocks.{i}"),
        Rule("vit.layernorm.{p}", "image.norm_post.{p}"),
        Rule("vit.pooler.dense.{p}", DROP),  # which its classifier does not read
        Rule("classifier.{p}", "image.projection.{p}"),
    ),
    needs=("image.cls", "image.positions", "image.patch.weight", "image.norm_post.weight", "image.projection.weight"),
    finish=_attention.stacked,
    begin=_attention.unstacked,
)  # fmt: skip


def load(checkpoint: str, weights: Weights = Weights(), *, fold: bool = True) -> Net:  # noqa: B008 - frozen
    """Raises `UnknownCheckpoint` naming the file and the tensor or setting that is missing or not supported, and
    `BadRequest` where the recipe says something of weights."""
    found = opened((LAYOUT,), checkpoint, weights, fold)
    config, state = found.config(_USUAL, "image.blocks."), found.state
    grid, patch = round((len(state["image.positions"]) - 1) ** 0.5), state["image.patch.weight"].shape[-1]
    if len(state["image.positions"]) != grid**2 + 1 or (said := config.get("image_size", grid * patch)) != grid * patch:
        raise UnknownCheckpoint(
            f"{found.checkpoint.path}: {len(state['image.positions'])} positions are not those of a class token and "
            f"the patches of {patch} pixels in a square of {said}"
        )
    pixels = _hugging_face.image_preprocess(_processor(_hugging_face.processor(found.checkpoint)), grid * patch)
    style = Style(
        heads=config["num_attention_heads"],
        activation=_hugging_face.activation(config),  # type: ignore[arg-type]
        eps=config["layer_norm_eps"],
        attention=AttentionSpec.of(config),
    )
    labels = _labels(config, len(state["image.projection.weight"]))
    module = found.fill("image.", partial(ImageClassifier, style=style))
    return Net(
        name="vit",
        source=found.source("vit"),
        tasks=RAW,
        towers={
            "logits": Tower(
                module,
                {pixels.input: Spec(dtype="float32", shape=("B", 3, *pixels.size))},
                {"logits": Spec(dtype="float32", shape=("B", len(labels)))},
                pixels,
                quantizer="search",
                promises=promises(module),
                prefix="image.",
            )
        },
        files={"labels.json": json.dumps(labels, ensure_ascii=False, indent=0).encode()},
        classifier=DefaultClassifier(labels="labels.json"),
        layout=found.layout,
        folded=fold,
    )


def _processor(config: dict[str, Any]) -> dict[str, Any]:
    """Of `ViTImageProcessor`, whose one number for a size is that of both sides."""
    found = {**_PROCESSOR, **{name: value for name, value in config.items() if value is not None}}
    if isinstance(size := found.get("size"), int) and not found["do_center_crop"]:
        found["size"] = {"height": size, "width": size}
    return found


def _labels(config: dict[str, Any], classes: int) -> list[str]:
    """In the order of the logits. Raises `UnknownCheckpoint` where id2label counts others."""
    named = {str(key): str(value) for key, value in (config.get("id2label") or {}).items()}
    named = named or {str(i): f"LABEL_{i}" for i in range(classes)}
    if named.keys() != {str(i) for i in range(classes)}:
        raise UnknownCheckpoint(f"config.json: id2label names {len(named)} classes; the weights have {classes}")
    return [named[str(i)] for i in range(classes)]


NETS.register("vit")(NetPlugin(recognise("vit", LAYOUT), load, partial(load, fold=False)))
