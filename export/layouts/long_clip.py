"""Long-CLIP: OpenAI's names and a second table of positions, context 248.

Source: Zhang et al. 2024, Long-CLIP (arXiv 2403.15378). The activation is QuickGELU, as in what it is tuned from.
"""

from collections.abc import Mapping

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Settings, _long, _openai
from calmclip.export.layouts._clip_bpe import tokenizer_json


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    kind = checkpoint.given.activation or "quick_gelu"
    return Settings(
        image=_openai.image_tower(state, kind),
        text=_openai.text_tower(state, kind),
        pixels=_openai.pixels(_openai.side(state)),
        tokens=_openai.tokens(state),
        tokenizer=tokenizer_json(),
    )


LAYOUTS.register("long_clip")(
    Layout(
        title="Long-CLIP",
        keys=("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight", "positional_embedding_res"),
        without=("{rest}.gate.weight",),
        rules=(*_openai.IMAGE, *_openai.text(), *_openai.SCALARS, _long.RULE),
        needs=(*_openai.NEEDS, "text.positions_res"),
        finish=_long.fold_positions,
        asks=("activation",),
        settings=settings,
    )
)
