"""open_clip directories: open_clip_config.json beside open_clip_model.safetensors (or a .bin); its own ViT and text.

Source: Ilharco et al., OpenCLIP (doi 10.5281/zenodo.5143773). The config gives the facts that shapes do not. A setting
that our towers do not have is refused by name. A model with `logit_bias` (SigLIP's loss) gets the sigmoid head.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from calmclip.export.checkpoints import Checkpoint
from calmclip.export.layouts import LAYOUTS, Layout, Settings
from calmclip.export.layouts.common import open_clip_tokenizer, openai_clip
from calmclip.export.layouts.common.clip_bpe import CLEAN, tokenizer_json
from calmclip.export.towers import Style
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.text import TextTransformer
from calmclip.models.bundle.manifest import ImagePreprocess, TextPreprocess
from calmclip.models.errors import UnknownCheckpoint

CONFIG = "open_clip_config.json"
_RESIZE = {"shortest": "shortest", "squash": "exact"}
_POOLS = {"argmax": "eot", "first": "first", "last": "last"}
_USUAL: dict[str, dict[str, Any]] = {  # settings that change what a tower computes -> the only supported value
    "vision_cfg": {
        "attentional_pool": False, "pool_type": "tok", "final_ln_after_pool": False, "no_ln_pre": False,
        "pos_embed_type": "learnable", "output_tokens": False, "input_patchnorm": False, "global_average_pool": False,
        "timm_model_name": "",
    },
    "text_cfg": {"embed_cls": False, "output_tokens": False},
}  # fmt: skip


def settings(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Settings:
    """Raises `UnknownCheckpoint` with the setting that is not supported."""
    config = model_config(checkpoint)
    return Settings(
        **image_parts(checkpoint, config, state),
        text=partial(TextTransformer, style=text_style(config)),
        **text_parts(checkpoint, config),
    )


def image_parts(checkpoint: Checkpoint, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `Settings` for pictures: open_clip's own ViT."""
    require_usual(config, *_USUAL)
    vision = config["vision_cfg"]
    style = Style(
        heads=state["image.patch.weight"].shape[0] // vision.get("head_width", openai_clip.HEAD_WIDTH),
        activation=activation(config, vision),
        eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        pool="cls",
    )
    side = vision.get("image_size", openai_clip.side(state))
    return {"image": partial(VisionTransformer, style=style), "pixels": image_preprocess(checkpoint, side)}


def require_usual(config: Mapping[str, Any], *parts: str) -> None:
    """Raises `UnknownCheckpoint` with a setting of vision_cfg or text_cfg that our towers do not have."""
    for part in parts:
        for name, usual in _USUAL[part].items():
            if (value := config[part].get(name) or usual) != usual:
                raise UnknownCheckpoint(f"{CONFIG}: {part}.{name} is {value!r}; only {usual!r} is supported")


def text_parts(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """``tokens`` and ``tokenizer`` of `Settings`: CLIP's own, or the tokenizer in the directory if the config names
    one."""
    text = config["text_cfg"]
    if not text.get("hf_tokenizer_name"):
        return {"tokens": text_tokens(text, clean=CLEAN), "tokenizer": tokenizer_json()}
    tokenizer, pad = open_clip_tokenizer.read_tokenizer(checkpoint, text)
    return {"tokens": text_tokens({**text, "pad_id": pad}), "tokenizer": tokenizer}


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config: Any = checkpoint.configs[CONFIG].get("model_cfg")
    match config:
        case {"embed_dim": int(), "text_cfg": dict(), "vision_cfg": dict()}:
            return dict(config)
    raise UnknownCheckpoint(f"{checkpoint.directory / CONFIG} has no model_cfg with embed_dim, vision_cfg and text_cfg")


def activation(config: Mapping[str, Any], tower: Mapping[str, Any]) -> Literal["gelu", "gelu_tanh", "quick_gelu"]:
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
        activation=activation(config, text),
        pool=_POOLS[pool],  # type: ignore[arg-type]
        causal=not text.get("no_causal_mask", False),
        eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
    )


def text_tokens(text: Mapping[str, Any], *, clean: Literal["lower", "whitespace"] | None = None) -> TextPreprocess:
    """A causal tower that is pooled at the end of the text does not see its padding. Any other tower does, so its texts
    are padded to the whole context."""
    short = not text.get("no_causal_mask", False) and text.get("pool_type", "argmax") == "argmax"
    return TextPreprocess(
        context=text.get("context_length", 77),
        pad="longest" if short else "context",
        pad_id=text.get("pad_id", 0),
        clean=clean,
    )


def image_preprocess(checkpoint: Checkpoint, size: Any) -> ImagePreprocess:
    """`preprocess_cfg` of the directory -> ours. Defaults are open_clip's. ``size``: if the config has none."""
    config = checkpoint.configs[CONFIG].get("preprocess_cfg") or {}
    size = config.get("size", size)
    rows, cols = (size, size) if isinstance(size, int) else size
    mode = config.get("resize_mode", "shortest")
    if mode not in _RESIZE:
        raise UnknownCheckpoint(f"{CONFIG}: resize_mode {mode!r} is not supported; expected {' or '.join(_RESIZE)}")
    return ImagePreprocess(
        size=(rows, cols),
        resize=_RESIZE[mode],  # type: ignore[arg-type]
        shortest=max(rows, cols) if mode == "shortest" else None,
        crop_offset="round",
        resample=config.get("interpolation", "bicubic"),
        mean=config.get("mean", openai_clip.MEAN),
        std=config.get("std", openai_clip.STD),
    )


NAMES = ("open_clip", "open_clip_custom_text")
for _name, _prefix in (("open_clip", ""), ("open_clip_custom_text", "text.")):
    LAYOUTS.register(_name)(
        Layout(
            title="open_clip, its own ViT and text" + (" (custom text)" if _prefix else ""),
            keys=("visual.conv1.weight", "visual.class_embedding", f"{_prefix}token_embedding.weight"),
            file=CONFIG,
            rules=(*openai_clip.IMAGE, *openai_clip.text(_prefix), *openai_clip.SCALARS),
            required=openai_clip.REQUIRED,
            settings=settings,
        )
    )
