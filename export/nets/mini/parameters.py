"""The pretrained and trained files -> the constants of the graphs, in numpy, by the names that `graphs` refers to.

BatchNorms are folded into the convolutions before them in float64 (Jacob et al. 2017, arXiv 1712.05877, eq. 14).
MiniLM's query, key and value are one product, the query's weights include 1 / sqrt(32), and the positions include the
only token type.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from calmclip.export.nets.mini.facts import (
    CLASSES,
    CONTEXT,
    HEADS,
    LAYERS,
    NAMES,
    SAMPLES,
    SIDE,
    STRIDES,
    WIDTH,
    WIDTH32,
)
from calmclip.export.nets.mini.sentences import embed, unit
from calmclip.models.errors import WeightsMissing
from calmclip.models.flow import Array

Arrays = dict[str, Array]
HEAD_SHAPES = MappingProxyType({
    "image_weight": (WIDTH, WIDTH32 + WIDTH),  # A
    "image_bias": (WIDTH,),  # a
    "text_weight": (WIDTH, WIDTH),  # B
    "text_centre": (WIDTH,),
    "feature_mean": (WIDTH32,),
    "feature_std": (WIDTH32,),
    "class_table": (CLASSES, WIDTH),
})  # fmt: skip
_BACKBONE = {
    r"^_blocks\.": "blocks.",
    r"\._expand_conv\.": ".expand.conv.",
    r"\._bn0\.": ".expand.norm.",
    r"\._depthwise_conv\.": ".depthwise.conv.",
    r"\._bn1\.": ".depthwise.norm.",
    r"\._project_conv\.": ".project.conv.",
    r"\._bn2\.": ".project.norm.",
    r"^_conv_stem\.": "stem.conv.",
    r"^_bn0\.": "stem.norm.",
    r"^_conv_head\.": "head.conv.",
    r"^_bn1\.": "head.norm.",
    r"^_fc\.": "classifier.",
}
_MINILM = {
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm2",
}
_EPSILON = 1e-3  # of the backbone's BatchNorms


def read(path: Path, shapes: Mapping[str, tuple[int, ...]] | None, command: str) -> Arrays:
    """The tensors of a trained file, in float32. Raises `WeightsMissing` for a file that is absent or holds others;
    ``command`` writes such a file."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsMissing(f"{path} cannot be read: {error}. `{command}` writes such a file.") from None
    held = {name: array.shape for name, array in tensors.items()}
    if shapes is not None and held != dict(shapes):
        raise WeightsMissing(f"{path} holds {held}; expected {dict(shapes)}. `{command}` writes such a file.")
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def backbone(state: Mapping[str, Array]) -> Arrays:
    """``state`` in the names of efficientnet_pytorch -> `backbone.Backbone`'s parameters without BatchNorms.

    A few channels of every stage are dead: weights of 1e-7 with a bias of -1. Their int32 bias would overflow, so the
    quantizer widens their scale, which then depends on the layer's input. Weights that are negligible beside their bias
    become 0; then equal layers of two graphs get equal bytes.
    """
    exact = {renamed(name): array.astype(np.float64) for name, array in state.items()}
    folded = {name: exact[name] for name in ("classifier.weight", "classifier.bias")}
    for name in [name for name in exact if name.endswith("conv.weight")]:
        unit_name = name.removesuffix("conv.weight")
        norm = {part: exact[f"{unit_name}norm.{part}"] for part in ("weight", "bias", "running_mean", "running_var")}
        inverse = 1 / np.sqrt(norm["running_var"] + _EPSILON)
        weight = exact[name] * (norm["weight"] * inverse)[:, None, None, None]
        bias = -norm["running_mean"] * inverse * norm["weight"] + norm["bias"]
        largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
        weight *= largest > 2e-6 * np.abs(bias)[:, None, None, None]
        folded |= {name: weight, f"{unit_name}conv.bias": bias}
    return {name: array.astype(np.float32) for name, array in folded.items()}


def renamed(name: str) -> str:
    """A name of efficientnet_pytorch -> the name in `backbone.Backbone`."""
    for pattern, replacement in _BACKBONE.items():
        name = re.sub(pattern, replacement, name)
    return name


