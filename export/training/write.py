"""A trained net as a Hugging Face directory, in the names that it was read by: `calmclip export` reads it."""

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

# of the checkpoint that it was: what is written anew, the indexes of its weights, and what it left of its own training
_ITS_OWN = ("config.json", "model.safetensors", "pytorch_model.bin", LOG)


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
        if file.is_file() and not file.name.startswith(_ITS_OWN) and file.suffix not in (".safetensors", ".bin", ".pt"):
            shutil.copyfile(file, out / file.name)
        elif file.name != START and (file / "config.json").is_file():
            shutil.copytree(file, out / file.name, dirs_exist_ok=True)
    config = json.loads((made.directory / "config.json").read_text(encoding="utf-8"))
    for part in _parts(config, many=len(made.net.towers) > 1):
        for key in KEYS:
            part.pop(key, None)
        part.update(made.attention.written())
    tensors = layouts.written(made.net.layout, state)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")  # the last: all is there


def _parts(config: dict[str, Any], many: bool) -> list[dict[str, Any]]:
    """Where a config says what attention is: of a CLIP in each tower's part, though there be none yet."""
    if not many:
        return [config]
    towers = ("text_config", "vision_config")
    config.update({name: config.get(name) or {} for name in towers})
    return [config[name] for name in towers]
