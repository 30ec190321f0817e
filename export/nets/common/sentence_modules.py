"""What follows an encoder in a directory of the library sentence-transformers: its pooling, layers and prompts.

Source: Reimers and Gurevych 2019 (arXiv 1908.10084), in the files of the library:

    modules.json                         Transformer in the directory itself, Pooling, Dense layers, Normalize
    1_Pooling/config.json                the pooling, and include_prompt: whether the tokens of a prompt are pooled
    2_Dense/config.json, weights         a layer and its activation
    sentence_bert_config.json            max_seq_length
    config_sentence_transformers.json    prompts, default_prompt_name
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from calmclip.export.checkpoints.files import read_json
from calmclip.export.checkpoints.locate import weight_files
from calmclip.export.checkpoints.weights import load_tensors
from calmclip.models.errors import UnknownCheckpoint

FILE = "modules.json"
_FLAG = "pooling_mode_"
_POOLS = {  # the library's names -> those of our towers
    "cls": "first",
    "cls_token": "first",
    "mean": "mean",
    "mean_tokens": "mean",
    "lasttoken": "last",
    "weightedmean": "weightedmean",
    "weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True)
class Dense:
    """weight [D', D], bias [D'] or None, float32; ``activation``: the class of torch that follows."""

    weight: Tensor
    bias: Tensor | None
    activation: str


@dataclass(frozen=True)
class Modules:
    """``pool``: as in our towers. ``context``: the largest number of tokens, if it is stated."""

    pool: str
    include_prompt: bool = True
    dense: tuple[Dense, ...] = ()
    context: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None

    def prompting(self) -> dict[str, Any]:
        """The fields of `TextPreprocess` on prompts. The input ``pooled`` is there if prompts are not pooled."""
        pooled = None if self.include_prompt else "pooled"
        return {"prompts": self.prompts, "prompt": self.prompt, "pooled": pooled}


def read_modules(folder: Path, activations: tuple[str, ...], pools: tuple[str, ...]) -> Modules:
    """``activations``, ``pools``: those that the tower has. Raises `UnknownCheckpoint` with the module or the setting
    that is not supported."""
    file = folder / FILE
    listed, pool, include_prompt = _listed(file), "", True
    dense: list[Dense] = []
    for index, entry in enumerate(listed):
        kind, path = str(entry.get("type", "")).rpartition(".")[2], str(entry.get("path", ""))
        if kind == "Transformer" and index == 0 and path in ("", "."):
            continue
        if kind == "Normalize" and index == len(listed) - 1:
            continue  # our vectors always have length 1
        if kind == "Pooling" and index == 1:
            pool, include_prompt = _pool(folder / path / "config.json", pools)
            continue
        if kind == "Dense" and pool:
            dense.append(_dense(folder / path, activations))
            continue
        raise UnknownCheckpoint(
            f"{file}: module {index} is {kind or '?'} in {path or '.'!r}; expected Transformer in the directory "
            "itself, Pooling, perhaps Dense layers, perhaps Normalize"
        )
    if not pool:
        raise UnknownCheckpoint(f"{file} names no Pooling; expected one after the Transformer")
    context = _optional(folder / "sentence_bert_config.json").get("max_seq_length")
    prompts, prompt = read_prompts(folder)
    context = context if isinstance(context, int) and context > 0 else None
    return Modules(pool, include_prompt, tuple(dense), context, prompts, prompt)


def _listed(path: Path) -> list[dict[str, Any]]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnknownCheckpoint(f"{path} cannot be read: {error}") from None
    if not (isinstance(listed, list) and all(isinstance(entry, dict) for entry in listed)):
        raise UnknownCheckpoint(f"{path} is no list of modules")
    return listed


def _pool(file: Path, pools: tuple[str, ...]) -> tuple[str, bool]:
    """Newer versions write pooling_mode, older ones a flag pooling_mode_* for each."""
    config = read_json(file)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name.removeprefix(_FLAG) for name, value in config.items() if name.startswith(_FLAG) and value]
    names = [modes] if isinstance(modes, str) else [*modes]
    if len(names) != 1 or _POOLS.get(names[0]) not in pools:
        expected = [name for name, ours in _POOLS.items() if ours in pools]
        raise UnknownCheckpoint(
            f"{file} pools by {' and '.join(names) or 'nothing'}; expected one of {', '.join(expected)}"
        )
    return _POOLS[names[0]], config.get("include_prompt", True) is not False


def _dense(folder: Path, activations: tuple[str, ...]) -> Dense:
    config = read_json(folder / "config.json")
    activation = str(config.get("activation_function", "")).rpartition(".")[2]
    if activation not in activations:
        raise UnknownCheckpoint(
            f"{folder}: activation_function is {activation or '?'}; expected one of {', '.join(activations)}"
        )
    tensors = load_tensors(weight_files(folder))
    if "linear.weight" not in tensors:
        raise UnknownCheckpoint(f"{folder} lacks linear.weight; expected the weights of a Dense layer")
    bias = tensors.get("linear.bias")
    return Dense(tensors["linear.weight"].float(), None if bias is None else bias.float(), activation)


def read_prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    """The prompts by name, and the name of the default. The library writes null for a prompt that is not set; {} in a
    prompt, the place of the text, is ours. Raises `UnknownCheckpoint`."""
    config = _optional(file := folder / "config_sentence_transformers.json")
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise UnknownCheckpoint(f"{file}: prompts is {str(prompts)[:80]!r}; expected texts by name")
    named, default = (
        {name: text for name, text in prompts.items() if text is not None},
        config.get("default_prompt_name"),
    )
    if default is not None and default not in named:
        raise UnknownCheckpoint(f"{file}: default_prompt_name is {default!r}; expected one of {sorted(named)}")
    return named, default


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
