"""Directories that the library peft writes: adapter_config.json and adapter_model.safetensors (or .bin).

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint. The library itself is not needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmclip.export.checkpoints.files import read_json
from calmclip.models.errors import UnknownCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that exists is read
INSIDE = "base_model.model."  # before the path of a module in the model that was tuned


@dataclass(frozen=True)
class Tuned:
    """``tensors``: by the names of the file, without `INSIDE`. ``files``: all that was read."""

    path: Path
    config: Mapping[str, Any]
    tensors: "Mapping[str, Tensor]"
    files: tuple[Path, ...]

    @property
    def base(self) -> str:
        """The model that was tuned: its name on the hub, or the last part of a path; "" if it is not stated."""
        named = str(self.config.get("base_model_name_or_path") or "")
        return Path(named).name if Path(named).is_absolute() else named


def is_tuned(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read(path: Path, *kinds: str) -> Tuned:
    """Raises `UnknownCheckpoint` for a directory that peft did not write, or of another ``peft_type`` than ``kinds``,
    and for numbers that are not finite; and as `load_tensors`."""
    from calmclip.export.checkpoints.weights import load_tensors  # needs torch

    if not is_tuned(path):
        raise UnknownCheckpoint(f"{path} has no {CONFIG}; expected a directory that peft wrote")
    config = read_json(path / CONFIG)
    if (kind := config.get("peft_type")) not in kinds:
        raise UnknownCheckpoint(f"{path / CONFIG}: peft_type is {kind!r}; expected {' or '.join(kinds)}")
    file = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if file is None:
        raise UnknownCheckpoint(f"{path} holds no weights; expected {' or '.join(WEIGHTS)}")
    tensors = {name.removeprefix(INSIDE): tensor for name, tensor in load_tensors([file]).items()}
    if bad := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise UnknownCheckpoint(f"{file}: {bad} holds infinities or NaN; the file is damaged, or its training diverged")
    return Tuned(path, config, tensors, (path / CONFIG, file))
