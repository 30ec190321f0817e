"""What nets share in reading a checkpoint directory."""

import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from models.errors import ExtraMissing, UnknownCheckpoint

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def read_json(path: Path) -> dict[str, Any]:
    """Raises `UnknownCheckpoint` naming the file that is absent or no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnknownCheckpoint(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UnknownCheckpoint(f"{path} holds a JSON {type(data).__name__}; expected an object")
    return data


def weights_sha256(directory: Path) -> dict[str, str]:
    """Weight file -> sha256, for the manifest's `source`."""
    found = {}
    for path in sorted(p for p in directory.iterdir() if p.suffix in _WEIGHTS):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def require_package(name: str, what: str) -> Any:
    """The module ``name``; `ExtraMissing` says which extra holds it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ExtraMissing(
            f"{what} reads checkpoints with {name!r}, which is not installed; pip install 'calmclip[nets]'"
        ) from None
