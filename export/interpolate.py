"""The weights between two checkpoints of one layout, as tensors of the checkpoint and as a checkpoint on disk.

Source: Wortsman et al. 2022 (arXiv 2109.01903), equation 1: theta(a) = (1 - a) theta_A + a theta_B, tensor by tensor;
A is the zero-shot model, B the fine-tuned one. Magnitude pruning of theta_B - theta_A: Yu et al. 2023 (arXiv
2311.03099) and Yadav et al. 2023 (arXiv 2306.01708), step 1.

Tensors keep the checkpoint's names and dtypes. The mean is computed in float64 and rounded once; at 0 and 1 every
tensor has the bits of its side, and between them integers are A's. Every layout stores the logarithm of the scale
(`logit_scale`, or CLOOB's `logit_inv_tau`), so its mean is the geometric mean of the two scales.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from decimal import Decimal, InvalidOperation
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from calmclip.export import layouts
from calmclip.export.adapters import load_tensors
from calmclip.export.adapters.mix import mix
from calmclip.export.checkpoints import Checkpoint, Weights, hub, read
from calmclip.export.checkpoints.locate import weight_files
from calmclip.export.layouts import Layout
from calmclip.export.nets import NETS, Net
from calmclip.export.nets.clip import head
from calmclip.export.recipe import recognise
from calmclip.models.errors import BadRequest

State = Mapping[str, Tensor]
SCALE = "logit_scale"
_COPIED = (*hub.SUFFIXES[1:], ".md")  # endings of the files beside the weights that a written checkpoint keeps
_LINEAR = 1e-4  # of a tensor's largest number: more is no rounding of float32


def alphas(text: str) -> tuple[float, ...]:
    """Text such as 0:1:.1 (first, last, step; the last is included if the steps meet it) or 0,.5,1 -> rising numbers.

    Raises `BadRequest`.
    """
    expected = f"{text!r} is no list of alphas; expected FIRST:LAST:STEP such as 0:1:.1, or numbers such as 0,.5,1"
    try:
        if ":" in text:
            first, last, step = map(Decimal, text.split(":"))
            if not (step > 0 and first <= last and (last - first) / step <= 1000):
                raise BadRequest(f"{expected}, with FIRST <= LAST, STEP > 0 and at most 1001 numbers")
            numbers = [first + step * i for i in range(int((last - first) / step) + 1)]
        else:
            numbers = sorted({Decimal(part) for part in text.split(",")})
    except (InvalidOperation, ValueError):
        raise BadRequest(expected) from None
    if outside := [number for number in numbers if not 0 <= number <= 1]:
        raise BadRequest(f"alpha is {outside[0]}; expected numbers from 0 to 1")
    return tuple(map(float, numbers))


@dataclass(frozen=True)
class Ends:
    """Two checkpoints with tensors of the same names and shapes. ``net``: of A, not folded; its modules may be loaded
    with other tensors of the same shapes (`load`)."""

    a: Checkpoint
    b: Checkpoint
    layout: Layout
    net: Net

    def at(self, alpha: float) -> State:
        """The tensors by the checkpoint's names. Raises as `mix`."""
        if alpha in (0, 1):
            return self.b.tensors if alpha else self.a.tensors
        return mix(self.a.tensors, self.b.tensors, alpha, str(self.b.path))

    def load(self, tensors_there: State) -> Net:
        """The net, whose modules now hold these tensors, and its head."""
        state = layouts.translate(self.layout, replace(self.a, tensors=tensors_there))
        load_tensors(self.net, {name: tensor.clone() for name, tensor in state.items()})
        assert self.net.classifier is not None  # of a CLIP
        return replace(self.net, classifier=self.net.classifier.model_copy(update={"head": head(state)}))

    def layer_of(self, layers: Sequence[str]) -> dict[str, str]:
        """The checkpoint's name of a tensor -> the one of ``layers`` that it is a part of. A layer is the start of our
        names of its tensors."""
        layer_of = {}
        for name in self.a.tensors:
            ours = layouts.our_name(self.layout, name)
            if layer := next((layer for layer in layers if ours == layer or ours.startswith(f"{layer}.")), None):
                layer_of[name] = layer
        return layer_of


