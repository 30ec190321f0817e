"""A mixture of two checkpoints of the same shapes: (1 - alpha) of the net and alpha of the other, tensor by tensor.

Source: Wortsman et al. 2022 (arXiv 2109.01903), equation 1. The temperature is mixed as its logarithm, as a checkpoint
holds it (`logit_scale`).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field
from torch import Tensor

from calmclip.export.adapters import ADAPTERS, Adapter, Context, load_tensors, tensors, with_note
from calmclip.export.adapters._tensors import State, check_same, layout_of, read_clip
from calmclip.export.checkpoints import hub
from calmclip.export.nets import Net
from calmclip.export.nets.clip import head
from calmclip.models.bundle.manifest import FrozenModel, Plugin
from calmclip.models.errors import BadRequest, UnknownCheckpoint


class Params(FrozenModel):
    checkpoint: Path = Field(description="a checkpoint of the same shapes to mix with this one, by --alpha")
    alpha: float = Field(ge=0, le=1, description="the weight of --mix: 0 is this checkpoint, 1 the other")


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises as `over.adapt`."""
    _, name_of = layout_of(net, "mix")
    state = read_clip(path := params.checkpoint, context.weights)
    towers = {name: tensor for name, tensor in state.items() if name.startswith(("image.", "text."))}
    load_tensors(net, mix(tensors(net), towers, params.alpha, str(path), name_of))
    assert net.classifier is not None  # of a CLIP
    assert net.classifier.head is not None
    mixed = mix_heads(net.classifier.head, head(state), params.alpha, str(path))
    net = replace(net, classifier=net.classifier.model_copy(update={"head": mixed}))
    return with_note(net, f"{params.alpha:g} of {hub.name(path)} mixed in", mix=path)


def mix(base: State, other: State, alpha: float, file: str, name_of: Callable[[str], str] = str) -> dict[str, Tensor]:
    """(1 - alpha) base + alpha other, each tensor in float64; at 0 and 1 the bits of one side. Integers are the base's.

    Neither argument is changed. Raises as `check_same`, and `BadRequest` for an ``alpha`` outside 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise BadRequest(f"alpha is {alpha}; expected a number from 0 to 1")
    check_same(base, other, file, name_of)
    return {name: _interpolate(tensor, other[name], alpha) for name, tensor in base.items()}


def mix_heads(base: Plugin, other: Plugin, alpha: float, file: str) -> Plugin:
    """The weighted geometric mean of two heads' scales, and the weighted mean of their biases. Raises
    `UnknownCheckpoint` for heads of two kinds."""
    if base.name != other.name:
        raise UnknownCheckpoint(f"{file} is scored by the head {other.name}; the base by {base.name}")
    if alpha in (0, 1):
        return other if alpha else base
    ends = [np.array([np.log(head.params["scale"]), head.params.get("bias", 0.0)]) for head in (base, other)]
    log, bias = (1 - alpha) * ends[0] + alpha * ends[1]
    mixed = {"scale": float(np.float32(np.exp(log))), "bias": float(bias)}
    return base.model_copy(update={"params": {name: mixed[name] for name in base.params}})


def _interpolate(base: Tensor, other: Tensor, alpha: float) -> Tensor:
    if alpha == 0 or not base.is_floating_point():
        return base
    if alpha == 1:
        return other.to(base.dtype)
    return ((1 - alpha) * base.double() + alpha * other.double()).to(base.dtype)


ADAPTERS.register("mix")(Adapter(Params, adapt, {"--mix": "checkpoint", "--alpha": "alpha"}))
