"""Files of weights -> tensors by name: safetensors, torch's zip and older pickles, TorchScript archives.

What a file is, its first bytes say, not its name. Pickles are read with ``weights_only``: tensors and plain containers,
anything else is refused by name. TorchScript archives (OpenAI's .pt) are read without running what they hold: see
`scripted`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from export.checkpoints import torchscript
from models.errors import UnknownCheckpoint

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
NAMES = (  # of a directory's weights, the first that is there
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")  # a training's keys, under which the tensors are
PREFIXES = ("module.", "_orig_mod.", "model.module.")


def weight_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors. Raises `UnknownCheckpoint` when it is not clear which."""
    if path.is_file():
        return [path]
    for name in NAMES:
        if (path / name).is_file():
            return _shards(path / name) if name.endswith(".json") else [path / name]
    found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(found) == 1:
        return found
    what = f"several files of weights ({', '.join(p.name for p in found)})" if found else "no file of weights"
    raise UnknownCheckpoint(f"{path} holds {what}; name one file, or call it {NAMES[1]}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UnknownCheckpoint(f"{index} is no index of shards: {error!r}") from None
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UnknownCheckpoint(f"{index} names the shard {name!r}, which is not beside it")
    return [index.parent / name for name in names]


def load_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors, unwrapped. Raises `UnknownCheckpoint` naming the file that is damaged or holds something else."""
    found: dict[str, Tensor] = {}
    for file in files:
        found |= _unwrap(_load(file), file)
    return found


def weights_sha256(path: Path) -> dict[str, str]:
    """Weight file -> sha256, for the manifest's `source`."""
    found = {}
    for file in weight_files(path):
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _load(file: Path) -> Any:
    with file.open("rb") as stream:
        start = stream.read(9)
    try:
        if start[:2] == b"PK":
            if torchscript.is_archive(file):
                return torchscript.read(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if start[8:9] == b"{":
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UnknownCheckpoint(f"{file} is a damaged safetensors file: {error}") from None
    except UnknownCheckpoint:
        raise
    except Exception as error:  # torch raises whatever its unpickler met
        raise UnknownCheckpoint(f"{file} {_why(error)}") from None


def _why(error: Exception) -> str:
    """torch's page of advice, in one clause."""
    text = " ".join(str(error).split())
    for mark in ("GLOBAL ", "Unsupported global: GLOBAL ", "Unsupported class "):
        if mark in text:
            name = text.split(mark, 1)[1].split(" ")[0].strip(".,`'\"")
            return f"is a pickle that asks for {name}, which is not run; save its tensors alone, best as safetensors"
    return f"is damaged or holds no weights: {text[:160] or type(error).__name__}"


def _unwrap(found: Any, file: Path) -> dict[str, Tensor]:
    for key in WRAPPERS:
        while isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise UnknownCheckpoint(f"{file} holds a {type(found).__name__}; expected tensors by name")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UnknownCheckpoint(f"{file} holds no tensors; its keys are {', '.join(map(str, list(found)[:5]))}")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
