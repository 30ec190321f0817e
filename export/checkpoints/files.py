"""Helpers of the readers of checkpoints: files of another kind, a JSON file, an optional package."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from calmclip.models.errors import UnknownCheckpoint
from calmclip.models.extras import missing

_MISTAKEN = {  # first bytes of a file that is no part of a checkpoint -> what it is, and what to do
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch the file with 'git lfs pull'",
    b"<": "is a web page or XML; the download failed, fetch the file again",
    b"GGUF": "is a GGUF file; expected the published tensors, best as safetensors",
    b"\x89HDF": "is an HDF5 file of TensorFlow; expected tensors of torch, best as safetensors",
    b"\x08": "is an ONNX file or another protobuf; expected tensors of torch, best as safetensors",
    b"\x1f\x8b": "is compressed by gzip; unpack it",
}


def mistaken(path: Path) -> str | None:
    """Why an existing file cannot be a part of a checkpoint, from its first bytes; None if they do not tell."""
    with path.open("rb") as stream:
        start = stream.read(32)
    if not start:
        return "is empty; its download was cut short, fetch it again"
    return next((reason for mark, reason in _MISTAKEN.items() if start.lstrip().startswith(mark)), None)


def read_json(path: Path) -> dict[str, Any]:
    """Raises `UnknownCheckpoint` with the file, if it is absent or no JSON object."""
    try:
        if reason := mistaken(path):
            raise UnknownCheckpoint(f"{path} {reason}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnknownCheckpoint(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UnknownCheckpoint(f"{path} holds a JSON {type(data).__name__}; expected an object")
    return data


def require_package(name: str, what: str, extra: str = "nets") -> Any:
    """The module ``name``; `ExtraMissing` says which ``extra`` holds it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package, _, _ = name.partition(".")
        if error.name != package:
            raise
        raise missing(what, package, extra) from None
