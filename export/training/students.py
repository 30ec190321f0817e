"""The students of `calmclip distil`: what is trained, its inputs, and the checkpoint directory that is written.

mini    the built-in model's text tower of many languages; its projection is trained, its encoder stays
bert    a sentence encoder in the files of sentence-transformers; all of it, or a layer on top of it
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from calmclip.export import layouts
from calmclip.export.nets import Net
from calmclip.export.nets.mini import e5, minilm, multilingual, trained
from calmclip.export.nets.mini.facts import CONTEXT, E5_LAYERS
from calmclip.export.nets.mini.features import of_rows
from calmclip.export.nets.mini.modules import tensors
from calmclip.export.recipe import recognise
from calmclip.export.training.corpus import cached
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array
from calmclip.models.preprocess.text import TextPreparer

MODULES, DENSE = "modules.json", "linear.weight"  # of sentence-transformers
_RIDGE = 1e-4  # of the mean variance of a feature
_IDENTITY = "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class Student:
    """``module(*inputs(places))`` -> rows [b, D], of any length; ``places``: in the texts. ``write``: the trained
    checkpoint, into a directory."""

    module: nn.Module
    inputs: Callable[[Array], tuple[Tensor, ...]]
    write: Callable[[Path], None]


def open_student(checkpoint: str, projection: bool, texts: Sequence[str], goals: Array, cache: Path) -> Student:
    """``goals`` float32 [texts, D]: the teacher's vectors. ``cache``: the folder for features. Raises
    `UnknownCheckpoint`, and `BadRequest` for a checkpoint that is no student."""
    if Path(checkpoint).resolve() == cache.resolve():
        raise BadRequest(f"{checkpoint} is also the student to start from; choose another --out")
    name, plugin = recognise(checkpoint)
    if name == "mini":
        return _mini(checkpoint, texts, goals, cache)
    net = plugin.unfolded(checkpoint) if plugin.unfolded and name == "bert" else None
    if net is None or "text" not in net.towers or not (Path(checkpoint) / MODULES).is_file():
        raise BadRequest(
            f"{checkpoint} is a net of the kind {name} without {MODULES}; expected a sentence encoder in the files of "
            "sentence-transformers (config.json of BERT, modules.json), or mini"
        )
    return _sentences(net, Path(checkpoint), projection, texts, goals, cache)


# mini


def _mini(checkpoint: str, texts: Sequence[str], goals: Array, cache: Path) -> Student:
    directory = None if checkpoint == "mini" else Path(checkpoint)
    head = multilingual.projection(trained(directory, multilingual.PROJECTION))
    if goals.shape[1] != len(head["weight"]):
        raise BadRequest(
            f"the teacher has vectors of {goals.shape[1]} numbers; expected {len(head['weight'])}, those of mini"
        )
    encoder = multilingual.encoder(head["pieces"], directory)

    def compute() -> Array:
        tokenizer = Tokenizer.from_str(e5.tokenizer_json(encoder).decode())
        tokenizer.enable_truncation(CONTEXT)
        rows = [encoding.ids for encoding in tokenizer.encode_batch([*texts])]
        module = minilm.from_state(tensors(encoder.state), E5_LAYERS)
        return of_rows(module, rows, pad=multilingual.TEXTS.pad_id).numpy()

    features = torch.from_numpy(cached(cache, "features", [head["pieces"], texts], compute))
    centre = features.mean(dim=0)
    layer = _regressed(features - centre, goals)

    def write(out: Path) -> None:
        arrays = {"weight": layer.weight.half(), "centre": centre.half()}
        bits = torch.from_numpy(np.packbits(head["pieces"]))
        file = out / multilingual.PROJECTION.name
        save_file({**arrays, "pieces": bits}, file, metadata={"format": "pt"})
        file.chmod(0o644)

    return Student(layer, lambda places: (features[places] - centre,), write)


def _regressed(features: Tensor, goals: Array) -> nn.Linear:
    """A layer without a bias, which begins at the ridge regression of ``goals`` [N, D] on ``features`` [N, W]."""
    x, y = features.double(), torch.from_numpy(goals).double()
    products = x.T @ x
    products.diagonal().add_(_RIDGE * products.trace() / len(products))
    return _linear(torch.linalg.solve(products, x.T @ y).T.float())


def _linear(weight: Tensor) -> nn.Linear:
    """Without a bias, to be trained."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.load_state_dict({"weight": weight.contiguous()})
    return layer


# sentence-transformers


class _Projected(nn.Module):
    def __init__(self, tower: nn.Module, layer: nn.Linear | None) -> None:
        super().__init__()
        self.tower, self.layer = tower, layer

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        vectors: Tensor = self.tower(ids, mask)
        return vectors if self.layer is None else self.layer(vectors)


