"""Checkpoints of the CLIP family, whatever their layout: tensors translated to our names, towers of `export.towers`.

Source: Radford et al. 2021 (arXiv 2103.00020); each layout in `calmclip.export.layouts` names its own.
Graphs: image pixels [B, 3, H, W] -> image_embeds [B, D]; text ids [B, T] -> text_embeds [B, D]; unit rows.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from calmclip.export import layouts
from calmclip.export.checkpoints import Checkpoint, Weights, hub, read
from calmclip.export.checkpoints.weights import NoWeights, weight_files, weights_sha256
from calmclip.export.nets import NETS, Net, NetPlugin, Tower, bucketed, reads
from calmclip.models.bundle.manifest import DefaultClassifier, Plugin, Source
from calmclip.models.bundle.manifest import Tensor as Spec
from calmclip.models.errors import UnknownCheckpoint
from calmclip.models.ops.spec import SOFTMAX


def recognise(checkpoint: str) -> bool:
    """Raises `UnknownCheckpoint` for weights that cannot be read, or lack what decides their layout."""
    try:
        weight_files(Path(checkpoint))
    except (NoWeights, OSError):
        return False
    found = read(checkpoint)
    if layouts.find(found):
        return True
    if why := layouts.nearest(found):
        raise UnknownCheckpoint(f"{checkpoint}: {why}")
    return False


def load(checkpoint: str, weights: Weights = Weights(), *, fold: bool = True) -> Net:  # noqa: B008 - frozen
    """Raises `UnknownCheckpoint` naming the file and the tensor or setting that is missing or not supported."""
    found = read(checkpoint, weights)
    fitting = layouts.find(found)
    if fitting is None:
        raise UnknownCheckpoint(f"{checkpoint}: its tensors are of no layout in the table")
    name, layout = fitting
    state = layouts.translate(layout, found)
    settings = layouts.settings(layout, found, state)
    tokens = bucketed(settings.tokens)
    image = layouts.fill(layout, found, state, "image.", settings.image, fold=fold)
    text = layouts.fill(layout, found, state, "text.", settings.text, fold=fold)
    embeds = Spec(dtype="float32", shape=("B", layouts.dim(layout, found, state)))
    return Net(
        name="clip",
        source=Source(
            net="clip",
            model=_name(found),
            weights=weights_sha256(found.path),
            license=settings.license,
            notes="; ".join((f"layout {name}: {layout.title}", *filter(None, (layout.note,)))),
        ),
        tasks=("classify", "embed", "raw"),
        towers={
            "image": Tower(
                image,
                {settings.pixels.input: Spec(dtype="float32", shape=("B", 3, *settings.pixels.size))},
                {"image_embeds": embeds},
                settings.pixels,
                quantizer="search",
                promises=_attention(image),
                prefix="image.",
            ),
            "text": Tower(
                text,
                reads(tokens),
                {"text_embeds": embeds},
                tokens,
                quantizer="search",
                promises=_attention(text),
                prefix="text.",
            ),
        },
        files={"tokenizer.json": settings.tokenizer},
        classifier=DefaultClassifier(templates=settings.templates, head=head(state)),
        layout=layout,
        folded=fold,
    )


def head(state: Mapping[str, Tensor]) -> Plugin:
    scale = float(state["logit_scale"].exp())
    if not 0 < scale < 1e6:
        raise UnknownCheckpoint(f"logit_scale is {float(state['logit_scale']):g}; its exponential makes no temperature")
    if "logit_bias" in state:
        return Plugin(name="sigmoid", params={"scale": scale, "bias": float(state["logit_bias"])})
    return Plugin(name="cosine", params={"scale": scale})


def _attention(tower: nn.Module) -> dict[str, int]:
    """One Softmax for each module of ours that attends; towers of libraries promise nothing."""
    number = sum(getattr(module, "attends", 0) for module in tower.modules())
    return {SOFTMAX.name: number} if number else {}


def _name(checkpoint: Checkpoint) -> str:
    return hub.name(checkpoint.path)


NETS.register("clip")(NetPlugin(recognise, load, partial(load, fold=False)))
