"""OWL-ViT and OWLv2 from Hugging Face directories: config.json (model_type owlvit or owlv2), weights, processor.

Source: Minderer et al. 2022 (arXiv 2205.06230), OWL-ViT; Minderer et al. 2023 (arXiv 2306.09683), OWLv2.
Graphs: regions pixels [B, 3, S, S] -> a proposal for each patch, see `Regions`; text ids [B, T] -> text_embeds [B, D],
unit rows; detect, which computes the model's own score,

    score = sigmoid((cos + logit_shift) * logit_scale)

Every patch proposes one box. OWLv2 pads a picture to a square on the right or below. It pads with black, as its
training code and transformers 5 do. Both image processors of transformers 4 (up to 4.57.6) pad with grey, 0.5. The pull
request that changed it (huggingface/transformers 41938) gives AP on LVIS: 43.4 with grey, 44.0 with black.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor as TorchTensor
from torch import nn
from torch.nn import functional as F

from calmclip.export import layouts
from calmclip.export.checkpoints import Checkpoint, Weights, hugging_face, read
from calmclip.export.checkpoints.files import read_json
from calmclip.export.checkpoints.locate import weights_sha256
from calmclip.export.layouts import DROP, Layout, Rule, Settings, concatenate, fill, translate
from calmclip.export.layouts.common.openai_clip import square
from calmclip.export.layouts.hf_clip import TEXT, blocks, style, tower_config
from calmclip.export.nets import (
    NETS,
    Built,
    Net,
    NetPlugin,
    Tower,
    attention_promises,
    bucketed,
    float32,
    text_inputs,
)
from calmclip.export.nets.common import detect_graph as detection
from calmclip.export.towers import State, Style, part
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer
from calmclip.export.towers.transformer import linear
from calmclip.models.bundle.manifest import (
    DefaultClassifier,
    ImagePreprocess,
    Source,
    SuppressionDefaults,
    TextPreprocess,
)
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from calmclip.models.flow import Array, Arrays

MIN_SCORE = 0.1  # the default for these sigmoids in the papers' code and in transformers
_EPSILON = 1e-6  # the reference adds it to a length before the division

_HEADS = (
    Rule("layer_norm.{p}", "regions.norm.{p}"),
    *(Rule(f"{head}_head.dense{{i}}.{{p}}", f"regions.{head}.{{i}}.{{p}}") for head in ("box", "objectness")),
    *concatenate("class_head.*.{p}", "regions.look.{p}", ("dense0", "logit_shift", "logit_scale")),
    Rule("box_bias", DROP),  # computed from the grid
)


def _vision(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{theirs}.embeddings.class_embedding", f"{ours}.cls"),
        Rule(f"{theirs}.embeddings.patch_embedding.{{p}}", f"{ours}.patch.{{p}}"),
        Rule(f"{theirs}.embeddings.position_embedding.weight", f"{ours}.positions"),
        Rule(f"{theirs}.embeddings.position_ids", DROP),
        Rule(f"{theirs}.pre_layernorm.{{p}}", f"{ours}.norm_pre.{{p}}"),
        *blocks(f"{theirs}.encoder.layers", ours),
        Rule(f"{theirs}.post_layernorm.{{p}}", f"{ours}.norm_post.{{p}}"),
    )


class Regions(nn.Module):
    """pixels [B, 3, S, S] -> per patch, row by row: class_embeds [B, P, D] unit rows, boxes [B, P, 4] in pixels,
    objectness [B, P] (1 for OWL-ViT, which has no such head), logit_shift, logit_scale and lengths [B, P].

    Patches are multiplied by the class token and normalized; all heads read the result. One product gives class
    embedding, shift and scale of the logits.
    """

    def __init__(self, state: State, style: Style) -> None:
        super().__init__()
        self.vision = VisionTransformer(part(state, "vision."), style)
        width = state["norm.weight"].shape[0]
        self.norm = nn.LayerNorm(width, eps=style.eps)
        self.look = linear(state, "look", width)
        self.box = _head(part(state, "box."), width)
        self.objectness = _head(part(state, "objectness."), width) if "objectness.0.weight" in state else None

    def fold(self) -> None:
        """The bias of the boxes and the side of the input become constants."""
        self.vision.fold()
        patches = self.vision.positions.shape[0]
        grid = int(patches**0.5)
        self.side = float(grid * self.vision.patch.kernel_size[0])
        self.bias = nn.Buffer(grid_bias(grid), persistent=False)

    def forward(self, pixels: TorchTensor) -> tuple[TorchTensor, ...]:
        tokens = self.vision(pixels)
        patches = self.norm(tokens[:, 1:] * tokens[:, :1])
        looks = self.look(patches)
        embeds, shift, scale = looks[..., :-2], looks[..., -2], looks[..., -1]
        lengths = torch.linalg.vector_norm(embeds, dim=-1)
        centre, size = (self.box(patches) + self.bias).sigmoid().chunk(2, dim=-1)
        boxes = torch.cat((centre - size / 2, centre + size / 2), dim=-1) * self.side
        if self.objectness is None:
            objectness = torch.ones_like(lengths)
        else:
            objectness = self.objectness(patches).squeeze(-1).sigmoid()
        return (
            embeds / (lengths + _EPSILON).unsqueeze(-1),
            boxes,
            objectness,
            shift,
            F.elu(scale) + 1,
            lengths / lengths.mean(dim=-1, keepdim=True),
        )


class _Head(nn.ModuleList):
    """Linear layers with GELU between them."""

    def forward(self, x: TorchTensor) -> TorchTensor:
        for i, layer in enumerate(self):
            x = layer(F.gelu(x) if i else x)
        return x


def _head(state: State, width: int) -> _Head:
    return _Head(linear(state, str(i), width) for i in range(3))


def grid_bias(grid: int) -> TorchTensor:
    """-> float32 [grid * grid, 4]: cx, cy, w, h of a patch before the sigmoid, relative to the input. As in the
    reference, cx and cy are those of the patch's lower right corner."""
    steps = torch.arange(1, grid + 1) / grid
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    corner = torch.stack((x, y), dim=-1).reshape(-1, 2)
    return torch.cat((_logit(corner), _logit(torch.full_like(corner, 1.0) / grid)), dim=-1)


