"""Another softmax of attention than the checkpoint was trained with: its effect is measured, and it is refused.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), equation 4. No tensor tells the softmax, so a wrong softmax gives
wrong answers without an error. Its effect is measured in torch, on the samples that ship.
"""

import itertools

from pydantic import Field, field_validator
from torch import nn

from calmclip.export import parity
from calmclip.export.adapters import ADAPTERS, Adapter, Context, with_note
from calmclip.export.nets import Net, ready
from calmclip.export.towers.attention import Softmax
from calmclip.export.towers.transformer import Attention
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest


class Params(FrozenModel):
    kind: str = Field(description="softmax of attention: vanilla or clipped(gamma:zeta), where the configs lack it")
    force: bool = Field(default=False, description="take the --softmax though the checkpoint was trained with another")

    @field_validator("kind")
    @classmethod
    def _parsed(cls, kind: str) -> str:
        return str(Softmax.parse(kind))


def adapt(net: Net, params: Params, context: Context) -> Net:
    """``net`` itself if it already has this softmax. Raises `BadRequest` for another softmax without ``force``, with
    the mean cosine of the two answers, and for a net without attention modules of ours."""
    target = Softmax.parse(params.kind)
    layers = {role: attention_layers(tower.module) for role, tower in net.towers.items()}
    if not any(layers.values()):
        raise BadRequest(
            f"softmax {target} does not apply to {net.source.model}: it has no attention whose softmax can be set"
        )
    trained = {role: {str(layer.softmax) for layer in layers[role] if layer.softmax != target} for role in layers}
    if not any(trained.values()):
        return net
    cosine = min(_cosine(net, role, target, context) for role in trained if trained[role])
    before = ", ".join(sorted(set().union(*trained.values())))
    effect = f"{target} instead of {before}, mean cosine {cosine:.4f} to the checkpoint's own answers"
    if not params.force:
        raise BadRequest(
            f"{net.source.model} was trained with another softmax ({effect}); fine-tune it with calmclip train, write "
            f'"attn_softmax": "{target}" into its config.json if it was trained with that softmax, or pass --force'
        )
    context.say(f"softmax forced: {effect}")
    for layer in itertools.chain(*layers.values()):
        layer.softmax = target
    return with_note(net, f"softmax forced: {effect}")


def attention_layers(module: nn.Module) -> list[Attention]:
    return [inner for inner in module.modules() if isinstance(inner, Attention)]


def _cosine(net: Net, role: str, target: Softmax, context: Context) -> float:
    """The least mean cosine of the outputs of one tower, over all rows. The net does not change."""
    tower = ready(net).towers[role]
    layers, feeds, run = attention_layers(tower.module), list(context.feeds(net, tower)), parity.torch_run(tower)
    trained, before = [layer.softmax for layer in layers], parity.stored(run, feeds)
    try:
        for layer in layers:
            layer.softmax = target
        outputs = parity.compare(before, run, feeds, tower.summary)
    finally:
        for layer, softmax in zip(layers, trained, strict=True):
            layer.softmax = softmax
    return min(numbers["cosine"] for numbers in outputs.values())


ADAPTERS.register("softmax")(Adapter(Params, adapt, {"--softmax": "kind", "--force": "force"}))