def open_ends(a: str, b: str, weights: Weights = Weights()) -> Ends:  # noqa: B008 - frozen
    """``a``, ``b``: a directory, a file, or ``hf:owner/name``.

    Raises `UnknownCheckpoint` for a checkpoint that cannot be read or whose tensors are not those of ``a``, by name;
    `BadRequest` for two layouts, other nets than CLIPs, two configurations that compute differently, and a layout whose
    tensors are not mixed by mixing what it stores.
    """
    paths = [hub.locate(path) for path in (a, b)]
    for path in paths:
        if (kind := recognise(str(path))[0]) != "clip":
            raise BadRequest(f"{path} is a net of the kind {kind}; expected two checkpoints of the CLIP family")
    first, second = (read(path, weights) for path in paths)
    fitting = [layouts.find(checkpoint) for checkpoint in (first, second)]
    names = [name for name, _ in filter(None, fitting)]
    if fitting[0] is None or names[0] != names[-1]:
        raise BadRequest(f"{paths[0]} has the layout {names[0]}, {paths[1]} {names[-1]}; expected one layout")
    layout = fitting[0][1]
    mix(first.tensors, second.tensors, 0, str(paths[1]))  # names and shapes
    unfolded = NETS.get("clip").unfolded
    assert unfolded is not None
    net = unfolded(str(paths[0]), weights)
    _check_same(net, unfolded(str(paths[1]), weights), paths[1])
    ends = Ends(first, second, layout, net)
    _check_linear(ends)
    return ends


def _check_same(net: Net, other: Net, path: Path) -> None:
    """Raises `BadRequest` if the other net computes something else with the same tensors."""
    if net.files != other.files:
        raise BadRequest(f"{path} has another tokenizer than {net.source.model}; expected the same")
    for role, tower in net.towers.items():
        if tower.preprocess != other.towers[role].preprocess:
            raise BadRequest(f"{path} prepares the input of {role} in another way than {net.source.model}")
        there = dict(other.towers[role].module.named_modules())
        for name, module in tower.module.named_modules():
            ours, theirs = _settings(module), _settings(there[name]) if name in there else {}
            if ours != theirs:
                key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
                where = ".".join(filter(None, (role, name)))
                raise BadRequest(
                    f"{path}: {where} has {key} = {theirs.get(key)}; {net.source.model} has {ours.get(key)}. The "
                    "weights between two nets that compute differently mean nothing"
                )


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    """What a module computes with beside tensors."""
    values: dict[str, Any] = {"class": type(module).__name__}
    for key, value in vars(module).items():
        if is_dataclass(value):
            values |= {f"{key}.{field.name}": getattr(value, field.name) for field in fields(value)}
        elif not key.startswith("_") and isinstance(value, bool | int | float | str | tuple | None):
            values[key] = value
    return values


def _check_linear(ends: Ends) -> None:
    """Mixing what the checkpoint stores must mix the weights. It does not where a product of two tensors is a weight,
    as in CLIP-SVD: there both checkpoints must have one of the two tensors in common."""
    first, second = (
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in checkpoint.tensors.items()}
        for checkpoint in (ends.a, ends.b)
    )
    stored = (first, second, mix(first, second, 0.5, str(ends.b.path)))
    a, b, middle = (layouts.translate(ends.layout, replace(ends.a, tensors=state)) for state in stored)
    for name, tensor in mix(a, b, 0.5, str(ends.b.path)).items():
        if name == SCALE or not tensor.is_floating_point():
            continue
        largest = max(float(side[name].abs().max()) for side in (a, b))
        if float((middle[name] - tensor).abs().max()) > _LINEAR * largest:
            raise BadRequest(
                f"{layouts.checkpoint_name(ends.layout, name)} is a product of tensors that differ between "
                f"{ends.a.path} and {ends.b.path}, so its mean is not that of the tensors; merge the products first"
            )


# --- pruning of what fine-tuning changed ------------------------------------------------------------------------------


