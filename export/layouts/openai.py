"""OpenAI's CLIP: the published .pt (a TorchScript archive) or a state dict of it, and what was fine-tuned from it.

Source: Radford et al. 2021 (arXiv 2103.00020). Width, layers, patch and context are read from shapes; heads are 64
wide, the activation is QuickGELU, which no tensor tells: the archive's own marks do, or ``activation`` in the recipe.
"""

from collections.abc import Mapping

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Settings, _openai
from calmclip.export.layouts._clip_bpe import tokenizer_json
from calmclip.models.errors import UnknownCheckpoint

MARKS = {"input_resolution", "context_length", "vocab_size"}


def activation(checkpoint: Checkpoint) -> str:
    """Raises `UnknownCheckpoint` where neither the checkpoint nor the recipe says it."""
    if checkpoint.given.activation:
        return checkpoint.given.activation
    if checkpoint.names >= MARKS:
        return "quick_gelu"
    raise UnknownCheckpoint(
        f"{checkpoint.path} does not say its activation, and a wrong one costs points of accuracy without an error; "
        "pass --activation quick_gelu (OpenAI's weights and what is tuned from them) or gelu (most of open_clip's)"
    )


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    kind = activation(checkpoint)
    return Settings(
        image=_openai.image_tower(state, kind),
        text=_openai.text_tower(state, kind),
        pixels=_openai.pixels(_openai.side(state)),
        tokens=_openai.tokens(state),
        tokenizer=tokenizer_json(),
    )


LAYOUTS.register("openai")(
    Layout(
        title="OpenAI CLIP, ViT",
        keys=("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight", "logit_scale"),
        without=("positional_embedding_res", "{rest}.gate.weight", "{rest}.fc_V.weight"),
        no_file="open_clip_config.json",
        rules=(*_openai.IMAGE, *_openai.text(), *_openai.SCALARS),
        needs=_openai.NEEDS,
        asks=("activation",),
        settings=settings,
    )
)
