"""The ranking adapter over open_clip's ConvNeXt: pictures and an instruction -> a score for each picture.

Source: Yu et al. 2024 (arXiv 2412.06760) and its published code, from which come the names, the sizes that no tensor
shows (`_PUBLISHED`), and the preprocessing: pictures are squashed to a square, bilinearly. The adapter reads every
token of the instruction, also the padding, so a text always has the whole context.

Graphs: image pixels [B, 3, S, S] -> image_tokens [B, N, D]; text ids [B, T] -> text_tokens [B, T, D], not projected;
rank image_tokens [B, N, D], text_tokens [B, T, D] -> scores [B], of any size and sign.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from calmclip.export import layouts
from calmclip.export.checkpoints import MODEL_CONFIG, Checkpoint, Weights, hub, read
from calmclip.export.checkpoints.locate import NoWeights, weight_files, weights_sha256
from calmclip.export.layouts import DROP, Layout, Rule, Settings, open_clip, rename
from calmclip.export.layouts.common import openai_clip
from calmclip.export.layouts.common.clip_bpe import CLEAN, tokenizer_json
from calmclip.export.nets import NETS, Net, NetPlugin, Tower, attention_promises, float32, text_inputs
from calmclip.export.towers import Style, part
from calmclip.export.towers.convnext import ConvNeXt, stride
from calmclip.export.towers.ranking import Ranking
from calmclip.export.towers.text import TextTokens
from calmclip.models.bundle.manifest import ImagePreprocess, Source, TextPreprocess
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from calmclip.models.flow import Arrays

_PUBLISHED = {"image_size": 320, "n_head": 8}
_MAP = {"timm_pool": "", "timm_proj": ""}  # settings of vision_cfg that give a map of projected positions
_HIDDEN = "pre_linear_block"


def _regressor(theirs: str, ours: str, products: tuple[int, ...]) -> tuple[Rule, ...]:
    """``products``: their numbers; a norm follows each."""
    layers = {f"{_HIDDEN}.{n}.{{p}}": f"layers.{i}.up.{{p}}" for i, n in enumerate(products)}
    norms = {f"{_HIDDEN}.{n + 1}.{{p}}": f"layers.{i}.norm.{{p}}" for i, n in enumerate(products)}
    return rename(theirs, ours, {**layers, **norms, "output_head.{p}": "out.{p}"})


_CROSS = {
    "ln_1.{p}": "norm1.{p}",
    "ln_1_kv.{p}": "norm_text.{p}",
    "attn.in_proj_{p}": "attn.qkv.{p}",
    "attn.out_proj.{p}": "attn.out.{p}",
    "ln_2.{p}": "norm2.{p}",
    "mlp.c_fc.{p}": "mlp.up.{p}",
    "mlp.c_proj.{p}": "mlp.down.{p}",
}
_SELF = {theirs: ours for theirs, ours in _CROSS.items() if "_kv" not in theirs}
_ENCODER = {
    "self_attn.in_proj_{p}": "attn.qkv.{p}",
    "self_attn.out_proj.{p}": "attn.out.{p}",
    "linear1.{p}": "mlp.up.{p}",
    "linear2.{p}": "mlp.down.{p}",
    "norm1.{p}": "norm1.{p}",
    "norm2.{p}": "norm2.{p}",
}
_FUSION = "adapter.crossmodal_block"
_ADAPTER = (
    Rule("adapter.learnable_text_tokens", "rank.words", Tensor.flatten),
    *rename(f"{_FUSION}.resblocks.{{i}}", "rank.layers.{i}.among", _SELF),
    *rename(f"{_FUSION}.cross_attn.{{i}}", "rank.layers.{i}.across", _CROSS),
    Rule(f"{_FUSION}.ln_final.{{p}}", "rank.norm_layers.{p}"),
    Rule(f"{_FUSION}.projection", "rank.projection.weight", openai_clip.transposed),
    *rename("adapter.post_fuse_block.layers.{i}", "rank.encoder.{i}", _ENCODER),
    Rule("adapter.reg_ln.{p}", "rank.norm_post.{p}"),
    *_regressor("adapter.regressor", "rank.score", (0, 3)),
    Rule("adapter.reg_tokens", "rank.pairs.queries"),
    *rename(
        "adapter.reg_token_pooler",
        "rank.pairs",
        {"q_proj.{p}": "q.{p}", "ln_q.{p}": "norm_q.{p}", "kv_proj.{p}": "kv.{p}", "ln_kv.{p}": "norm_kv.{p}",
         "out_proj.{p}": "out.{p}"},
    ),
    Rule(f"adapter.pair_regressor.{_HIDDEN}.0.{{p}}", "rank.pairs.norm.{p}"),
    *_regressor("adapter.pair_regressor", "rank.pairs.score", (1, 4, 7)),
)  # fmt: skip
_TRUNK = (
    Rule("visual.trunk.stem.0.{p}", "image.stem.{p}"),
    Rule("visual.trunk.stem.1.{p}", "image.norm_stem.{p}"),
    Rule("visual.trunk.stages.{i}.downsample.0.{p}", "image.stages.{i}.norm.{p}"),
    Rule("visual.trunk.stages.{i}.downsample.1.{p}", "image.stages.{i}.down.{p}"),
    *rename(
        "visual.trunk.stages.{i}.blocks.{e}",
        "image.stages.{i}.blocks.{e}",
        {"conv_dw.{p}": "mix.{p}", "norm.{p}": "norm.{p}", "mlp.fc1.{p}": "up.{p}", "mlp.fc2.{p}": "down.{p}",
         "gamma": "scale"},
    ),
    Rule("visual.trunk.head.norm.{p}", "image.norm_post.{p}"),
    Rule("visual.trunk.head.fc.weight", "image.projection.weight", lambda tensor: tensor.flatten(1)),
    Rule("visual.trunk.head.fc.bias", "image.projection.bias"),
)  # fmt: skip


def config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The authors' own file, or a directory of open_clip's; {} for the published sizes."""
    whole = checkpoint.configs
    return dict(whole.get(MODEL_CONFIG) or (whole.get(open_clip.CONFIG) or {}).get("model_cfg") or {})


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """Raises `UnknownCheckpoint` for a setting that is not supported, and for towers of different widths."""
    model = config(checkpoint)
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    for name, usual in _MAP.items():
        if (value := vision.get(name) or usual) != usual:
            raise UnknownCheckpoint(f"{checkpoint.path}: vision_cfg.{name} is {value!r}; only {usual!r} is supported")
    context, width = state["text.positions"].shape
    if width != (dim := len(state["image.projection.weight"])):
        raise UnknownCheckpoint(
            f"{checkpoint.path}: tokens of texts have {width} numbers, those of pictures {dim}; expected as many"
        )
    side, step = vision.get("image_size", _PUBLISHED["image_size"]), stride(part(state, "image."))
    if side % step:
        raise UnknownCheckpoint(
            f"{checkpoint.path}: vision_cfg.image_size is {side}; expected a multiple of {step}, the tower's stride"
        )
    style = Style(
        heads=text.get("heads") or openai_clip.heads(width, "text"),
        activation=open_clip.activation(model, text),
        pool="none",
        causal=not text.get("no_causal_mask", False),
    )
    return Settings(
        image=ConvNeXt,
        text=partial(TextTokens, style=style),
        pixels=ImagePreprocess(
            size=(side, side), resize="exact", resample="bilinear", mean=openai_clip.MEAN, std=openai_clip.STD
        ),
        tokens=TextPreprocess(context=context, pad="context", pad_id=0, clean=CLEAN),
        tokenizer=tokenizer_json(),
        templates=(),
    )


