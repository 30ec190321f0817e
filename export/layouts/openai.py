"""OpenAI's CLIP: the published .pt (a TorchScript archive) or a state dict of it, and what was fine-tuned from it.

Source: Radford et al. 2021 (arXiv 2103.00020). Width, layers, patch and context are read from shapes; heads are 64
wide, the activation is QuickGELU, which no tensor tells: the archive's own marks do, or ``activation`` in the recipe.
"""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from export.checkpoints import Checkpoint
from export.layouts import LAYOUTS, Layout, Settings, _openai
from export.layouts._clip_bpe import CLEAN, tokenizer_json
from export.towers import Style
from export.towers.image import VisionTransformer
from export.towers.text import TextTransformer
from models.bundle.manifest import TextPreprocess
from models.errors import UnknownCheckpoint

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
    context, width = state["text.positions"].shape
    image = Style(heads=state["image.patch.weight"].shape[0] // _openai.HEAD_WIDTH, activation=kind, pool="cls")  # type: ignore[arg-type]
    text = Style(heads=width // _openai.HEAD_WIDTH, activation=kind, pool="eot", causal=True)  # type: ignore[arg-type]
    return Settings(
        image=partial(VisionTransformer, style=image),
        text=partial(TextTransformer, style=text),
        pixels=_openai.pixels(_openai.side(state)),
        tokens=TextPreprocess(context=context, pad="longest", pad_id=0, clean=CLEAN),
        tokenizer=tokenizer_json(),
    )


LAYOUTS.register("openai")(
    Layout(
        title="OpenAI CLIP, ViT",
        keys=("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight", "logit_scale"),
        without=("positional_embedding_res",),
        no_file="open_clip_config.json",
        rules=(*_openai.IMAGE, *_openai.text(), *_openai.SCALARS),
        needs=_openai.NEEDS,
        settings=settings,
    )
)
