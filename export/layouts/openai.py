"""OpenAI's CLIP: the published .pt (a TorchScript archive) or a state dict of it, and weights that are tuned from it.

Source: Radford et al. 2021 (arXiv 2103.00020). Width, layers, patch and context are read from shapes; heads are 64
wide. The activation is QuickGELU. No tensor says so: the marks in the archive do, or ``activation`` in the recipe.
"""

from collections.abc import Mapping

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Settings
from calmclip.export.layouts.common import openai_clip
from calmclip.models.errors import UnknownCheckpoint


def activation(checkpoint: Checkpoint) -> str:
    """Raises `UnknownCheckpoint` if neither the checkpoint nor the recipe says it."""
    if checkpoint.facts.activation:
        return checkpoint.facts.activation
    if checkpoint.names >= {*openai_clip.MARKS}:
        return "quick_gelu"
    raise UnknownCheckpoint(
        f"{checkpoint.path} does not say its activation, and a wrong one costs points of accuracy without an error; "
        "pass --activation quick_gelu (OpenAI's weights and those tuned from them) or gelu (most of open_clip's)"
    )


def refusal(checkpoint: Checkpoint) -> str | None:
    if any(name.removeprefix("prompt_learner.").startswith("ctx_before_") for name in checkpoint.names):
        return "it holds MoCoOp's prompts; export the CLIP that they were tuned over, with --mocoop and this file"
    return None


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    return openai_clip.settings(state, activation(checkpoint))


LAYOUTS.register("openai")(
    Layout(
        title="OpenAI CLIP, ViT",
        keys=("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight", "logit_scale"),
        without=("positional_embedding_res", "{rest}.gate.weight", "{rest}.fc_V.weight"),
        no_file="open_clip_config.json",
        rules=(*openai_clip.IMAGE, *openai_clip.text(), *openai_clip.SCALARS),
        required=openai_clip.REQUIRED,
        facts=("activation",),
        settings=settings,
        refusal=refusal,
    )
)
