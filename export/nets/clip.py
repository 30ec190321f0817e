"""Checkpoints of the CLIP family in any layout: tensors translated to our names, towers of `export.towers`.

Source: Radford et al. 2021 (arXiv 2103.00020); each layout in `calmclip.export.layouts` names its own.
Graphs: image pixels [B, 3, H, W] -> image_embeds [B, D]; text ids [B, T], or vectors [B, d] of a language model
(LLM2CLIP), -> text_embeds [B, D]; unit rows. A layout with regions has two graphs more: `regions`, see
`Settings.regions`, of which the image graph is a part, and `detect`.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from calmclip.export import layouts
from calmclip.export.checkpoints import Weights, hub, read
from calmclip.export.checkpoints.locate import NoWeights, weight_files, weights_sha256
from calmclip.export.nets import (
    NETS,
    Net,
    NetPlugin,
    Tower,
    attention_promises,
    bucketed,
    float32,
    text_inputs,
)
from calmclip.export.nets.common.region_detector import with_detector
from calmclip.models.bundle.manifest import DefaultClassifier, ImagePreprocess, Plugin, Source, VectorPreprocess
from calmclip.models.errors import UnknownCheckpoint
from calmclip.models.flow import Arrays


def recognise(path: str) -> bool:
    """Raises `UnknownCheckpoint` for weights that cannot be read, or that lack a tensor which identifies a layout."""
    try:
        weight_files(Path(path))
    except (NoWeights, OSError):
        return False
    checkpoint = read(path)
    if layouts.find(checkpoint):
        return True
    if reason := layouts.why_none_fits(checkpoint):
        raise UnknownCheckpoint(f"{path}: {reason}")
    return False


def load(path: str, weights: Weights = Weights(), *, fold: bool = True) -> Net:  # noqa: B008 - frozen
    """Raises `UnknownCheckpoint` with the file and the tensor or setting that is missing or not supported."""
    checkpoint = read(path, weights)
    fitting = layouts.find(checkpoint)
    if fitting is None:
        raise UnknownCheckpoint(f"{path}: its tensors are of no layout in the table")
    name, layout = fitting
    state = layouts.translate(layout, checkpoint)
    settings = layouts.settings(layout, checkpoint, state)
    pixels, tokens = settings.pixels, bucketed(settings.tokens)
    image = layouts.fill(layout, checkpoint, state, "image.", settings.image, fold=fold)
    text = layouts.fill(layout, checkpoint, state, "text.", settings.text, fold=fold)
    embeds = float32("B", layouts.embed_dim(layout, checkpoint, state))
    towers = {
        "image": Tower(
            image,
            {pixels.input: float32("B", 3, *pixels.size)},
            {"image_embeds": embeds},
            pixels,
            quantizer="search",
            promises=attention_promises(image),
            prefix="image.",
        ),
        "text": Tower(
            text,
            text_inputs(tokens),
            {"text_embeds": embeds},
            tokens,
            # no vectors of a language model ship, and ranges that random ones observe may cut those that it makes
            quantizer="dynamic" if isinstance(tokens, VectorPreprocess) else "search",
            promises=attention_promises(text),
            prefix="text.",
        ),
    }
    if settings.regions:
        regions = _regions(settings.regions(image), towers["image"], len(state["image.queries"]) - 1)
        towers = {"regions": regions, **towers, "image": replace(towers["image"], cut_from="regions")}
    return Net(
        name="clip",
        source=Source(
            net="clip",
            model=hub.name(checkpoint.path),
            weights=weights_sha256(checkpoint.path),
            license=settings.license,
            notes="; ".join((f"layout {name}: {layout.title}", *filter(None, (layout.note,)))),
        ),
        tasks=("classify", "embed", "raw"),
        towers=towers,
        files={"tokenizer.json": settings.tokenizer} if settings.tokenizer else {},
        classifier=DefaultClassifier(templates=settings.templates, head=head(state)),
        layout=layout,
        folded=fold,
    )


def _regions(module: nn.Module, image: Tower, count: int) -> Tower:
    """Of ``count`` regions in a picture. The weights belong to ``image``."""
    assert isinstance(image.preprocess, ImagePreprocess)
    (embeds,) = image.outputs.values()
    outputs = {
        "class_embeds": float32("B", count, embeds.shape[1]),
        "boxes": float32("B", count, 4),
        "objectness": float32("B", count),
        "image_embeds": embeds,
    }
    compared = partial(summary, side=image.preprocess.size[0])
    return replace(image, module=module, outputs=outputs, prefix="", summary=compared)


def summary(outputs: Arrays, side: int) -> Arrays:
    """The rows by which two graphs of regions are compared: boxes relative to the input, in one row for a picture."""
    return {**outputs, "boxes": outputs["boxes"].reshape(len(outputs["boxes"]), -1) / side}


def head(state: Mapping[str, Tensor]) -> Plugin:
    """Sigmoid for a checkpoint with a bias of the logits, else cosine."""
    scale = float(state["logit_scale"].exp())
    if not 0 < scale < 1e6:
        raise UnknownCheckpoint(
            f"logit_scale is {float(state['logit_scale']):g}; expected a number whose exponential is in (0, 1e6)"
        )
    if "logit_bias" in state:
        return Plugin(name="sigmoid", params={"scale": scale, "bias": float(state["logit_bias"])})
    return Plugin(name="cosine", params={"scale": scale})


NETS.register("clip")(NetPlugin(recognise, load, partial(load, fold=False), with_detector))