def minilm(state: Mapping[str, Array], layers: int = LAYERS) -> Arrays:
    """``state`` in the names of transformers' BertModel -> `minilm.MiniLM`'s parameters."""
    positions = state["embeddings.position_embeddings.weight"][:CONTEXT]
    ours = {
        "words.weight": state["embeddings.word_embeddings.weight"],
        "positions": positions + state["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": state["embeddings.LayerNorm.weight"],
        "norm.bias": state["embeddings.LayerNorm.bias"],
    }
    for index in range(layers):
        old, new = f"encoder.layer.{index}.", f"layers.{index}."
        for kind in ("weight", "bias"):
            query, key, value = (state[f"{old}attention.self.{part}.{kind}"] for part in ("query", "key", "value"))
            ours[f"{new}qkv.{kind}"] = np.concatenate([query / np.float32((WIDTH // HEADS) ** 0.5), key, value])
            ours |= {f"{new}{name}.{kind}": state[f"{old}{theirs}.{kind}"] for theirs, name in _MINILM.items()}
    return ours


def image_head(heads: Arrays) -> Arrays:
    return {
        "project.weight": heads["image_weight"],
        "project.bias": heads["image_bias"],
        "mean": heads["feature_mean"],
        "gain": 1 / heads["feature_std"],
        "class_table": heads["class_table"],
    }


def text(heads: Arrays, encoder: Arrays) -> Arrays:
    """The constants of the `text` graph."""
    weight = heads["text_weight"].astype(np.float64)
    bias = -(weight @ heads["text_centre"].astype(np.float64))
    project = {"project.weight": heads["text_weight"], "project.bias": bias.astype(np.float32)}
    return {**_under("encoder", encoder), **project}


def image(heads: Arrays, folded: Arrays) -> Arrays:
    """The constants of the `image` graph."""
    return {**_under("backbone", folded), **_under("head", image_head(heads))}


def regions(heads: Arrays, folded: Arrays, detector: Arrays, names: Array, head: Arrays) -> Arrays:
    """The constants of the `regions` graph. ``names`` [80, 384]: see `known`; ``head``: `masks.MaskHead`'s."""
    seen = {**_under("backbone", folded), **_under("image", image_head(heads))}
    return {**seen, **detector, "names": names, "cells": cells(), **_under("masks", _of("features", head))}


def masks(head: Arrays) -> Arrays:
    """The constants of the `masks` graph, of `masks.MaskHead`'s."""
    return {**_of("masks", head), "places": places()}


def places() -> Array:
    """float32 [1, 4, S, S]: x, y, x^2, y^2 of each sample of a mask, from -1 to 1."""
    y, x = np.meshgrid(*[np.linspace(-1, 1, SAMPLES)] * 2, indexing="ij")
    return np.stack((x, y, x**2, y**2))[None].astype(np.float32)


def known(parameters: Arrays, tokenizer: bytes, templates: Sequence[str]) -> Array:
    """Unit text vectors of NanoDet's names, float32 [80, 384]."""
    return text_vectors(parameters, tokenizer, NAMES, templates)


def text_vectors(parameters: Arrays, tokenizer: bytes, names: Sequence[str], templates: Sequence[str]) -> Array:
    """Unit text vectors float32 [n, 384]: the mean over ``templates``."""
    phrases = [template.replace("{}", name) for name in names for template in templates]
    rows = embed(parameters, tokenizer, phrases).astype(np.float64)
    return unit(rows.reshape(len(names), len(templates), -1).mean(1)).astype(np.float32)


def cells() -> Array:
    """float32 [N, 3]: x and y of the centre of each cell of NanoDet's grids in pixels, and its stride."""
    grids = []
    for stride in STRIDES:
        rows, columns = np.divmod(np.arange((SIDE // stride) ** 2), SIDE // stride)
        grids.append(np.stack(((columns + 0.5) * stride, (rows + 0.5) * stride, np.full(len(rows), stride)), axis=1))
    return np.concatenate(grids).astype(np.float32)


def _of(prefix: str, arrays: Arrays) -> Arrays:
    start = f"{prefix}."
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def _under(prefix: str, arrays: Arrays) -> Arrays:
    return {f"{prefix}.{name}": array for name, array in arrays.items()}
