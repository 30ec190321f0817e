"""Attention's softmax where the recipe asks for another than the checkpoint was trained with: measured, then refused.

A softmax leaves no trace in the tensors, so a wrong one gives wrong answers without an error. What it would do is
measured in torch, on samples that ship, before anything is traced.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from calmclip.export import parity
from calmclip.export.checkpoints import Weights
from calmclip.export.nets import Net, Tower
from calmclip.export.towers.attention import Softmax
from calmclip.export.towers.transformer import Attention
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Arrays

Say = Callable[[str], None]


def asked(net: Net, weights: Weights, feeds: Callable[[Tower], Sequence[Arrays]], say: Say = lambda line: None) -> Net:
    """``net`` with the softmax of ``weights``: as it is where that is its own already, or nothing is asked.

    ``feeds(tower)``: what both are compared on. With ``force`` the modules are changed in place, and the source says
    so. Raises `BadRequest`: the softmax is another than the checkpoint's, with the mean cosine of the two answers; or
    the net has no attention of ours.
    """
    if weights.softmax is None:
        return net
    wanted = Softmax.parse(weights.softmax)
    layers = {role: attention(tower.module) for role, tower in net.towers.items()}
    if not any(layers.values()):
        raise BadRequest(f"softmax {wanted} does not apply to {net.source.model}: none of its attention is ours to set")
    others = {role: {one.softmax for one in found} - {wanted} for role, found in layers.items()}
    if not any(others.values()):
        return net
    own = ", ".join(sorted({str(one) for found in others.values() for one in found}))
    cosine = min(_cosine(net.towers[role], wanted, list(feeds(net.towers[role]))) for role in others if others[role])
    told = f"{wanted} instead of {own}, mean cosine {cosine:.4f} to the checkpoint's own answers"
    if not weights.force:
        raise BadRequest(
            f"{net.source.model} was trained with another softmax than the one asked for ({told}); fine-tune it with "
            f'calmclip train, write "attn_softmax": "{wanted}" into its config.json if it was trained so, or pass '
            "--force"
        )
    say(f"softmax forced: {told}")
    for role in others:
        put(net.towers[role].module, wanted)
    notes = "; ".join(filter(None, (net.source.notes, f"softmax forced: {told}")))
    return replace(net, source=net.source.model_copy(update={"notes": notes}))


def attention(module: nn.Module) -> list[Attention]:
    return [inner for inner in module.modules() if isinstance(inner, Attention)]


def put(module: nn.Module, softmax: Softmax) -> None:
    for inner in attention(module):
        inner.softmax = softmax


def _cosine(tower: Tower, wanted: Softmax, feeds: Sequence[Arrays]) -> float:
    """The least of its outputs, each the mean over all rows; the module is left as it was."""
    layers = attention(tower.module)
    own, run = [inner.softmax for inner in layers], parity.torch_run(tower)
    before = parity.kept(run, feeds)
    put(tower.module, wanted)
    try:
        found = parity.compare(before, run, feeds, tower.summary)
    finally:
        for inner, softmax in zip(layers, own, strict=True):
            inner.softmax = softmax
    return min(numbers["cosine"] for numbers in found.values())
