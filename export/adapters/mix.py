"""A mixture of two checkpoints of the same shapes: (1 - alpha) of the net and alpha of the other, tensor by tensor.

Source: Wortsman et al. 2022 (arXiv 2109.01903), equation 1. The temperature is mixed as its logarithm, which is what a
checkpoint holds (`logit_scale`).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field
from torch import Tensor

from calmclip.export import layouts
from calmclip.export.adapters import ADAPTERS, Adapter, Context, noted, put, tensors
from calmclip.export.adapters._same import State, of_a_layout, same
from calmclip.export.checkpoints import hub, read
from calmclip.export.nets import Net
from calmclip.export.nets.clip import head
from calmclip.models.bundle.manifest import FrozenModel, Plugin
from calmclip.models.errors import BadRequest, UnknownCheckpoint


class Params(FrozenModel):
    checkpoint: Path = Field(description="a checkpoint of the same shapes to mix with this one, by --alpha")
    alpha: float = Field(ge=0, le=1, description="the share of --mix: 0 is this checkpoint, 1 the other")


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises as `over.adapt`."""
    _, said = of_a_layout(net, "mix")
    other = read(path := params.checkpoint, context.weights)
    if (found := layouts.find(other)) is None:
        raise UnknownCheckpoint(f"{path}: its tensors are of no layout in the table")
    state = layouts.translate(found[1], other)
    towers = {name: tensor for name, tensor in state.items() if name.startswith(("image.", "text."))}
    put(net, mix(tensors(net), towers, params.alpha, str(path), said))
    assert net.classifier is not None  # of a CLIP
    assert net.classifier.head is not None
    mixed = temperature(net.classifier.head, head(state), params.alpha, str(path))
    net = replace(net, classifier=net.classifier.model_copy(update={"head": mixed}))
    return noted(net, f"{params.alpha:g} of {hub.name(path)} mixed in", mix=path)


def mix(base: State, other: State, alpha: float, what: str, said: Callable[[str], str] = str) -> dict[str, Tensor]:
    """(1 - alpha) base + alpha other, each tensor in float64; at 0 and 1 the bits of one side. Integers are the base's.

    Neither argument is changed. Raises as `same`, and `BadRequest` for an ``alpha`` outside 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise BadRequest(f"alpha is {alpha}; expected a share from 0 to 1")
    same(base, other, what, said)
    return {name: _between(tensor, other[name], alpha) for name, tensor in base.items()}


def temperature(base: Plugin, other: Plugin, alpha: float, what: str) -> Plugin:
    """Two heads' scales become their geometric mean, weighted, and biases their mean. Raises `UnknownCheckpoint` for
    heads of two kinds."""
    if base.name != other.name:
        raise UnknownCheckpoint(f"{what} is scored by the head {other.name}; the base by {base.name}")
    if alpha in (0, 1):
        return other if alpha else base
    ends = [np.array([np.log(head.params["scale"]), head.params.get("bias", 0.0)]) for head in (base, other)]
    log, bias = (1 - alpha) * ends[0] + alpha * ends[1]
    mixed = {"scale": float(np.float32(np.exp(log))), "bias": float(bias)}
    return base.model_copy(update={"params": {name: mixed[name] for name in base.params}})


def _between(one: Tensor, other: Tensor, alpha: float) -> Tensor:
    if alpha == 0 or not one.is_floating_point():
        return one
    if alpha == 1:
        return other.to(one.dtype)
    return ((1 - alpha) * one.double() + alpha * other.double()).to(one.dtype)


ADAPTERS.register("mix")(Adapter(Params, adapt, {"--mix": "checkpoint", "--alpha": "alpha"}))
