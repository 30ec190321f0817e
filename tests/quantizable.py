"""Transformers with clipped softmax and gates, by the definitions of Bondarenko et al. 2023 (arXiv 2306.12929) put into
the modules of transformers: a reference that shares nothing with `calmclip.export.towers`.

`Attention` modules get a member ``alpha`` as in the paper's published code, so that what `save` writes has the public
names; the softmax and the scale of the gates go into the config, as the published code's flags say them.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

GATES = ("none", "linear", "mlp", "all_heads", "per_head")
SOFTMAXES = {"vanilla": (0.0, 1.0), "clipped(-0.04:1.01)": (-0.04, 1.01)}
HIDDEN = 5  # of an mlp's gate


def attentions(model: nn.Module) -> list[nn.Module]:
    names = ("BertSelfAttention", "OPTAttention", "ViTAttention", "CLIPAttention")
    return [module for module in model.modules() if type(module).__name__ in names]


def change(model: nn.Module, softmax: str = "vanilla", gate: str = "none", scale: float = 1.0) -> nn.Module:
    """Every attention of ``model`` with this softmax and a gate of random weights."""
    for module in attentions(model):
        heads = getattr(module, "num_attention_heads", None) or module.num_heads
        width = next(module.parameters()).shape[-1]
        each = width // heads
        made = {
            "none": lambda: None,
            "linear": lambda each=each, heads=heads: nn.ModuleList(nn.Linear(each, 1) for _ in range(heads)),
            "mlp": lambda each=each, heads=heads: nn.ModuleList(
                nn.Sequential(nn.Linear(each, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)) for _ in range(heads)
            ),
            "all_heads": lambda width=width, heads=heads: nn.Linear(width, heads),
            "per_head": lambda heads=heads: nn.Parameter(torch.randn(heads)),
        }[gate]()
        if made is not None:
            module.alpha = made
            with torch.no_grad():
                for parameter in made.parameters() if isinstance(made, nn.Module) else ():
                    parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.7)
        module.paper = SOFTMAXES[softmax], gate, scale, heads
        module.register_forward_pre_hook(_remember, with_kwargs=True)
    model.config._attn_implementation = "eager"
    for part in ("text_model", "vision_model"):
        if hasattr(model, part):
            getattr(model, part).config._attn_implementation = "eager"
    return model.eval()


def _remember(module: nn.Module, args: tuple, kwargs: Mapping[str, Tensor]) -> None:
    module.read = args[0] if args else kwargs["hidden_states"]


def attend(module: nn.Module, query, key, value, attention_mask, scaling=None, plain=False, **rest):  # type: ignore[no-untyped-def]
    """In place of transformers' ``eager_attention_forward``: queries [B, H, T, d] -> [B, T, H, d]."""
    (gamma, zeta), gate, scale, heads = ((0, 1), "none", 1, 1) if plain else module.paper
    logits = query @ key.mT * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    chances = torch.clip((zeta - gamma) * torch.softmax(logits, -1) + gamma, 0, 1)
    answers = chances @ value
    if gate != "none":
        x = module.read
        if gate == "per_head":
            opened = module.alpha[None, :, None]
        elif gate == "all_heads":
            opened = module.alpha(x).mT
        else:
            slices = x.chunk(heads, dim=-1)
            opened = torch.cat([one(part) for one, part in zip(module.alpha, slices, strict=True)], dim=-1).mT
        answers = scale * torch.sigmoid(opened)[..., None] * answers
    return answers.transpose(1, 2), chances


@contextmanager
def defined(plain: bool = False) -> Iterator[None]:
    """Inside, changed models attend as the paper says; ``plain``: as if they were not changed."""
    modules = [import_module(f"transformers.models.{kind}.modeling_{kind}") for kind in ("bert", "opt", "vit", "clip")]
    kept = [module.eager_attention_forward for module in modules]
    for module in modules:
        module.eager_attention_forward = partial(attend, plain=plain)
    try:
        yield
    finally:
        for module, own in zip(modules, kept, strict=True):
            module.eager_attention_forward = own


def save(model: nn.Module, checkpoint: Path, softmax: str, scale: float = 1.0) -> Path:
    """``model``'s tensors and the keys of its config over those of ``checkpoint``, in the public names."""
    state = {_public(name): tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    own = {"attn_softmax": softmax, "attn_gate_scale": scale}
    for part in [config] if "text_config" not in config else [config["text_config"], config["vision_config"]]:
        part.update(own)
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


_VIT = {  # transformers 5 renamed a ViT's tensors, and writes them by their old names
    "vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    "attention.alpha": "attention.attention.alpha",
}  # fmt: skip


def _public(name: str) -> str:
    for new, old in _VIT.items() if name.startswith("vit.") else ():
        name = name.replace(new, old)
    return name
