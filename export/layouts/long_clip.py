"""Long-CLIP: OpenAI's names and a second table of positions, context 248.

Source: Zhang et al. 2024, Long-CLIP (arXiv 2403.15378), section 3.1: the first 20 positions stay as they were trained;
the second table holds the others, stretched and trained again. The activation is QuickGELU, as in the CLIP that it is
tuned from.
"""

import torch
from torch import Tensor

from calmclip.export.layouts import LAYOUTS, Layout, Misfit, Rule
from calmclip.export.layouts.common import openai_clip

KEEP = 20
SECOND_TABLE = Rule("positional_embedding_res", "text.positions_res")


def fold_positions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows 0-19 of the first table, the others of the second, both [C, W]."""
    if "text.positions_res" not in state:
        return state
    folded = dict(state)
    first, second = folded["text.positions"], folded.pop("text.positions_res")
    if first.shape != second.shape:
        raise Misfit("{} and {} must have the same shape", "text.positions", "text.positions_res")
    return {**folded, "text.positions": torch.cat([first[:KEEP], second[KEEP:]])}


LAYOUTS.register("long_clip")(
    Layout(
        title="Long-CLIP",
        keys=("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight", "positional_embedding_res"),
        without=("{rest}.gate.weight",),
        rules=(*openai_clip.IMAGE, *openai_clip.text(), *openai_clip.SCALARS, SECOND_TABLE),
        required=(*openai_clip.REQUIRED, "text.positions_res"),
        after_read=fold_positions,
        facts=("activation",),
        settings=openai_clip.quick_gelu_settings,
    )
)