def _logit(p: TorchTensor) -> TorchTensor:
    return torch.log(p + 1e-4) - torch.log1p(-p + 1e-4)


def settings(checkpoint: Checkpoint, state: Mapping[str, TorchTensor]) -> Settings:
    """Raises `UnknownCheckpoint` for a config that contradicts the weights, or a setting that is not supported."""
    vision = tower_config(checkpoint, "vision_config", state, "regions.vision.blocks.", _WIDE)
    text = tower_config(checkpoint, "text_config", state, "text.blocks.", _USUAL)
    side = _side(checkpoint, state)
    if (dim := state["text.projection.weight"].shape[0]) != state["regions.look.weight"].shape[0] - 2:
        raise UnknownCheckpoint(
            f"{checkpoint.path}: texts become {dim} numbers, regions {state['regions.look.weight'].shape[0] - 2}; "
            "expected the same number"
        )
    return Settings(
        image=partial(Regions, style=style(vision, pool="none")),
        text=partial(TextTransformer, style=style(text, pool="eot", causal=True)),
        pixels=pixels(checkpoint.config["model_type"], hugging_face.processor(checkpoint), side),
        tokens=TextPreprocess(context=state["text.positions"].shape[0], pad="longest", pad_id=0),
        tokenizer=hugging_face.tokenizer_json(checkpoint),
        license=hugging_face.license_of(checkpoint.directory),
        templates=("a photo of a {}",),
    )


