"""Adapters that the library peft saves over a tiny checkpoint, and the checkpoint that peft merges them into."""

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file


def lora(base: Path, directory: Path, kind: str, *, trained: bool = True, seed: int = 0, **config: Any) -> Path:
    """A LoRA over the class ``kind`` of transformers. ``trained``: every trained tensor has moved from its initial
    values, so that B is not 0."""
    tuned = _wrapped(base, kind, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    if trained:
        _move(tuned, seed)
    with warnings.catch_warnings(action="ignore"):  # of tables, and of a bias of B
        tuned.save_pretrained(directory)
    return directory


def prompts(base: Path, directory: Path, kind: str, config: Any, seed: int = 0) -> Any:
    """Saves prompts that stand before every text; -> the model of peft with them."""
    tuned = _wrapped(base, kind, config)
    _move(tuned, seed, by=1.0)
    tuned.save_pretrained(directory)
    return tuned.eval()


def merged(base: Path, adapters: Sequence[Path], directory: Path, kind: str, prefix: str = "") -> Path:
    """A copy of ``base`` with the weights that peft merges ``adapters`` into, in their order. ``prefix``: of the names
    of ``kind`` in the checkpoint."""
    shutil.copytree(base, directory)
    model: Any = _read(base, kind)
    with warnings.catch_warnings(action="ignore"):
        for adapter in adapters:
            model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    state = load_file(directory / "model.safetensors")
    state |= {name: tensor for key, tensor in model.state_dict().items() if (name := prefix + key) in state}
    save_file({name: tensor.clone() for name, tensor in state.items()}, directory / "model.safetensors")
    return directory


def _read(base: Path, kind: str) -> Any:
    # the config of a tower alone does not have the width of its projection
    options = {"projection_dim": 16} if kind.endswith("WithProjection") else {}
    return getattr(transformers, kind).from_pretrained(base, dtype=torch.float32, **options)


def _wrapped(base: Path, kind: str, config: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):  # of fan_in_fan_out
        return peft.get_peft_model(_read(base, kind), config)


def _move(tuned: Any, seed: int, by: float = 0.2) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * by)
