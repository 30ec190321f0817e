"""CLIP-MoE: Long-CLIP's names, and in the last blocks, or all, four experts where the MLP was.

Source: Zhang et al. 2024, CLIP-MoE (arXiv 2409.19291); p = softmax(gate(ln_2(x))), the two best renormalised.
A block is of experts where it has a gate. How they are computed the recipe says (``experts``).
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Rule, Settings, _long, _openai, long_clip


def experts(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{theirs}.{{i}}.gate.weight", f"{ours}.blocks.{{i}}.mlp.gate.weight"),
        Rule(f"{theirs}.{{i}}.experts.{{e}}.c_fc.{{p}}", f"{ours}.blocks.{{i}}.mlp.experts.{{e}}.up.{{p}}"),
        Rule(f"{theirs}.{{i}}.experts.{{e}}.c_proj.{{p}}", f"{ours}.blocks.{{i}}.mlp.experts.{{e}}.down.{{p}}"),
    )


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    kind, routed = checkpoint.given.activation or "quick_gelu", checkpoint.given.experts == "routed"
    return replace(
        long_clip.settings(checkpoint, state),
        image=_openai.image_tower(state, kind, routed=routed),
        text=_openai.text_tower(state, kind, routed=routed),
    )


LAYOUTS.register("clip_moe")(
    Layout(
        title="CLIP-MoE",
        keys=("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight", "{rest}.gate.weight"),
        rules=(
            *_openai.IMAGE,
            *_openai.text(),
            *_openai.SCALARS,
            *experts("visual.transformer.resblocks", "image"),
            *experts("transformer.resblocks", "text"),
            _long.RULE,
        ),
        needs=_openai.NEEDS,
        finish=_long.fold_positions,
        asks=("activation", "experts"),
        settings=settings,
    )
)
