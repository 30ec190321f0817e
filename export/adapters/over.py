"""The image tower of another checkpoint in the place of the net's: weights that were fine-tuned in that tower alone.

Source: DIVA, Wang et al. 2024 (arXiv 2407.20171); un2CLIP, Li et al. 2025 (arXiv 2505.24517). The text tower and the
temperature stay.
"""

from collections.abc import Callable
from pathlib import Path

from pydantic import Field
from torch import Tensor

from calmclip.export import layouts
from calmclip.export.adapters import ADAPTERS, Adapter, Context, noted, put, tensors
from calmclip.export.adapters._same import State, of_a_layout, same
from calmclip.export.checkpoints import hub, read
from calmclip.export.nets import Net
from calmclip.models.bundle.manifest import FrozenModel


class Params(FrozenModel):
    checkpoint: Path = Field(description="a checkpoint whose image tower takes the place of this one's")


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` for a net that is no CLIP; `UnknownCheckpoint` naming the file and the tensor that does not
    fit."""
    layout, said = of_a_layout(net, "over")
    path = params.checkpoint
    put(net, over(tensors(net), layouts.translate_image(layout, read(path, context.weights)), str(path), said))
    return noted(net, f"image tower of {hub.name(path)}", over=path)


def over(base: State, image: State, what: str, said: Callable[[str], str] = str) -> dict[str, Tensor]:
    """``base`` with the tensors of ``image`` under ``image.``; the projection may be absent there. Raises as `same`."""
    wanted = {name: tensor for name, tensor in base.items() if name.startswith("image.")}
    given = {name: tensor for name, tensor in image.items() if name.startswith("image.")}
    for name, tensor in wanted.items():
        if name.startswith("image.projection."):
            given.setdefault(name, tensor)
    same(wanted, given, what, said)
    return {**base, **given}


ADAPTERS.register("over")(Adapter(Params, adapt, {"--over": "checkpoint"}))
