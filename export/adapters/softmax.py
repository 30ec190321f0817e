"""Attention's softmax where the recipe asks for another than the checkpoint was trained with: measured, then refused.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), equation 4. A softmax leaves no trace in the tensors, so a wrong one
gives wrong answers without an error. What it would do is measured in torch, on samples that ship.
"""

from pydantic import Field, field_validator
from torch import nn

from calmclip.export import parity
from calmclip.export.adapters import ADAPTERS, Adapter, Context, noted
from calmclip.export.nets import Net, ready
from calmclip.export.towers.attention import Softmax
from calmclip.export.towers.transformer import Attention
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest


class Params(FrozenModel):
    kind: str = Field(description="softmax of attention: vanilla or clipped(gamma:zeta), where the configs lack it")
    force: bool = Field(False, description="take the --softmax though the checkpoint was trained with another")

    @field_validator("kind")
    @classmethod
    def _parsed(cls, kind: str) -> str:
        return str(Softmax.parse(kind))


def adapt(net: Net, params: Params, context: Context) -> Net:
    """``net`` as it is where the softmax is its own already. Raises `BadRequest`: it is another than the checkpoint's
    and not forced, with the mean cosine of the two answers; or the net has no attention of ours."""
    wanted = Softmax.parse(params.kind)
    layers = {role: attention(tower.module) for role, tower in net.towers.items()}
    if not any(layers.values()):
        raise BadRequest(f"softmax {wanted} does not apply to {net.source.model}: none of its attention is ours to set")
    others = {role: {one.softmax for one in found} - {wanted} for role, found in layers.items()}
    if not any(others.values()):
        return net
    own = ", ".join(sorted({str(one) for found in others.values() for one in found}))
    cosine = min(_cosine(net, role, wanted, context) for role in others if others[role])
    told = f"{wanted} instead of {own}, mean cosine {cosine:.4f} to the checkpoint's own answers"
    if not params.force:
        raise BadRequest(
            f"{net.source.model} was trained with another softmax than the one asked for ({told}); fine-tune it with "
            f'calmclip train, write "attn_softmax": "{wanted}" into its config.json if it was trained so, or pass '
            "--force"
        )
    context.say(f"softmax forced: {told}")
    for tower in net.towers.values():
        put(tower.module, wanted)
    return noted(net, f"softmax forced: {told}")


def attention(module: nn.Module) -> list[Attention]:
    return [inner for inner in module.modules() if isinstance(inner, Attention)]


def put(module: nn.Module, softmax: Softmax) -> None:
    for inner in attention(module):
        inner.softmax = softmax


def _cosine(net: Net, role: str, wanted: Softmax, context: Context) -> float:
    """The least of its outputs, each the mean over all rows; the net is left as it was."""
    tower = ready(net).towers[role]
    layers, feeds, run = attention(tower.module), list(context.feeds(net, tower)), parity.torch_run(tower)
    own, before = [inner.softmax for inner in layers], parity.kept(run, feeds)
    put(tower.module, wanted)
    try:
        found = parity.compare(before, run, feeds, tower.summary)
    finally:
        for inner, softmax in zip(layers, own, strict=True):
            inner.softmax = softmax
    return min(numbers["cosine"] for numbers in found.values())


ADAPTERS.register("softmax")(Adapter(Params, adapt, {"--softmax": "kind", "--force": "force"}))
