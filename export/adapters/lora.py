"""LoRA that the library peft trained, merged into the weights: W + s B A, with s = alpha / r, or alpha / sqrt(r).

Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1; rank-stabilized: Kalajdzievski 2023 (arXiv 2312.03732); DoRA:
Liu et al. 2024 (arXiv 2402.09353), equation 5: m (W + s B A) / |W + s B A|, with a norm for each output.

An adapter names tensors as the class of transformers that it was trained over. These names may begin otherwise than the
checkpoint's (``model.layers.0`` and ``layers.0``): the beginning that gives most tensors a place is taken, and every
tensor must have one, or be of a layer that the net does not have, such as the logits of words. Biases and whole modules
that were trained too replace the checkpoint's. Several adapters are merged in their order, each over the result of
those before it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from calmclip.export import layouts, parity
from calmclip.export.adapters import ADAPTERS, Adapter, Context, load_tensors, tensors, with_note
from calmclip.export.checkpoints import hub, peft
from calmclip.export.checkpoints.locate import one_line
from calmclip.export.layouts import Layout, Place
from calmclip.export.nets import Net
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest, UnknownCheckpoint

_PART = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.(weight|bias))?")
# Settings that a merge does not depend on. peft ignores fan_in_fan_out for layers [out, in], which all of ours are.
_TRAINING = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save",
    "layers_to_transform", "layers_pattern", "megatron_core", "eva_config", "qalora_group_size", "lora_bias",
    "runtime_config", "ensure_weight_tying", "velora_config",
}  # fmt: skip
_BASE_STAYS = (None, True, False, "gaussian", "eva", "orthogonal")  # other initial values also change the base


class Params(FrozenModel):
    checkpoint: Path = Field(description="LoRA that peft trained over this checkpoint, a directory; repeatable")
    tower: str = Field(default="", description="the tower of --lora, text or image, if its names fit both")


class Settings(BaseModel):
    """The part of adapter_config.json that a merge depends on. A pattern is a regular expression of a path's end."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    r: int = Field(ge=1)
    lora_alpha: float
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str | None = None


