"""Writes a trained net as a Hugging Face directory, with the names of its layout: `calmclip export` reads it."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from calmclip.export import layouts
from calmclip.export.towers.attention import KEYS
from calmclip.export.training.objectives import Pair
from calmclip.export.training.settings import LOG
from calmclip.export.training.start import START, Student

# not copied from the checkpoint: files that are written anew, indexes of its weights, and the log of its training
_NOT_COPIED = ("config.json", "model.safetensors", "pytorch_model.bin", LOG)


def write(student: Student, out: Path) -> None:
    """config.json with the settings of attention, model.safetensors, and the other files of the checkpoint."""
    assert student.net.layout is not None
    state: dict[str, Tensor] = {}
    for tower in student.net.towers.values():
        state |= {f"{tower.prefix}{name}": tensor for name, tensor in tower.module.state_dict().items()}
    if isinstance(student.task.module, Pair):
        state["logit_scale"] = student.task.module.logit_scale
    out.mkdir(parents=True, exist_ok=True)
    for file in student.directory.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt")
        if file.is_file() and not weights and not file.name.startswith(_NOT_COPIED):
            shutil.copyfile(file, out / file.name)
        elif file.name != START and (file / "config.json").is_file():
            shutil.copytree(file, out / file.name, dirs_exist_ok=True)
    config = json.loads((student.directory / "config.json").read_text(encoding="utf-8"))
    for part in _parts(config, pair=len(student.net.towers) > 1):
        for key in KEYS:
            part.pop(key, None)
        part.update(student.attention.to_config())
    tensors = layouts.to_checkpoint(student.net.layout, state)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    # config.json is written last: it marks a complete directory
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _parts(config: dict[str, Any], pair: bool) -> list[dict[str, Any]]:
    """The parts of a config that hold the settings of attention: a CLIP has one per tower, which is added if absent."""
    if not pair:
        return [config]
    towers = ("text_config", "vision_config")
    config.update({name: config.get(name) or {} for name in towers})
    return [config[name] for name in towers]
