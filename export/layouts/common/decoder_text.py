"""Decoders of language models: names, and the facts that config.json tells and the shapes of tensors do not.

Source: transformers' Llama, Qwen2, Qwen3, Mistral, Phi-3, Gemma, Gemma 2 and Gemma 3 (text); RoPE's scaling: linear,
Chen et al. 2023 (arXiv 2306.15595); YaRN, Peng et al. 2023 (arXiv 2309.00071); LongRoPE, Ding et al. 2024 (arXiv
2402.13753); llama3, Llama 3 2024 (arXiv 2407.21783).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from calmclip.export.layouts import DROP, Rule, concatenate, rename
from calmclip.export.layouts.common import attention_gates
from calmclip.export.towers.attention import AttentionSpec
from calmclip.export.towers.decoder import DecoderStyle, DecoderText, Layer, Pool, Rope
from calmclip.models.errors import UnknownCheckpoint

MAX_CONTEXT = 65_536
FULL, SLIDING = "full_attention", "sliding_attention"
_BI = re.compile(r"Bi(Model|ForMNTP)$|EncoderModel$")  # LLM2Vec's classes, such as LlamaBiModel, LlamaEncoderModel
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Kind:
    """``usual``: config.json's keys when they are absent. ``gemma``: norms store weight - 1, and embeddings are scaled
    by the root of the width. ``four_norms``, ``fused``: of the names, see `rules`. ``windows(config)``: the type of
    each layer, when layer_types is absent."""

    usual: Mapping[str, Any] = field(default_factory=dict)
    gemma: bool = False
    four_norms: bool = False
    fused: bool = False
    windows: Callable[[Mapping[str, Any]], list[str]] = lambda config: [FULL] * config["num_hidden_layers"]


def _all_windows(config: Mapping[str, Any]) -> list[str]:
    return [SLIDING if config.get("sliding_window") else FULL] * config["num_hidden_layers"]


def _upper_windows(config: Mapping[str, Any]) -> list[str]:
    """Qwen's: the layers from max_window_layers on, if use_sliding_window."""
    first = config["max_window_layers"] if config.get("use_sliding_window") else config["num_hidden_layers"]
    return [SLIDING if i >= first else FULL for i in range(config["num_hidden_layers"])]


def _every(config: Mapping[str, Any]) -> list[str]:
    """Gemma's: all layers but every n-th."""
    pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 2))
    return [SLIDING if (i + 1) % pattern else FULL for i in range(config["num_hidden_layers"])]


