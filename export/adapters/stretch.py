"""A longer context: the text tower's table of positions, stretched.

Source: Long-CLIP, Zhang et al. 2024 (arXiv 2403.15378), section 3.1.
"""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from calmclip.export.adapters import ADAPTERS, Adapter, Context, with_note
from calmclip.export.nets import Net, text_inputs
from calmclip.models.bundle.manifest import FrozenModel, TextPreprocess
from calmclip.models.errors import BadRequest

KEEP = 20  # positions that stay as they are: most captions are no longer


class Params(FrozenModel):
    tokens: int = Field(ge=2, description="tokens of context to stretch the table of positions to: 248")


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` as `stretch`; for a net without a text tower or a table of positions; and for a BERT, whose
    table was trained on captions only in part."""
    tower = net.towers.get("text")
    table = getattr(tower.module, "positions", None) if tower and not net.folded else None
    if tower is None or not isinstance(table, nn.Parameter):
        raise BadRequest(f"stretch: {net.source.model} has no text tower with a table of positions to stretch")
    if hasattr(tower.module, "types"):
        raise BadRequest("stretch: the text tower is a BERT, whose table is longer than its context already")
    assert isinstance(tower.preprocess, TextPreprocess)
    tower.module.positions = nn.Parameter(stretch(table, params.tokens), requires_grad=False)
    tokens = tower.preprocess.model_copy(update={"context": params.tokens})
    longer = replace(tower, preprocess=tokens, inputs=text_inputs(tokens))
    net = replace(net, towers={**net.towers, "text": longer})
    return with_note(net, f"positions stretched from {len(table)} to {params.tokens}")


def stretch(table: Tensor, tokens: int, keep: int = KEEP) -> Tensor:
    """``table`` [C, W] -> ``tokens`` = keep + ratio (C - keep) rows.

    The first ``keep`` rows stay. The others are interpolated, with ratio - 1 new rows between two neighbours; the last
    is extrapolated with the step before it. Raises `BadRequest` if ``tokens`` gives no integer ratio.
    """
    tail_rows = len(table) - keep
    ratio, remainder = divmod(tokens - keep, tail_rows) if tail_rows > 1 else (0, 1)
    if remainder or ratio < 1:
        fitting = ", ".join(str(keep + tail_rows * n) for n in (2, 3, 4)) if tail_rows > 1 else "none"
        raise BadRequest(f"stretch: a table of {len(table)} positions cannot become {tokens}; it can become {fitting}")
    tail = table[keep:].double()
    following = torch.cat([tail[1:], (2 * tail[-1] - tail[-2])[None]])
    weights = torch.arange(ratio, dtype=torch.float64)[:, None] / ratio
    between = tail[:, None] * (1 - weights) + following[:, None] * weights
    return torch.cat([table[:keep], between.flatten(0, 1).to(table.dtype)])


ADAPTERS.register("stretch")(Adapter(Params, adapt, {"--stretch": "tokens"}))
