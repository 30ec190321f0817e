"""What readers of checkpoints share: a JSON file, an optional package."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from models.errors import ExtraMissing, UnknownCheckpoint


def read_json(path: Path) -> dict[str, Any]:
    """Raises `UnknownCheckpoint` naming the file that is absent or no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnknownCheckpoint(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UnknownCheckpoint(f"{path} holds a JSON {type(data).__name__}; expected an object")
    return data


def require_package(name: str, what: str) -> Any:
    """The module ``name``; `ExtraMissing` says which extra holds it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package, _, _ = name.partition(".")
        if error.name != package:
            raise
        raise ExtraMissing(
            f"{what} is read with {package!r}, which is not installed; pip install 'calmclip[nets]'"
        ) from None
