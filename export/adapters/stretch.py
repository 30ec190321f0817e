"""A longer context: the text tower's table of positions, stretched.

Source: Long-CLIP, Zhang et al. 2024 (arXiv 2403.15378), section 3.1.
"""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from calmclip.export.adapters import ADAPTERS, Adapter, Context, noted
from calmclip.export.nets import Net, reads
from calmclip.models.bundle.manifest import FrozenModel, TextPreprocess
from calmclip.models.errors import BadRequest

KEEP = 20  # positions that stay as they are: most captions are no longer


class Params(FrozenModel):
    tokens: int = Field(ge=2, description="tokens of context to stretch the table of positions to: 248")


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` as `stretch`; for a net without a table of positions, as without a text tower; and for a
    BERT, of whose table only a part was ever trained on captions."""
    tower = net.towers.get("text")
    if net.folded or tower is None or not isinstance(getattr(tower.module, "positions", None), nn.Parameter):
        raise BadRequest(f"stretch: {net.source.model} has no text tower with a table of positions to stretch")
    if hasattr(tower.module, "types"):
        raise BadRequest("stretch: the text tower is a BERT, whose table is longer than its context already")
    assert isinstance(tower.preprocess, TextPreprocess)
    before = tower.module.positions
    tower.module.positions = nn.Parameter(stretch(before, params.tokens), requires_grad=False)
    tokens = tower.preprocess.model_copy(update={"context": params.tokens})
    longer = replace(tower, preprocess=tokens, inputs=reads(tokens))
    net = replace(net, towers={**net.towers, "text": longer})
    return noted(net, f"positions stretched from {len(before)} to {params.tokens}")


def stretch(table: Tensor, tokens: int, keep: int = KEEP) -> Tensor:
    """``table`` [C, W], made to ``tokens`` rows: keep + ratio (C - keep).

    The first ``keep`` rows stay; those that follow are interpolated, ratio - 1 between two neighbours, and the last
    goes on with the step before it. Raises `BadRequest` for a number of ``tokens`` that no whole ratio gives.
    """
    rest = len(table) - keep
    ratio, left = divmod(tokens - keep, rest) if rest > 1 else (0, 1)
    if left or ratio < 1:
        fitting = ", ".join(str(keep + rest * n) for n in (2, 3, 4)) if rest > 1 else "none"
        raise BadRequest(f"stretch: a table of {len(table)} positions cannot become {tokens}; it can become {fitting}")
    tail = table[keep:].double()
    following = torch.cat([tail[1:], (2 * tail[-1] - tail[-2])[None]])
    shares = torch.arange(ratio, dtype=torch.float64)[:, None] / ratio
    between = tail[:, None] * (1 - shares) + following[:, None] * shares
    return torch.cat([table[:keep], between.flatten(0, 1).to(table.dtype)])


ADAPTERS.register("stretch")(Adapter(Params, adapt, {"--stretch": "tokens"}))