# defaults of the config classes, which a config saved as a difference leaves out
_USUAL = {"num_attention_heads": 8, "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
_WIDE = _USUAL | {"num_attention_heads": 12}


def _side(checkpoint: Checkpoint, state: Mapping[str, TorchTensor]) -> int:
    """The side of the square input in pixels."""
    patch, positions = state["regions.vision.patch.weight"].shape[-1], len(state["regions.vision.positions"])
    side = (checkpoint.config.get("vision_config") or {}).get("image_size", 768)
    if (grid := square(positions - 1)) is None or side != grid * patch:
        raise UnknownCheckpoint(
            f"{checkpoint.path}: {positions} positions are not those of a class token and the patches of {patch} "
            f"pixels in a square of {side}"
        )
    return int(side)


# model_type -> our settings of its processor; the values that its config must have
_FIXED: dict[str, dict[str, Any]] = {
    "owlvit": {"resize": "exact"},
    "owlv2": {"resize": "square", "resample": "gaussian", "pad": 0},
}
_STEPS: dict[str, dict[str, Any]] = {"owlvit": {"do_center_crop": False}, "owlv2": {"do_pad": True}}
_ALWAYS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}


def pixels(kind: str, config: dict[str, Any], side: int) -> ImagePreprocess:
    """The config of `OwlViTImageProcessor` or `Owlv2ImageProcessor` -> ours. Null means the default.

    Raises `UnknownCheckpoint` with the setting that is absent or not of this kind.
    """
    config = {name: value for name, value in config.items() if value is not None}
    for name, usual in {**_ALWAYS, **_STEPS[kind]}.items():
        if (value := config.get(name, usual)) != usual:
            raise UnknownCheckpoint(f"the image processor has {name} = {value}; only {kind}'s own {usual} is supported")
    size = config.get("size", side)
    size = [size.get("height"), size.get("width")] if isinstance(size, dict) else size
    if size not in (side, [side, side]):
        raise UnknownCheckpoint(f"the image processor makes pictures of {size}; the model reads {side} x {side}")
    if absent := {"image_mean", "image_std"} - config.keys():
        raise UnknownCheckpoint(f"the image processor's config lacks {' and '.join(sorted(absent))}")
    resample = hugging_face.RESAMPLE.get(config.get("resample", 3))
    if kind == "owlvit" and not resample:
        raise UnknownCheckpoint(f"the image processor has resample = {config['resample']}; expected 2 or 3")
    fixed = {"resample": resample, **_FIXED[kind]}
    return ImagePreprocess(size=(side, side), mean=config["image_mean"], std=config["image_std"], **fixed)


LAYOUTS = {
    kind: Layout(
        title=title,
        keys=(f"{kind}.vision_model.embeddings.class_embedding", "box_head.dense0.weight"),
        model_type=(kind,),
        rules=(
            *_vision(f"{kind}.vision_model", "regions.vision"),
            *(replace(rule, theirs=f"{kind}.{rule.theirs}") for rule in TEXT),
            Rule(f"{kind}.visual_projection.weight", DROP),  # of a vector for the picture
            Rule(f"{kind}.logit_scale", DROP),
            *_HEADS,
        ),
        required=(
            *("regions.vision.positions", "regions.vision.patch.weight", "regions.vision.cls", "regions.look.weight"),
            *("text.tokens.weight", "text.positions", "text.projection.weight", "regions.norm.weight"),
            *(("regions.objectness.0.weight",) if kind == "owlv2" else ()),
        ),
        settings=settings,
    )
    for kind, title in (("owlvit", "Hugging Face OWL-ViT"), ("owlv2", "Hugging Face OWLv2"))
}


def recognise(path: str) -> bool:
    try:
        return read_json(Path(path) / "config.json").get("model_type") in LAYOUTS
    except UnknownCheckpoint:
        return False


