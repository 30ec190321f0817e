"""Tiny decoders of language models as Hugging Face directories: 3 blocks, 32 numbers for a token, 4 heads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny import save_tokenizer, spread

CONTEXT = 64
LENGTHS = (11, 7, 4)  # tokens of three texts
_BASE: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> class of transformers, and what differs from `_BASE`
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "phi3": ("Phi3", {"num_key_value_heads": 4}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3_text": ("Gemma3Text", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2}),
}
KINDS["gemma3_text"][1]["layer_types"] = KINDS["gemma3_text"][1]["layer_types"][:3]


def decoder(directory: Path, kind: str = "llama", head: bool = False, **changes: Any) -> Path:
    """``head``: with the head for words, so that names have the prefix `model.`."""
    torch.manual_seed(0)
    name, differences = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**_BASE, **differences, **changes})
    suffix = {"Gemma3Text": "Gemma3"}.get(name, name) + "ForCausalLM" if head else f"{name}Model"
    model = spread(getattr(transformers, suffix)(config))
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def reference(directory: Path) -> Any:
    """The model of transformers without its head, with attention that has soft caps and windows."""
    return transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").eval()


def padded(side: str, length: int = 11) -> tuple[Tensor, Tensor]:
    """ids and mask [3, T] of the same three texts."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.zeros(3, length, dtype=torch.long), torch.zeros(3, length, dtype=torch.long)
    for row, tokens in enumerate(LENGTHS):
        place = slice(0, tokens) if side == "right" else slice(length - tokens, length)
        ids[row, place] = torch.randint(3, 590, (tokens,), generator=generator)
        mask[row, place] = 1
    return ids, mask


@torch.no_grad()
def states(directory: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """The last hidden states of transformers, [B, T, W]."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    want: Tensor = reference(directory)(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    return want


def edited(directory: Path, *absent: str, **changes: Any) -> Path:
    """config.json without the keys ``absent``, and with ``changes``."""
    config = json.loads((directory / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in absent} | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def sentence_modules(
    directory: Path,
    pool: str = "lasttoken",
    dense: Mapping[str, int] | None = None,
    *,
    include_prompt: bool = True,
    prompts: Mapping[str, str | None] | None = None,
    default: str | None = None,
    context: int = 24,
) -> Path:
    """Adds the files of sentence-transformers. ``dense``: activation, with any number after it -> outputs."""
    width = json.loads((directory / "config.json").read_text())["hidden_size"]
    pooling = {"embedding_dimension": width, "pooling_mode": pool, "include_prompt": include_prompt}
    parts: list[tuple[str, str, dict[str, Any]]] = [("Transformer", "", {}), ("Pooling", "1_Pooling", pooling)]
    for number, (activation, outputs) in enumerate((dense or {}).items(), 2):
        config: dict[str, Any] = {"in_features": width, "out_features": outputs, "bias": False}
        config["activation_function"] = f"torch.nn.modules.linear.{activation.rstrip('0123456789')}"
        parts.append(("Dense", f"{number}_Dense", config))
        width = outputs
    parts.append(("Normalize", f"{len(parts)}_Normalize", {}))
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path, _) in enumerate(parts)
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": context}))
    named = {"prompts": prompts or {}, "default_prompt_name": default}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(named))
    for kind, path, config in parts[1:]:
        (directory / path).mkdir()
        (directory / path / "config.json").write_text(json.dumps(config))
        if kind == "Dense":
            layer = torch.nn.Linear(config["in_features"], config["out_features"], bias=False)
            save_file({"linear.weight": layer.weight.detach()}, directory / path / "model.safetensors")
    return directory
