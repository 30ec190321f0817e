"""open_clip directories: open_clip_config.json beside open_clip_model.safetensors (or a .bin); its own ViT and text.

Source: Ilharco et al., OpenCLIP (doi 10.5281/zenodo.5143773). The config says what shapes do not; what it asks for and
our towers do not have is refused by name. A model with `logit_bias` (SigLIP's loss) gets the sigmoid head.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Settings, _open_clip_text, _openai
from calmclip.export.layouts._clip_bpe import CLEAN, tokenizer_json
from calmclip.export.towers import Style
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.errors import UnknownCheckpoint

CONFIG = "open_clip_config.json"
_RESIZE = {"shortest": "shortest", "squash": "exact"}
_POOLS = {"argmax": "eot", "first": "first", "last": "last"}
_USUAL = {  # settings of a tower that change what it computes, and the one value our towers have
    "vision_cfg": {
        "attentional_pool": False, "pool_type": "tok", "final_ln_after_pool": False, "no_ln_pre": False,
        "pos_embed_type": "learnable", "output_tokens": False, "input_patchnorm": False, "global_average_pool": False,
        "timm_model_name": "",
    },
    "text_cfg": {"embed_cls": False, "output_tokens": False, "mlp_ratio": None, "correct_cls_mask": None},
}  # fmt: skip


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """Raises `UnknownCheckpoint` naming the setting that is not supported."""
    config = model_config(checkpoint)
    return Settings(
        image=partial(VisionTransformer, style=vision_style(config, state)),
        text=partial(TextTransformer, style=text_style(config)),
        pixels=pixels(checkpoint, config, state),
        **text_parts(checkpoint, config),
    )


def vision_style(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Style:
    require_usual(config, *_USUAL)
    vision = config["vision_cfg"]
    return Style(
        heads=state["image.patch.weight"].shape[0] // vision.get("head_width", _openai.HEAD_WIDTH),
        activation=activation(config, vision),  # type: ignore[arg-type]
        eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        pool="cls",
    )


def pixels(checkpoint: Checkpoint, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ImagePreprocess:
    size = config["vision_cfg"].get("image_size", _openai.side(state))
    return image_preprocess(checkpoint.configs[CONFIG].get("preprocess_cfg") or {}, size)


def require_usual(config: Mapping[str, Any], *parts: str) -> None:
    """Raises `UnknownCheckpoint` naming a setting of vision_cfg or text_cfg that our towers do not have."""
    for part in parts:
        for name, value in _USUAL[part].items():
            if value is not None and (found := config[part].get(name) or value) != value:
                raise UnknownCheckpoint(f"{CONFIG}: {part}.{name} is {found!r}; only {value!r} is supported")


def text_parts(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """Of `Settings` what texts need: CLIP's tokenizer, or the one in the directory where the config names one."""
    text = config["text_cfg"]
    if not text.get("hf_tokenizer_name"):
        return {"tokens": text_tokens(text, clean=CLEAN), "tokenizer": tokenizer_json()}
    tokenizer, pad = _open_clip_text.tokenizer(checkpoint, text)
    return {"tokens": text_tokens({**text, "pad_id": pad}), "tokenizer": tokenizer}


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    match checkpoint.configs[CONFIG].get("model_cfg"):
        case {"embed_dim": int(), "text_cfg": dict(), "vision_cfg": dict()} as config:
            return config
    raise UnknownCheckpoint(f"{checkpoint.directory / CONFIG} has no model_cfg with embed_dim, vision_cfg and text_cfg")


def activation(config: Mapping[str, Any], tower: Mapping[str, Any]) -> str:
    if config.get("quick_gelu"):
        return "quick_gelu"
    return "gelu_tanh" if (tower.get("act_kwargs") or {}).get("approximate") == "tanh" else "gelu"


def text_style(config: Mapping[str, Any]) -> Style:
    require_usual(config, "text_cfg")
    text = config["text_cfg"]
    pool = text.get("pool_type", "argmax")
    if pool not in _POOLS:
        raise UnknownCheckpoint(f"{CONFIG}: text_cfg.pool_type is {pool!r}; expected {' or '.join(_POOLS)}")
    return Style(
        heads=text.get("heads", 8),
        activation=activation(config, text),  # type: ignore[arg-type]
        pool=_POOLS[pool],  # type: ignore[arg-type]
        causal=not text.get("no_causal_mask", False),
        eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
    )


def text_tokens(text: Mapping[str, Any], *, clean: Literal["lower", "whitespace"] | None = None) -> TextPreprocess:
    """A causal tower pooled at the end of the text does not see what follows it; any other sees its padding."""
    short = not text.get("no_causal_mask", False) and text.get("pool_type", "argmax") == "argmax"
    return TextPreprocess(
        context=text.get("context_length", 77),
        pad="longest" if short else "context",
        pad_id=text.get("pad_id", 0),
        clean=clean,
    )


def image_preprocess(config: Mapping[str, Any], size: Any) -> ImagePreprocess:
    """`preprocess_cfg` -> ours. Defaults are open_clip's."""
    size = config.get("size", size)
    rows, cols = (size, size) if isinstance(size, int) else size[-2:]
    mode = config.get("resize_mode", "shortest")
    if mode not in _RESIZE:
        raise UnknownCheckpoint(f"{CONFIG}: resize_mode {mode!r} is not supported; expected {' or '.join(_RESIZE)}")
    return ImagePreprocess(
        size=(rows, cols),
        resize=_RESIZE[mode],  # type: ignore[arg-type]
        shortest=max(rows, cols) if mode == "shortest" else None,
        crop_offset="round",
        resample=config.get("interpolation", "bicubic"),
        mean=config.get("mean", _openai.MEAN),
        std=config.get("std", _openai.STD),
    )


NAMES = ("open_clip", "open_clip_custom_text")
for _name, _keys, _prefix in (
    ("open_clip", "token_embedding.weight", ""),
    ("open_clip_custom_text", "text.token_embedding.weight", "text."),
):
    LAYOUTS.register(_name)(
        Layout(
            title="open_clip, its own ViT and text" + (" (custom text)" if _prefix else ""),
            keys=("visual.conv1.weight", "visual.class_embedding", _keys),
            file=CONFIG,
            rules=(*_openai.IMAGE, *_openai.text(_prefix), *_openai.SCALARS),
            needs=_openai.NEEDS,
            settings=settings,
        )
    )