def load(path: str, weights: Weights = Weights(), *, fold: bool = True) -> Net:  # noqa: B008 - frozen
    """Raises `UnknownCheckpoint` with the file and the tensor or setting that is missing or not supported, and
    `BadRequest` if the recipe has a section on weights."""
    if weights != Weights():
        raise BadRequest("OWL-ViT states its own activation; leave out the recipe's [weights]")
    checkpoint = read(path, weights)
    layout = LAYOUTS[checkpoint.config["model_type"]]
    state = translate(layout, checkpoint)
    settings = layouts.settings(layout, checkpoint, state)
    regions = fill(layout, checkpoint, state, "regions.", settings.image, fold=fold)
    text = fill(layout, checkpoint, state, "text.", settings.text, fold=fold)
    dim, patches = state["text.projection.weight"].shape[0], len(state["regions.vision.positions"]) - 1
    per_patch, side = float32("B", patches), settings.pixels.size[0]
    return Net(
        name="owl",
        source=Source(
            net="owl",
            model=checkpoint.path.resolve().name,
            weights=weights_sha256(checkpoint.path),
            license=settings.license,
            notes=layout.title,
        ),
        tasks=("detect", "raw"),
        towers={
            "regions": Tower(
                regions,
                {"pixels": float32("B", 3, *settings.pixels.size)},
                {
                    "class_embeds": float32("B", patches, dim),
                    "boxes": float32("B", patches, 4),
                    **dict.fromkeys(("objectness", "logit_shift", "logit_scale", "lengths"), per_patch),
                },
                settings.pixels,
                quantizer="search",
                summary=partial(summary, side=side),
                promises=attention_promises(regions),
                prefix="regions.",
            ),
            "text": Tower(
                text,
                text_inputs(settings.tokens),
                {"text_embeds": float32("B", dim)},
                bucketed(settings.tokens),
                quantizer="search",
                promises=attention_promises(text),
                prefix="text.",
            ),
        },
        files={"tokenizer.json": settings.tokenizer},
        classifier=DefaultClassifier(templates=settings.templates),
        built={"detect": detect_graph(patches, dim, side)},
        layout=layout,
        suppression=SuppressionDefaults(min_score=MIN_SCORE),
        folded=fold,
    )


def summary(outputs: Arrays, side: int) -> Arrays:
    """The rows by which two graphs are compared, one for each picture. Class embeddings are weighted by objectness, and
    boxes are relative to the input. Shift and scale are compared by their scores at the cosines 0 and 1."""
    weight = outputs["objectness"][..., None]
    low, high = (((cosine + outputs["logit_shift"]) * outputs["logit_scale"]) for cosine in (0.0, 1.0))
    return {
        "class_embeds": _flat(outputs["class_embeds"] * weight),
        "boxes": _flat(outputs["boxes"] / side),
        "objectness": outputs["objectness"],
        "logits": np.concatenate((_sigmoid(low), _sigmoid(high)), axis=-1),
        "lengths": outputs["lengths"],
    }


def _flat(array: Array) -> Array:
    return array.reshape(len(array), -1)


def _sigmoid(x: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # this form does not overflow


def detect_graph(patches: int, dim: int, side: int) -> Built:
    regions = {
        "class_embeds": float32(1, patches, dim),
        "boxes": float32(1, patches, 4),
        "logit_shift": float32(1, patches),
        "logit_scale": float32(1, patches),
    }
    score = """
        directions = Transpose (text_embeds)
        region = Squeeze (class_embeds, first)
        cosines = MatMul (region, directions)
        shift = Transpose (logit_shift)
        scale = Transpose (logit_scale)
        shifted = Add (cosines, shift)
        logits = Mul (shifted, scale)
        pairs = Sigmoid (logits)
    """
    random = np.random.default_rng(0)
    example = {
        **detection.example(random, patches, dim, side),
        "logit_shift": random.uniform(-1, 0, (1, patches)),
        "logit_scale": random.uniform(1, 10, (1, patches)),
    }
    return detection.detect_graph(regions, dim, score, {}, example, {})


NETS.register("owl")(NetPlugin(recognise, load, partial(load, fold=False)))
