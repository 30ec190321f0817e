"""The image tower of another checkpoint replaces the net's: for weights that were fine-tuned in that tower alone.

Source: DIVA, Wang et al. 2024 (arXiv 2407.20171); un2CLIP, Li et al. 2025 (arXiv 2505.24517). The text tower and the
temperature stay.
"""

from collections.abc import Callable
from pathlib import Path

from pydantic import Field
from torch import Tensor

from calmclip.export import layouts
from calmclip.export.adapters import ADAPTERS, Adapter, Context, load_tensors, tensors, with_note
from calmclip.export.adapters._tensors import State, check_same, layout_of
from calmclip.export.checkpoints import hub, read
from calmclip.export.nets import Net
from calmclip.models.bundle.manifest import FrozenModel


class Params(FrozenModel):
    checkpoint: Path = Field(description="a checkpoint whose image tower takes the place of this one's")


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` for a net that is no CLIP; `UnknownCheckpoint` with the file and the tensor that does not
    fit."""
    layout, name_of = layout_of(net, "over")
    path = params.checkpoint
    image = layouts.translate_image(layout, read(path, context.weights))
    load_tensors(net, over(tensors(net), image, str(path), name_of))
    return with_note(net, f"image tower of {hub.name(path)}", over=path)


def over(base: State, other: State, file: str, name_of: Callable[[str], str] = str) -> dict[str, Tensor]:
    """``base`` with the ``image.`` tensors of ``other``, which may lack the projection. Raises as `check_same`."""
    image = {name: tensor for name, tensor in base.items() if name.startswith("image.")}
    new = {name: tensor for name, tensor in image.items() if name.startswith("image.projection.")}
    new |= {name: tensor for name, tensor in other.items() if name.startswith("image.")}
    check_same(image, new, file, name_of)
    return {**base, **new}


ADAPTERS.register("over")(Adapter(Params, adapt, {"--over": "checkpoint"}))
