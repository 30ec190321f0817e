"""A trained net as a Hugging Face directory, in the names that it was read by: `calmclip export` reads it."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from export import layouts
from export.training.objectives import Pair
from export.training.start import Student

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of the checkpoint that it was, and their indexes


def write(made: Student, out: Path) -> None:
    """config.json, which says the attention; model.safetensors; and what else lay in the checkpoint's directory."""
    assert made.net.layout is not None
    state: dict[str, Tensor] = {}
    for tower in made.net.towers.values():
        state |= {f"{tower.prefix}{name}": tensor for name, tensor in tower.module.state_dict().items()}
    if isinstance(made.task.module, Pair):
        state["logit_scale"] = made.task.module.logit_scale
    out.mkdir(parents=True, exist_ok=True)
    for file in made.directory.iterdir():
        if file.is_file() and not file.name.startswith(_WEIGHTS) and file.suffix not in (".safetensors", ".bin", ".pt"):
            shutil.copyfile(file, out / file.name)
        elif file.is_dir() and (file / "config.json").is_file():
            shutil.copytree(file, out / file.name, dirs_exist_ok=True)
    config = json.loads((made.directory / "config.json").read_text(encoding="utf-8"))
    parts = [config[name] for name in ("text_config", "vision_config") if name in config] or [config]
    for part in parts:
        part.update(made.attention.written())
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = layouts.written(made.net.layout, state)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
