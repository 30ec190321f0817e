"""Which files of a path hold a checkpoint's tensors. Nothing here reads a tensor, so no torch is needed."""

import hashlib
import json
from pathlib import Path

from calmclip.models.errors import UnknownCheckpoint

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
NAMES = (  # files of weights in a directory; the first that exists is read
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class NoWeights(UnknownCheckpoint):
    """The path holds no file of weights."""


def weight_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors. Raises `UnknownCheckpoint` if the choice is not clear, and its
    subclass `NoWeights` if there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise NoWeights(f"{path} is no file or directory; expected a checkpoint")
    try:
        files = {p.name: p for p in path.iterdir() if p.is_file()}
    except OSError as error:
        raise UnknownCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    for name in NAMES:
        if name in files:
            return _shards(files[name]) if name.endswith(".json") else [files[name]]
    weights = sorted(p for p in files.values() if p.suffix in SUFFIXES)
    if len(weights) == 1:
        return weights
    if not weights:
        raise NoWeights(
            f"{path} holds no file of weights; expected {NAMES[1]}, or one that ends in {', '.join(SUFFIXES)}"
        )
    names = ", ".join(p.name for p in weights)
    raise UnknownCheckpoint(f"{path} holds several files of weights ({names}); name one, or call it {NAMES[1]}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UnknownCheckpoint(f"{index} is no index of shards: {one_line(repr(error))}") from None
    if not names:
        raise UnknownCheckpoint(f"{index} names no shard; expected file names in weight_map")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise UnknownCheckpoint(f"{index} names the shard {name!r}, which is not beside it")
    return [index.parent / name for name in names]


def weights_sha256(path: Path) -> dict[str, str]:
    """Weight file -> sha256, for the manifest's `source`."""
    digests = {}
    for file in weight_files(path):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def one_line(text: object, most: int = 200) -> str:
    """The text of a library or a file, printable and short, for use in an error of ours."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in words[:most])