def pruned(base: State, tuned: State, layer_of: Mapping[str, str], part: float) -> dict[str, Tensor]:
    """``tuned``, where each layer of ``layer_of`` (tensor -> its layer) keeps only the ``part`` of its n changes whose
    magnitude is largest: round(part n) numbers have the bits of ``tuned``, the others those of ``base``. Equal
    magnitudes: the first in the order of names and of memory is kept. Integers are those of ``tuned``.

    Raises `BadRequest` for a ``part`` outside 0 to 1.
    """
    if not 0 <= part <= 1:
        raise BadRequest(f"the part to keep is {part}; expected a number from 0 to 1")
    result = dict(tuned)
    for layer in dict.fromkeys(layer_of.values()):
        names = sorted(name for name, of in layer_of.items() if of == layer and tuned[name].is_floating_point())
        changes = [(tuned[name].double() - base[name].double()).abs().flatten() for name in names]
        order = torch.cat(changes).argsort(descending=True, stable=True)
        kept = torch.zeros(len(order), dtype=torch.bool)
        kept[order[: round(part * len(order))]] = True
        parts = torch.split(kept, [len(change) for change in changes])
        for name, mask in zip(names, parts, strict=True):
            result[name] = torch.where(mask.view(tuned[name].shape), tuned[name], base[name].to(tuned[name].dtype))
    return result


def require_stored(ends: Ends, layers: Sequence[str]) -> None:
    """Raises `BadRequest` for a layer of which the checkpoint has no tensor under a name of its own."""
    stored = {*ends.layer_of(layers).values()}
    if absent := [layer for layer in layers if layer not in stored]:
        raise BadRequest(
            f"{ends.layout.title} stores {absent[0]} inside of other tensors, so its changes cannot be pruned alone; "
            "choose other --layers, or leave out --modules"
        )


def chosen(layers: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The ``layers`` that one of ``patterns`` fits, such as image.blocks.*. Raises `BadRequest` for a pattern that fits
    none."""
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise BadRequest(f"no layer is called {pattern!r}; the layers are {', '.join(layers[:6])}, …")
    return [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in patterns)]


# --- checkpoints on disk ----------------------------------------------------------------------------------------------


def write(ends: Ends, state: State, directory: Path, note: str, *, over: bool = False) -> None:
    """Write a directory that `calmclip export` reads as it reads A: the tensors as safetensors, and the configurations,
    tokenizer and card of A. Complete or absent: it is made under a hidden name and renamed. ``note`` goes into the
    safetensors' metadata. Raises `BadRequest` if the directory exists, unless ``over``; OSError."""
    check_free(directory, over)
    with _hidden(directory) as made:
        if ends.a.path.is_dir():
            for file in sorted(ends.a.path.iterdir()):
                if file.is_file() and file.suffix in _COPIED and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, made / file.name)
        metadata = {"format": "pt", "calmclip": note}
        save_file({name: _own(tensor) for name, tensor in state.items()}, made / _file_name(ends.a), metadata)
        (made / _file_name(ends.a)).chmod(0o644)
        made.chmod(0o755)
        if directory.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
            os.replace(directory, old)
            shutil.rmtree(old)
        os.replace(made, directory)


def check_free(directory: Path, over: bool = False) -> None:
    """Raises `BadRequest`. A directory without weights is never replaced."""
    if not directory.exists():
        return
    if not over:
        raise BadRequest(f"{directory} exists; choose another --out, or add --replace")
    if not directory.is_dir() or not any(file.suffix == ".safetensors" for file in directory.iterdir()):
        raise BadRequest(f"{directory} is no checkpoint; choose another --out")


@contextmanager
def _hidden(directory: Path) -> Iterator[Path]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _file_name(checkpoint: Checkpoint) -> str:
    """Of safetensors beside the same configurations."""
    files = weight_files(checkpoint.path) if checkpoint.path.is_dir() else []
    return "open_clip_model.safetensors" if files and files[0].name.startswith("open_clip_") else "model.safetensors"


def _own(tensor: Tensor) -> Tensor:
    """Contiguous and alone in its memory, as safetensors needs it."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