def _sentences(net: Net, directory: Path, projection: bool, texts: Sequence[str], goals: Array, cache: Path) -> Student:
    tower = net.towers["text"]
    spec = tower.preprocess
    assert isinstance(spec, TextPreprocess)
    with TemporaryDirectory() as folder:  # the checkpoint may have its tokenizer in other files
        (Path(folder) / spec.tokenizer).write_bytes(net.files["tokenizer.json"])
        preparer = TextPreparer(spec.model_copy(update={"truncate": True}), Path(folder))
    rows = [preparer.tokens(text, index) for index, text in enumerate(texts)]
    width = tower.outputs["text_embeds"].shape[-1]
    assert isinstance(width, int)
    if projection:
        key = [net.source.weights, net.files["tokenizer.json"], texts]
        tower.module.eval()
        compute = lambda: of_rows(tower.module, rows, pad=spec.pad_id).numpy()  # noqa: E731
        features = torch.from_numpy(cached(cache, "features", key, compute))
        layer = _regressed(features, goals)
        return Student(layer, lambda places: (features[places],), lambda out: _write(directory, out, layer, None))

    def inputs(places: Array) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, preparer.padded([rows[place] for place in places]).values()))

    last = None if width == goals.shape[1] else _linear(torch.eye(goals.shape[1], width))
    module = _Projected(tower.module.requires_grad_(True), last)
    return Student(module, inputs, lambda out: _write(directory, out, last, net))


def _write(directory: Path, out: Path, layer: nn.Linear | None, net: Net | None) -> None:
    """``directory`` with ``layer`` behind its vectors, and the weights of ``net``, if it was trained.

    The vectors are unit rows, and so is the answer: unit(L unit(D x)) = unit(L D x), so that the layer joins the last
    Dense layer.
    """
    listed: list[dict[str, Any]] = json.loads((directory / MODULES).read_text(encoding="utf-8"))
    dense = [entry for entry in listed if str(entry["type"]).endswith(".Dense")]
    last = dense[-1] if dense and _is_linear(directory / dense[-1]["path"]) else None
    state = {} if net is None else dict(net.towers["text"].module.state_dict())
    if net is not None and len(dense) > (last is not None):
        raise BadRequest(f"{directory} has a Dense layer with an activation; train a projection (--projection)")
    learned = {name: state.pop(f"projection.{name}") for name in ("weight", "bias") if f"projection.{name}" in state}
    _copy(directory, out, without=[] if net is None else [file.name for file in directory.glob("*.bin")])
    if net is not None:
        assert net.layout is not None
        named = {f"{net.towers['text'].prefix}{name}": tensor for name, tensor in state.items()}
        save_file(layouts.to_checkpoint(net.layout, named), out / "model.safetensors", metadata={"format": "pt"})
    if layer is not None or learned:
        entry = last or {"idx": len(listed), "name": str(len(listed)), "path": f"{len(listed)}_Dense"}
        before = learned or (_dense(directory / entry["path"]) if last else {})
        _write_dense(out / entry["path"], _joined(before, layer))
        if not last:
            listed.insert(_end(listed), {**entry, "type": "sentence_transformers.models.Dense"})
    (out / MODULES).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def _joined(before: Mapping[str, Tensor], layer: nn.Linear | None) -> dict[str, Tensor]:
    """``layer`` after the tensors ``weight`` and perhaps ``bias`` of another."""
    if layer is None:
        return dict(before)
    if not before:
        return {"weight": layer.weight.detach()}
    return {name: (layer.weight.double() @ tensor.double()).float() for name, tensor in before.items()}


def _end(listed: Sequence[Mapping[str, Any]]) -> int:
    """The place of a new module: before the last, if it normalizes."""
    return len(listed) - str(listed[-1]["type"]).endswith(".Normalize")


def _is_linear(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("activation_function", "")).endswith(".Identity")


def _dense(folder: Path) -> dict[str, Tensor]:
    file = folder / "model.safetensors"
    held = load_file(file) if file.is_file() else torch.load(folder / "pytorch_model.bin", weights_only=True)
    return {name.removeprefix("linear."): tensor.float() for name, tensor in held.items()}


def _write_dense(folder: Path, layer: Mapping[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    rows, columns = layer["weight"].shape
    config = {"in_features": columns, "out_features": rows, "bias": "bias" in layer, "activation_function": _IDENTITY}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    contiguous = {f"linear.{name}": tensor.contiguous() for name, tensor in layer.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def _copy(directory: Path, out: Path, without: Sequence[str]) -> None:
    for path in directory.iterdir():
        if path.is_dir() and (path / "config.json").is_file():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
        elif path.is_file() and path.name not in without:
            shutil.copyfile(path, out / path.name)