_GEMMA = {"rms_norm_eps": 1e-6, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0}
_CAPS = {"attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_QWEN = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
KINDS: Mapping[str, Kind] = {
    "llama": Kind({"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}),
    "qwen2": Kind(_QWEN, windows=_upper_windows),
    "qwen3": Kind({**_QWEN, "head_dim": 128}, windows=_upper_windows),
    "mistral": Kind({"rms_norm_eps": 1e-6, "max_position_embeddings": 131072}, windows=_all_windows),
    "phi3": Kind({"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}, fused=True, windows=_all_windows),
    "gemma": Kind({**_GEMMA, "max_position_embeddings": 8192}, gemma=True),
    "gemma2": Kind({**_GEMMA, **_CAPS, "max_position_embeddings": 8192}, gemma=True, four_norms=True, windows=_every),
    "gemma3_text": Kind(
        {
            **_GEMMA,
            **_CAPS,
            "attn_logit_softcapping": None,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        gemma=True,
        four_norms=True,
        windows=_every,
    ),
}
_BLOCK = {
    "input_layernorm.weight": "norm1.weight",
    "self_attn.o_proj.{p}": "attn.out.{p}",
    "self_attn.q_norm.weight": "attn.q_norm.weight",
    "self_attn.k_norm.weight": "attn.k_norm.weight",
    "mlp.down_proj.{p}": "mlp.down.{p}",
}
_FUSED = {"self_attn.qkv_proj.{p}": "attn.qkv.{p}", "mlp.gate_up_proj.{p}": "mlp.up.{p}"}
_TWO_NORMS = {"post_attention_layernorm.weight": "norm2.weight"}
_FOUR_NORMS = {
    "post_attention_layernorm.weight": "post1.weight",
    "pre_feedforward_layernorm.weight": "norm2.weight",
    "post_feedforward_layernorm.weight": "post2.weight",
}
REQUIRED = ("text.tokens.weight", "text.norm_post.weight")


def rules(theirs: str, four_norms: bool = False, fused: bool = False) -> tuple[Rule, ...]:
    """The names after the prefix ``theirs``. ``four_norms``: a block has norms after attention and MLP too. ``fused``:
    q, k and v are one tensor in the checkpoint, and so are gate and up."""
    block = f"{theirs}layers.{{i}}"
    parts = (
        *concatenate(f"{block}.self_attn.*_proj.{{p}}", "text.blocks.{i}.attn.qkv.{p}", "qkv"),
        *concatenate(f"{block}.mlp.*_proj.{{p}}", "text.blocks.{i}.mlp.up.{p}", ("gate", "up")),
    )
    return (
        Rule(f"{theirs}embed_tokens.weight", "text.tokens.weight"),
        Rule(f"{theirs}norm.weight", "text.norm_post.weight"),
        *(rename(block, "text.blocks.{i}", _FUSED) if fused else parts),
        *rename(block, "text.blocks.{i}", {**_BLOCK, **(_FOUR_NORMS if four_norms else _TWO_NORMS)}),
        *attention_gates.rules(f"{block}.self_attn.alpha", "text.blocks.{i}"),
        Rule(f"{block}.self_attn.rotary_emb.inv_freq", DROP),
        Rule("lm_head.{p}", DROP),
    )


def usual(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` over the defaults of its class."""
    given = {name: value for name, value in config.items() if value is not None or name in _CAPS}
    return {**_kind(config).usual, **given}


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether a token sees only those before it: unless config.json says otherwise, or names a class of LLM2Vec."""
    if config.get("use_bidirectional_attention"):
        if config["model_type"] != "gemma3_text":
            raise UnknownCheckpoint(
                f"config.json: use_bidirectional_attention is true, which {config['model_type']} does not have; say "
                "is_causal false, or give the attention in the recipe"
            )
        return False
    if config.get("is_causal") is False:
        return False
    return not any(_BI.search(str(name)) for name in config.get("architectures") or ())


def tower(
    config: Mapping[str, Any],
    width: int,
    pool: Pool,
    causal: bool,
    dense: tuple[str, ...] = (),
    module: type[DecoderText] = DecoderText,
) -> tuple[partial[DecoderText], int]:
    """-> an empty tower whose tokens have ``width`` numbers, and the largest number of tokens.

    ``config``: as from `usual`. Raises `UnknownCheckpoint` with the key that is not supported.
    """
    kind, layers = _kind(config), int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    head_width = int(config.get("head_dim") or width // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if kv_heads < 1 or heads % kv_heads or head_width % 2:
        raise UnknownCheckpoint(
            f"config.json: {heads} heads of {head_width} numbers read {kv_heads} heads of keys; expected a multiple of "
            "them, and an even head_dim"
        )
    cap = config.get("attn_logit_softcapping")
    types, context = layer_types(config, layers), min(MAX_CONTEXT, int(config["max_position_embeddings"]))
    ropes = {name: _rope(config, name, head_width) for name in dict.fromkeys(types)}
    context = min([context, *(limit for _, limit in ropes.values() if limit)])
    window = _window(config, causal)
    style = DecoderStyle(
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        scale=float(config.get("query_pre_attn_scalar") or head_width) ** -0.5,
        layers=tuple(
            Layer(ropes[name][0], window if name == SLIDING and window and window < context else None) for name in types
        ),
        activation=_activation(config),  # type: ignore[arg-type]
        pool=pool,
        causal=causal,
        eps=float(config["rms_norm_eps"]),
        norm_offset=1.0 if kind.gemma else 0.0,
        embed_scale=math.sqrt(width) if kind.gemma else 1.0,
        cap=float(cap) if cap else None,
        dense=dense,
        attention=AttentionSpec.of(config),
    )
    return partial(module, style=style), context


def layer_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """`FULL` or `SLIDING` for each layer."""
    types = list(config.get("layer_types") or _kind(config).windows(config))
    if len(types) != layers or {*types} - {FULL, SLIDING}:
        raise UnknownCheckpoint(
            f"config.json: layer_types has {len(types)} entries, {types[:4]}…; expected {layers} of {FULL} or {SLIDING}"
        )
    return types


def _kind(config: Mapping[str, Any]) -> Kind:
    return KINDS[config["model_type"]]


def _window(config: Mapping[str, Any], causal: bool) -> int | None:
    """The distance from which a token is not seen. Two-sided windows: Gemma 3 halves them; other classes of
    transformers include the distance itself."""
    window = config.get("sliding_window")
    if not window:
        return None
    if config.get("use_bidirectional_attention"):
        return int(window) // 2 + 1
    return int(window) + (not causal)


def _activation(config: Mapping[str, Any]) -> str:
    key = "hidden_activation" if "hidden_activation" in config else "hidden_act"
    name = config.get(key, "silu")
    if config["model_type"] == "gemma":  # its older configs say gelu and mean the approximation
        name = {"gelu": "gelu_pytorch_tanh"}.get(config.get("hidden_act", name), config.get("hidden_act", name))
    if name not in _ACTIVATIONS:
        raise UnknownCheckpoint(f"config.json: {key} is {name!r}; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _rope(config: Mapping[str, Any], layer_type: str, head_width: int) -> tuple[Rope, int | None]:
    """The turns of the layers of one type, and the number of tokens up to which they hold.

    Keys: rope_parameters, perhaps by type of layer; or rope_theta, rope_scaling, rope_local_base_freq, as older
    versions of transformers write them. Raises `UnknownCheckpoint` for a scaling that depends on the text's length.
    """
    settings = dict(config.get("rope_parameters") or {})
    if nested := settings.get(layer_type):
        settings = dict(nested)
    elif not settings:
        local = layer_type == SLIDING and "rope_local_base_freq" in config
        settings = {"rope_theta": config["rope_local_base_freq"]} if local else dict(config.get("rope_scaling") or {})
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    portion = float(settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    scaling = str(settings.get("rope_type") or settings.get("type") or "default")
    if config["model_type"] == "phi3":
        scaling = {"su": "longrope", "yarn": "longrope"}.get(scaling, scaling)
    if scaling not in _SCALINGS:
        raise UnknownCheckpoint(
            f"config.json: the kind of rope_scaling is {scaling!r}, which depends on the length of a text or is not "
            f"known; expected one of {', '.join(_SCALINGS)}"
        )
    turned = int(head_width * portion)
    powers = theta ** (torch.arange(0, turned, 2, dtype=torch.float32) / turned)
    original = config.get("original_max_position_embeddings")
    original = original or settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
    settings |= {"theta": theta, "original": float(original), "longest": float(config["max_position_embeddings"])}
    try:
        frequencies, gain, limit = _SCALINGS[scaling](powers, settings)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise UnknownCheckpoint(
            f"config.json: rope_scaling of the kind {scaling!r} lacks or misstates {error}"
        ) from None
    return Rope(tuple(frequencies.tolist()), gain), limit


Turns = tuple[Tensor, float, int | None]  # frequencies, gain, and the number of tokens up to which they hold


def _plain(powers: Tensor, settings: Mapping[str, Any]) -> Turns:
    return 1.0 / powers, 1.0, None


def _linear(powers: Tensor, settings: Mapping[str, Any]) -> Turns:
    return 1.0 / powers / settings["factor"], 1.0, None


def _llama3(powers: Tensor, settings: Mapping[str, Any]) -> Turns:
    """Slow turns are divided by the factor, fast ones stay, those between are mixed."""
    frequencies, factor = 1.0 / powers, settings["factor"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (settings["original"] / wavelengths - low) / (high - low)
    mixed = (1 - smooth) * frequencies / factor + smooth * frequencies
    slow, fast = wavelengths > settings["original"] / low, wavelengths < settings["original"] / high
    return torch.where(slow, frequencies / factor, torch.where(fast, frequencies, mixed)), 1.0, None


def _yarn(powers: Tensor, settings: Mapping[str, Any]) -> Turns:
    """Sections 3.2 to 3.4: a ramp between both, by the number of turns within the original length."""
    factor = settings.get("factor") or settings["longest"] / settings["original"]

    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    gain, mscale, all_dim = (settings.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if gain is None:
        gain = scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)
    width = 2 * len(powers)

    def place(turns: float) -> float:
        return width * math.log(settings["original"] / (turns * 2 * math.pi)) / (2 * math.log(settings["theta"]))

    low, high = place(settings.get("beta_fast") or 32), place(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = ((torch.arange(len(powers)) - low) / max(high - low, 0.001)).clamp(0, 1)
    return ramp / (factor * powers) + (1 - ramp) / powers, float(gain), None


def _longrope(powers: Tensor, settings: Mapping[str, Any]) -> Turns:
    """The short factors, which hold up to the original length; longer texts have other factors."""
    factor = settings.get("factor") or settings["longest"] / settings["original"]
    gain = settings.get("attention_factor")
    if gain is None:
        gain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(settings["original"]))
    short = torch.tensor(settings["short_factor"], dtype=torch.float32)
    if short.shape != powers.shape:
        raise ValueError(f"short_factor with {len(short)} numbers; expected {len(powers)}")
    return 1.0 / (short * powers), float(gain), int(settings["original"])


_SCALINGS: Mapping[str, Callable[[Tensor, Mapping[str, Any]], Turns]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
