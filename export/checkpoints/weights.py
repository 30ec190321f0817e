"""Files of weights -> tensors by name: safetensors, torch's zip and older pickles, TorchScript archives.

The first bytes of a file tell its kind, not its name. Pickles are read with ``weights_only``: tensors, plain containers
and parsed flags of a training (argparse.Namespace); other objects are refused by name. TorchScript archives (OpenAI's
.pt) are read without running their program: see `torchscript`. Every error is an `UnknownCheckpoint` of one line that
names the file, and the key if there is one.
"""

import argparse
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calmclip.export.checkpoints import pickles, torchscript
from calmclip.export.checkpoints.files import mistaken
from calmclip.export.checkpoints.locate import one_line
from calmclip.models.errors import UnknownCheckpoint

# keys of a training file that hold the tensors
WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "prompt_learner")
DECODER = "decoder."  # prefix for GRAIN, whose training file keeps two modules; the backbone gets no prefix
PREFIXES = ("module.", "model.", "clip.")  # removed if all names have it: from parallel training or an outer module
INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch's wrappers, at any depth
_REFUSED = re.compile(r"Unsupported global: GLOBAL ([\w.]+)")  # torch's error text


def load_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors, unwrapped. Raises `UnknownCheckpoint` with the file that is damaged or of another kind."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        shard = _unwrap(_load(file), file)
        if twice := tensors.keys() & shard.keys():
            raise UnknownCheckpoint(f"{file} holds {min(twice)}, which another shard holds too")
        tensors |= shard
    return tensors


def _load(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            start = stream.read(9)
        if start[8:9] == b"{":
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if reason := mistaken(file):
            raise UnknownCheckpoint(f"{file} {reason}")
        if start[:2] == b"PK":
            _check_zip(file)
            if torchscript.is_archive(file):
                return torchscript.read(file)
            return _unpickled(file, mmap=True)
        return _unpickled(file, mmap=False)
    except SafetensorError as error:
        raise UnknownCheckpoint(f"{file} is a damaged safetensors file: {one_line(error)}") from None
    except UnknownCheckpoint:
        raise
    except Exception as error:  # torch's unpickler raises any kind
        raise UnknownCheckpoint(f"{file} {_reason(error, file)}") from None


def _reason(error: Exception, file: Path) -> str:
    """A clause. Torch's own text is a paragraph on how to run a refused name; only the name is taken from it."""
    words = str(error)
    refused = _REFUSED.search(words)
    if name := refused[1] if refused else pickles.foreign_name(file):
        return (
            f"is a pickle that asks for {one_line(name)}, which is not run; save only its tensors, best as safetensors"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if "weights_only" in words:
        return "is damaged or no file of weights; expected safetensors, or a state dict that torch.save wrote"
    return f"is damaged or holds no weights: {one_line(words, 160) or type(error).__name__}"


class Unread:
    """Stands for an optimizer or a schedule of a training, whose code does not run."""

    def __setstate__(self, state: Any) -> None:
        """Forgets the state."""


def _container(*_: Any) -> dict[Any, Any]:
    """Stands for a defaultdict, which torch's reader does not fill."""
    return {}


# prefix of a name -> its stand-in; nothing here reads the objects of these types
_STAND_INS: dict[str, Callable[..., Any]] = {
    "torch.optim.": Unread,
    "collections.defaultdict": _container,
    "builtins.dict": _container,
}


def _unpickled(file: Path, *, mmap: bool) -> Any:
    """Torch reads a path that ends in .safetensors as safetensors, so such a file is passed as a stream."""
    names = [name.replace("__builtin__", "builtins") for name in pickles.names(file)]  # Python 2's name of it
    unread = [(stand, name) for name in names for prefix, stand in _STAND_INS.items() if name.startswith(prefix)]
    with torch.serialization.safe_globals([argparse.Namespace, *unread]), file.open("rb") as stream:
        mmap = mmap and file.suffix != ".safetensors"
        return torch.load(file if mmap else stream, map_location="cpu", weights_only=True, mmap=mmap)


def _check_zip(file: Path) -> None:
    """Refuses compressed parts, which might unpack to more than the file. Torch compresses only programs, which are not
    read."""
    with zipfile.ZipFile(file) as archive:
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            parts = ", ".join(one_line(name, 40) for name in archive.namelist()[:3])
            raise UnknownCheckpoint(f"{file} is a zip without data.pkl, which torch's have; it holds {parts}")
        for part in archive.infolist():
            if "/code/" not in part.filename and part.compress_type != zipfile.ZIP_STORED:
                raise UnknownCheckpoint(f"{file}: its part {one_line(part.filename)} is compressed; torch's never are")


def _unwrap(content: Any, file: Path) -> dict[str, Tensor]:
    """The tensors in the content of a training file."""
    if isinstance(content, Mapping) and isinstance(content.get("backbone_state_dict"), Mapping):
        state = content.get("state_dict")
        decoder = _tensors(state, file) if isinstance(state, Mapping) else {}
        return _tensors(content["backbone_state_dict"], file) | {DECODER + name: t for name, t in decoder.items()}
    for _ in range(8):  # a mapping may contain itself
        inner = [
            content[key] for key in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
        ]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping):
        raise UnknownCheckpoint(f"{file} holds a {type(content).__name__}; expected tensors by name")
    return _tensors(content, file)


def _tensors(content: Mapping[Any, Any], file: Path) -> dict[str, Tensor]:
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(one_line(key, 40) for key in list(content)[:5]) or "none"
        raise UnknownCheckpoint(f"{file} holds no tensors; its keys are {keys}")
    for name, tensor in tensors.items():
        if not name.isprintable() or len(name) > 200:
            raise UnknownCheckpoint(f"{file} holds a tensor with the name {name[:60]!r}; expected a printable one")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
            raise UnknownCheckpoint(f"{file}: {name} is {kind}; expected plain numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UnknownCheckpoint(
                f"{file}: {name} has the shape {list(tensor.shape)}, more numbers than the file holds"
            )
    for wrapper in INSIDE:
        tensors = {name.replace(wrapper, ""): tensor for name, tensor in tensors.items()}
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
