"""CLIP-MoE: Long-CLIP's names, and four experts in place of the MLP in the last blocks, or in all.

Source: Zhang et al. 2024, CLIP-MoE (arXiv 2409.19291); p = softmax(gate(ln_2(x))), the two best renormalized.
A block with a gate has experts. The recipe says how they are computed (``experts``).
"""

from collections.abc import Mapping

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Settings, long_clip, rename
from calmclip.export.layouts.common import openai_clip

_EXPERTS = {
    "gate.weight": "mlp.gate.weight",
    "experts.{e}.c_fc.{p}": "mlp.experts.{e}.up.{p}",
    "experts.{e}.c_proj.{p}": "mlp.experts.{e}.down.{p}",
}


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    facts = checkpoint.facts
    return openai_clip.settings(state, facts.activation or "quick_gelu", routed=facts.experts == "routed")


LAYOUTS.register("clip_moe")(
    Layout(
        title="CLIP-MoE",
        keys=("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight", "{rest}.gate.weight"),
        rules=(
            *openai_clip.IMAGE,
            *openai_clip.text(),
            *openai_clip.SCALARS,
            *rename("visual.transformer.resblocks.{i}", "image.blocks.{i}", _EXPERTS),
            *rename("transformer.resblocks.{i}", "text.blocks.{i}", _EXPERTS),
            long_clip.SECOND_TABLE,
        ),
        required=openai_clip.REQUIRED,
        after_read=long_clip.fold_positions,
        facts=("activation", "experts"),
        settings=settings,
    )
)
