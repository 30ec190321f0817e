"""Clipped softmax and gated attention (Bondarenko et al. 2023, arXiv 2306.12929) in the models of transformers.

This reference shares no code with `calmclip.export.towers`. Attention modules get a member ``alpha`` as in the paper's
code, so `save` writes the public names. The config gets the softmax and the gate's scale as that code's flags.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

GATES = ("none", "linear", "mlp", "all_heads", "per_head", "linear_mean", "mlp_mean")
SOFTMAXES = {"vanilla": (0.0, 1.0), "clipped(-0.04:1.01)": (-0.04, 1.01)}
HIDDEN = 5  # width of the gate "mlp"


def attentions(model: nn.Module) -> list[Any]:
    names = ("BertSelfAttention", "OPTAttention", "ViTAttention", "CLIPAttention")
    return [module for module in model.modules() if type(module).__name__ in names]


def change(model: Any, softmax: str = "vanilla", gate: str = "none", scale: float = 1.0) -> Any:
    """Give every attention of ``model`` this softmax and a gate with random weights; returns ``model``."""
    for module in attentions(model):
        heads = getattr(module, "num_attention_heads", None) or module.num_heads
        width = next(module.parameters()).shape[-1]
        if gate != "none":
            module.alpha = alpha = _alpha(gate, heads, width)
            with torch.no_grad():
                for parameter in alpha.parameters() if isinstance(alpha, nn.Module) else ():
                    parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.7)
        module.paper = SOFTMAXES[softmax], gate, scale, heads
        module.register_forward_pre_hook(_remember, with_kwargs=True)
    model.config._attn_implementation = "eager"
    for part in ("text_model", "vision_model"):
        if hasattr(model, part):
            getattr(model, part).config._attn_implementation = "eager"
    return model.eval()


def _alpha(gate: str, heads: int, width: int) -> nn.Module | nn.Parameter:
    side = width // heads
    gate = gate.removesuffix("_mean")
    if gate == "linear":
        return nn.ModuleList(nn.Linear(side, 1) for _ in range(heads))
    if gate == "mlp":
        gates = (nn.Sequential(nn.Linear(side, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)) for _ in range(heads))
        return nn.ModuleList(gates)
    return nn.Linear(width, heads) if gate == "all_heads" else nn.Parameter(torch.randn(heads))


def _remember(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Tensor]) -> None:
    module.read = args[0] if args else kwargs["hidden_states"]


def attend(module: Any, query, key, value, attention_mask, scaling=None, plain=False, **unused):  # type: ignore[no-untyped-def]
    """Replaces ``eager_attention_forward`` of transformers: queries [B, H, T, d] -> [B, T, H, d]."""
    (gamma, zeta), gate, scale, heads = ((0, 1), "none", 1, 1) if plain else module.paper
    logits = query @ key.mT * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    probabilities = torch.clip((zeta - gamma) * torch.softmax(logits, -1) + gamma, 0, 1)
    answers = probabilities @ value
    if gate != "none":
        x = module.read
        if gate == "per_head":
            logits = module.alpha[None, :, None]
        elif gate == "all_heads":
            logits = module.alpha(x).mT
        else:
            slices = x.chunk(heads, dim=-1)
            logits = torch.cat([layer(part) for layer, part in zip(module.alpha, slices, strict=True)], dim=-1).mT
        if gate.endswith("_mean"):
            rows = [row[:, :length].mean(-1) for row, length in zip(logits, module.lengths, strict=True)]
            logits = torch.stack(rows)[..., None]
        answers = scale * torch.sigmoid(logits)[..., None] * answers
    return answers.transpose(1, 2), probabilities


def set_lengths(model: nn.Module, lengths: Sequence[int]) -> None:
    """How many tokens of each row are no padding: the mean of a gate is over these."""
    for module in attentions(model):
        module.lengths = [*lengths]


@contextmanager
def defined(plain: bool = False) -> Iterator[None]:
    """Within this context, changed models attend as in the paper, or, if ``plain``, as unchanged models."""
    modules: list[Any] = [
        import_module(f"transformers.models.{kind}.modeling_{kind}") for kind in ("bert", "opt", "vit", "clip")
    ]
    originals = [module.eager_attention_forward for module in modules]
    for module in modules:
        module.eager_attention_forward = partial(attend, plain=plain)
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.eager_attention_forward = original


def save(model: nn.Module, checkpoint: Path, softmax: str, scale: float = 1.0, gate: str = "none") -> Path:
    """Overwrite the tensors and config of ``checkpoint`` with those of ``model``, by the public names."""
    state = {_public(name): tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    flags = {"attn_softmax": softmax, "attn_gate_scale": scale}
    flags |= {"attn_gate_type": "conditional_per_head"} if gate.endswith("_mean") else {}
    for part in [config] if "text_config" not in config else [config["text_config"], config["vision_config"]]:
        part.update(flags)
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


_VIT = {  # transformers 5 has other names in memory than in the files that it writes
    "vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    "attention.alpha": "attention.attention.alpha",
}  # fmt: skip


def _public(name: str) -> str:
    for new, old in _VIT.items() if name.startswith("vit.") else ():
        name = name.replace(new, old)
    return name