LAYOUT = Layout(
    title="the ranking adapter over open_clip's ConvNeXt",
    keys=("adapter.learnable_text_tokens", "visual.trunk.stem.0.weight", "token_embedding.weight"),
    rules=(
        *_TRUNK,
        *(rule for rule in openai_clip.text() if not rule.theirs.startswith("text_projection")),
        *(Rule(name, DROP) for name in ("text_projection", "logit_scale", "logit_bias")),  # of the towers' vectors
        *_ADAPTER,
    ),
    required=(
        "image.stem.weight", "image.norm_stem.weight", "image.norm_post.weight", "image.projection.weight",
        "text.tokens.weight", "text.positions", "text.norm_post.weight",
        "rank.words", "rank.layers.0.among.norm1.weight", "rank.projection.weight", "rank.norm_post.weight",
        "rank.score.out.weight", "rank.pairs.queries",
    ),
    settings=settings,
)  # fmt: skip


def recognise(path: str) -> bool:
    try:
        weight_files(Path(path))
        return LAYOUT.fits(read(path))
    except (NoWeights, OSError):
        return False


def load(path: str, weights: Weights = Weights(), *, fold: bool = True) -> Net:  # noqa: B008 - frozen
    """Raises `UnknownCheckpoint` with the file and the tensor or setting that is missing or not supported, and
    `BadRequest` if the recipe has a section on weights."""
    if weights != Weights():
        raise BadRequest("the ranking adapter's config states its activation; leave out the recipe's [weights]")
    checkpoint = read(path, weights)
    state = layouts.translate(LAYOUT, checkpoint)
    parts = layouts.settings(LAYOUT, checkpoint, state)
    heads = (config(checkpoint).get("adapter_cfg") or {}).get("n_head", _PUBLISHED["n_head"])
    image = layouts.fill(LAYOUT, checkpoint, state, "image.", parts.image, fold=fold)
    text = layouts.fill(LAYOUT, checkpoint, state, "text.", parts.text, fold=fold)
    rank = layouts.fill(LAYOUT, checkpoint, state, "rank.", partial(Ranking, heads=heads), fold=fold)
    context, dim = state["text.positions"].shape
    side = parts.pixels.size[0]
    cells = (side // stride(part(state, "image."))) ** 2
    return Net(
        name="ranking",
        source=Source(
            net="ranking",
            model=hub.name(checkpoint.path),
            weights=weights_sha256(checkpoint.path),
            license=parts.license,
            notes=LAYOUT.title,
        ),
        tasks=("rank", "raw"),
        towers={
            "image": Tower(
                image,
                {parts.pixels.input: float32("B", 3, side, side)},
                {"image_tokens": float32("B", cells, dim)},
                parts.pixels,
                quantizer="search",
                prefix="image.",
            ),
            "text": Tower(
                text,
                text_inputs(parts.tokens),
                {"text_tokens": float32("B", context, dim)},
                parts.tokens,
                quantizer="search",
                promises=attention_promises(text),
                prefix="text.",
            ),
            "rank": Tower(
                rank,
                {
                    "image_tokens": float32("B", cells, dim),
                    "text_tokens": float32("B", context, dim),
                },
                {"scores": float32("B")},
                None,
                quantizer="search",
                prefix="rank.",
                summary=summary,
                promises=attention_promises(rank),
                reads={"image_tokens": "image", "text_tokens": "text"},
            ),
        },
        files={"tokenizer.json": parts.tokenizer},
        layout=LAYOUT,
        folded=fold,
    )


def summary(outputs: Arrays) -> Arrays:
    """The row by which two graphs are compared: the scores of all pictures of a call. One number has no cosine."""
    return {"scores": outputs["scores"][None]}


NETS.register("ranking")(NetPlugin(recognise, load, partial(load, fold=False)))
