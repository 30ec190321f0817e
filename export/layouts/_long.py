"""Long-CLIP's two tables of positions, as one.

Source: Zhang et al. 2024, Long-CLIP (arXiv 2403.15378), section 3.1: the first 20 positions are kept as they were
trained, those that follow are stretched and trained anew.
"""

import torch
from torch import Tensor

from calmclip.export.layouts import Misfit, Rule

KEEP = 20
RULE = Rule("positional_embedding_res", "text.positions_res")


def fold_positions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows 0-19 of the first table, the others of the second, both [C, W]."""
    rest = state.get("text.positions_res")
    if rest is None:
        return state
    first = state["text.positions"]
    if first.shape != rest.shape:
        raise Misfit("{} and {} must have one shape", "text.positions", "text.positions_res")
    folded = {**state, "text.positions": torch.cat([first[:KEEP], rest[KEEP:]])}
    del folded["text.positions_res"]
    return folded
