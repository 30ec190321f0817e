"""The graph `attribution`: how much each token of a text contributes to its cosine with a picture.

It is the text tower with its backward pass; `calmclip.export.towers.attribution` has the formula. Its weights are those
of the text graph, and in an INT8 bundle the INT8 ones (`calmclip.export.borrow`), so that it adds little to a bundle.
The task `explain` then has the method gradient. It is the last adapter, because others would change the text tower and
not this one. The built-in model ships the graph.

Source: CLIP4DM, Nam et al. 2024 (arXiv 2412.18404), for signed gradient x attention.
"""

from dataclasses import replace

from pydantic import Field

from calmclip.export.adapters import ADAPTERS, Adapter, Context, with_note
from calmclip.export.nets import Net, Tower
from calmclip.export.nets.common.attribution import LAYERS, ROLE, borrower
from calmclip.models.bundle.manifest import FrozenModel, TextPreprocess
from calmclip.models.errors import BadRequest


class Params(FrozenModel):
    on: bool = Field(
        description="add the graph attribution, the backward pass of the text tower: explain then has gradient"
    )
    layers: int | None = Field(
        default=None, ge=1, description="with --attribution: how many of the last layers count (default: 1)"
    )


def adapt(net: Net, params: Params, context: Context) -> Net:
    """``net`` itself if the switch is off. Raises `BadRequest` for a net without an image tower and a text tower whose
    tokens attention alone mixes, and for more layers than the text tower has."""
    if not params.on:
        return net
    if ROLE in net.towers:
        raise BadRequest("attribution: the net has the graph already; expected one --attribution, so remove the other")
    if ROLE in net.offers:
        if params.layers not in (None, LAYERS):
            raise BadRequest(f"attribution: layers is {params.layers}; the graph of {net.source.model} has {LAYERS}")
        net = net.offers[ROLE](net)
    else:
        net = replace(net, towers={**net.towers, ROLE: _traced(net, params.layers or LAYERS)})
    return with_note(net, f"attribution of the last {params.layers or LAYERS} layers of the text tower")


def _traced(net: Net, layers: int) -> Tower:
    """Raises `BadRequest`."""
    from calmclip.export.towers.attribution import Attribution, attending, why_not

    image, text = (net.towers.get(role) for role in ("image", "text"))
    if image is None or text is None or net.folded or not isinstance(text.preprocess, TextPreprocess):
        raise _unfit(net, "it has no image tower and text tower of modules that read pictures and texts")
    if "image_embeds" not in image.outputs or "text_embeds" not in text.outputs:
        raise _unfit(net, "its towers have no vectors of pictures and texts")
    if reason := why_not(text.module):
        raise _unfit(net, reason)
    if layers > (depth := len(attending(text.module))):
        raise BadRequest(f"attribution: layers is {layers}; expected at most {depth}, the layers of the text tower")
    tower = borrower(text, image.outputs["image_embeds"])
    return replace(tower, module=Attribution(text.module, layers))


def _unfit(net: Net, reason: str) -> BadRequest:
    return BadRequest(
        f"attribution does not apply to {net.source.model}: {reason}; expected vectors of pictures and texts, and a "
        "text tower in which attention alone mixes tokens"
    )


ADAPTERS.register("attribution")(
    Adapter(Params, adapt, {"--attribution": "on", "--attribution-layers": "layers"}, last=True)
)