@dataclass(frozen=True)
class Lora:
    """The change s B A of one weight.

    ``up`` is B [out, r] and ``down`` A [r, in] of a weight [out, in]. Of a table of embeddings [rows, width] they are
    [width, r] and [r, rows] (``table``). ``magnitude`` [out] or [width]: DoRA's m. ``bias`` [out]: of B.
    """

    down: Tensor
    up: Tensor
    scale: float
    table: bool = False
    magnitude: Tensor | None = None
    bias: Tensor | None = None


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` for a net without the names of its checkpoint, or without the tower; `UnknownCheckpoint` with
    the setting that is not supported, or the tensors that do not fit."""
    base = tensors(net)
    if net.layout is None:
        raise BadRequest(f"lora does not apply to {net.source.model}: a {net.name} net has no names of a checkpoint")
    if params.tower and params.tower not in net.towers:
        raise BadRequest(f"lora: {net.source.model} has no tower {params.tower!r}; expected {' or '.join(net.towers)}")
    tuned = peft.read(params.checkpoint, "LORA")
    with parity.one_thread():  # for the same bits on any number of cores
        changed, unused = merge(net.layout, base, tuned, net.towers[params.tower].prefix if params.tower else "")
    load_tensors(net, {**base, **changed})
    if unused:
        context.say(f"lora: {len(unused)} tensors of layers that this net does not have are left out: {_some(unused)}")
    before = net.adapters.count("lora")
    key, (config, weights) = f"lora-{before + 1}" if before else "lora", tuned.files
    note = f"LoRA {hub.name(tuned.path)}" + f" over {tuned.base}" * bool(tuned.base)
    return with_note(with_note(net, note, **{key: weights}), "", **{key: config})


def merge(
    layout: Layout, base: Mapping[str, Tensor], tuned: peft.Tuned, prefix: str = ""
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of ``base`` that the adapter changes, by our names, which begin with ``prefix``; and those of the
    adapter that are not used. Raises `UnknownCheckpoint`."""
    settings = read_settings(tuned)
    parts: dict[str, dict[str, Tensor]] = {}  # module -> what its LoRA consists of
    wholes: dict[str, Tensor] = {}  # tensor -> its trained values
    for name, tensor in tuned.tensors.items():
        if match := _PART.fullmatch(name):
            module, part, end = match.groups()
            parts.setdefault(module, {})["bias" if end == "bias" else part] = tensor
        else:
            wholes[name.replace(".base_layer.", ".")] = tensor
    loras = {module: _lora(module, part, settings, tuned) for module, part in parts.items()}
    wanted = [*wholes, *(f"{module}.weight" for module in loras)]
    wanted += [f"{module}.bias" for module, lora in loras.items() if lora.bias is not None]
    places = placed(wanted, layout, base, prefix, tuned)
    changed = {place.ours: base[place.ours].clone() for place in places.values()}
    for name, tensor in wholes.items():
        if place := places.get(name):
            rows = changed[place.ours][place.rows]
            rows.copy_(_fitting(place.convert(tensor) if place.convert else tensor, rows, f"{tuned.path}: {name}"))
    for module, lora in loras.items():
        where = f"{tuned.path}: {module}"
        if place := places.get(f"{module}.weight"):
            weight = changed[place.ours][place.rows]
            weight.copy_(merged(weight, lora, where))
        if lora.bias is not None and (place := places.get(f"{module}.bias")):
            bias = changed[place.ours][place.rows]
            bias.copy_(bias.double() + lora.scale * _fitting(lora.bias, bias, where).double())
    return changed, [name for name in wanted if name not in places]


def read_settings(tuned: peft.Tuned) -> Settings:
    """Raises `UnknownCheckpoint` with the setting that is not supported."""
    file = tuned.path / peft.CONFIG
    try:
        settings = Settings.model_validate(tuned.config)
        for pattern in (*(settings.rank_pattern or {}), *(settings.alpha_pattern or {})):
            re.compile(pattern)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UnknownCheckpoint(f"{file}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except re.error as error:
        raise UnknownCheckpoint(
            f"{file}: the pattern {one_line(pattern, 60)} is no regular expression: {error}"
        ) from None
    known = _TRAINING | {*Settings.model_fields}
    odd = {name: value for name, value in tuned.config.items() if value and name not in known}
    if settings.init_lora_weights not in _BASE_STAYS:
        odd["init_lora_weights"] = settings.init_lora_weights
    if odd:
        name, value = min(odd.items())
        raise UnknownCheckpoint(
            f"{file}: {name} is {one_line(repr(value), 60)}, which is not supported; merge the adapter into its base "
            "with peft (merge_and_unload), and export the result"
        )
    return settings


def placed(
    wanted: Sequence[str], layout: Layout, base: Mapping[str, Tensor], prefix: str, tuned: peft.Tuned
) -> dict[str, Place]:
    """Tensor of the adapter -> its place in ``base``, among our tensors whose names begin with ``prefix``. The
    adapter's names are those of the checkpoint with another beginning, one for all. Tensors that the layout knows and
    ``base`` does not have are left out.

    Raises `UnknownCheckpoint` with the tensors that have no place, or if two beginnings fit equally well.
    """
    known = layouts.places(layout, base)
    names = {name: place for name, place in known.items() if place.ours.startswith(prefix)}
    fits = Counter[tuple[str, str]]()  # (what is removed, what takes its place) -> the tensors that then have a place
    for tensor, name in product(wanted, names):
        if f".{name}".endswith(f".{tensor}"):
            fits["", name.removesuffix(tensor)] += 1
        elif tensor.endswith(f".{name}"):
            fits[tensor.removesuffix(name), ""] += 1
    best = sorted(pair for pair, count in fits.items() if count == max(fits.values()))
    if len(best) > 1:
        both = " and ".join(new + wanted[0].removeprefix(old) for old, new in best[:2])
        raise UnknownCheckpoint(f"{tuned.path}: its tensors fit {both}; name the tower: --lora-tower text, or image")
    old, new = best[0] if best else ("", "")
    theirs = {tensor: new + tensor.removeprefix(old) for tensor in wanted}
    lost = [tensor for tensor, name in theirs.items() if name not in names]
    unknown = [t for t in lost if theirs[t] in known or not layouts.count_known(layout, [theirs[t]])]
    if unknown or len(lost) == len(theirs):
        source = tuned.base or "the model that was tuned"
        raise UnknownCheckpoint(
            f"{tuned.path}: {len(unknown or lost)} of its {len(wanted)} tensors have no place: "
            f"{_some(unknown or lost)}; the checkpoint's are called {_some(sorted(names), 1)}. Is it {source}?"
        )
    return {tensor: names[name] for tensor, name in theirs.items() if name in names}


def merged(weight: Tensor, lora: Lora, where: str) -> Tensor:
    """``weight`` after the change, computed in float64. Raises `UnknownCheckpoint` for shapes that do not fit it."""
    down, up = lora.down.double().flatten(1), lora.up.double().flatten(1)
    matrix = (weight.T if lora.table else weight.flatten(1)).to(torch.float64, copy=True)
    if up.shape[-1] != len(down) or (len(up), down.shape[-1]) != tuple(matrix.shape):
        raise UnknownCheckpoint(
            f"{where}: A {list(lora.down.shape)} and B {list(lora.up.shape)} make no change of a weight "
            f"{list(weight.shape)}"
        )
    matrix.addmm_(up, down, alpha=lora.scale)
    if lora.magnitude is not None:
        norms = matrix.norm(dim=1)
        matrix = matrix * (_fitting(lora.magnitude.flatten(), norms, where).double() / norms)[:, None]
    return (matrix.T if lora.table else matrix.reshape(weight.shape)).to(weight.dtype)


def _lora(module: str, parts: Mapping[str, Tensor], settings: Settings, tuned: peft.Tuned) -> Lora:
    table = "embedding_A" in parts
    wanted = ["embedding_A", "embedding_B"] if table else ["A", "B"]
    wanted += ["magnitude_vector"] if settings.use_dora else []
    if absent := [part for part in wanted if part not in parts]:
        raise UnknownCheckpoint(f"{tuned.path} lacks {module}.lora_{absent[0]}")
    if extra := parts.keys() - {*wanted, "bias"}:
        raise UnknownCheckpoint(
            f"{tuned.path} holds {module}.lora_{min(extra)}, which its {peft.CONFIG} does not mention"
        )
    down, up = (parts[part] for part in wanted[:2])
    rank = int(_by_pattern(settings.rank_pattern, module, settings.r))
    if down.ndim < 2 or up.ndim < 2 or len(down) != rank:
        raise UnknownCheckpoint(
            f"{tuned.path}: {module} has A {list(down.shape)} and B {list(up.shape)}; expected the rank {rank} of its "
            f"{peft.CONFIG}"
        )
    alpha = _by_pattern(settings.alpha_pattern, module, settings.lora_alpha)
    scale = alpha / (rank**0.5 if settings.use_rslora else rank)
    return Lora(down, up, scale, table, parts.get("magnitude_vector"), parts.get("bias"))


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that a path ends in, as in peft."""
    fitting = (value for pattern, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
    return next(fitting, default)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + ", …" * (len(names) > most)


def _fitting(tensor: Tensor, like: Tensor, where: str) -> Tensor:
    if tensor.shape != like.shape:
        raise UnknownCheckpoint(f"{where} has the shape {list(tensor.shape)}; expected {list(like.shape)}")
    return tensor


ADAPTERS.register("lora")(Adapter(Params, adapt, {"--lora": "checkpoint", "--lora-tower": "tower"}))
