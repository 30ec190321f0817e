"""Params of `dense` that add what segmenters pool patches by: CLIP-DINOiser's layers, the tower's own keys, a guide."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from calmclip.export.adapters._guide import guide
from calmclip.export.checkpoints import hub, read
from calmclip.export.nets import Tower
from calmclip.export.towers.dense import INNER, Extra, Grid
from calmclip.export.towers.keys import OwnKeys, dinoiser
from calmclip.models.bundle.manifest import GUIDE, ImagePreprocess
from calmclip.models.bundle.manifest import Tensor as Spec
from calmclip.models.errors import BadRequest, UnknownCheckpoint

NAMES = tuple(f"{layer}.{part}" for layer in ("obj_proj", "bkg_decoder") for part in ("weight", "bias"))


@dataclass(frozen=True)
class Additions:
    """``inputs``: of the graph beside the pixels; ``extras``: output -> what makes it, [B, h, w, *`Extra.shape`];
    ``towers``: more of the net's; ``grid``: of the map, if it is not that of the tower's patches."""

    inputs: Mapping[str, Spec] = field(default_factory=dict)
    extras: Mapping[str, Extra] = field(default_factory=dict)
    towers: Mapping[str, Tower] = field(default_factory=dict)
    grid: Grid | None = None


@dataclass(frozen=True)
class Wanted:
    """Params of `dense`: is the last block ``guided``; a ``guide``'s graph and the name of its ``norm``; the file of
    CLIP-DINOiser's layers."""

    guided: bool
    guide: Path | None
    norm: str
    dinoiser: Path | None


def additions(wanted: Wanted, blocks: nn.ModuleList, gathers: bool, seen: ImagePreprocess, like: Tower) -> Additions:
    """``blocks``: of the tower; ``gathers``: `Reader.gathers`; ``seen``: how `dense` sees a picture; ``like``: the
    image tower. Raises `BadRequest`; `UnknownCheckpoint` with the tensor that is absent or of another shape."""
    check(wanted, blocks, gathers)
    first: Any = blocks[0]
    width = len(first.norm1.weight)
    if wanted.dinoiser is not None:
        return Additions(extras=dinoiser(read_dinoiser(wanted.dinoiser, width)))
    if wanted.guide is not None:
        tower = guide(wanted.guide, wanted.norm, seen, like)
        patches = tower.outputs["patches"]
        _, rows, columns, _ = patches.shape
        return Additions({GUIDE: patches}, towers={GUIDE: tower}, grid=(int(rows), int(columns)))
    return Additions(extras={"keys": OwnKeys(width)}) if wanted.guided else Additions()


def check(wanted: Wanted, blocks: nn.ModuleList, gathers: bool) -> None:
    """Raises `BadRequest` for params that do not fit each other or the tower."""
    if wanted.guide is not None and not wanted.guided:
        raise BadRequest("--guide is read by --dense guided alone; leave it out, or choose that method")
    if wanted.guide is not None and wanted.dinoiser is not None:
        raise BadRequest("--guide and --dinoiser both give keys; leave out one of them")
    if (wanted.guided or wanted.dinoiser is not None) and len(blocks) < -INNER:
        option = "--dense guided" if wanted.guided else "--dinoiser"
        raise BadRequest(f"{option} reads the third block from the end; the tower has {len(blocks)}")
    if wanted.guided and not gathers:
        raise BadRequest("--dense guided needs a tower whose last block gathers the picture in a class token")
    if wanted.guided and getattr(getattr(blocks[-1], "attn", None), "gate", None) is not None:
        raise BadRequest("--dense guided does not apply to a tower with gated attention, whose gates belong to its q")


def read_dinoiser(file: Path, width: int) -> Mapping[str, Tensor]:
    """The tensors of `NAMES`; others of the file are not read, such as those of the whole model. Raises
    `UnknownCheckpoint`."""
    given = read(file).tensors
    shapes: dict[str, list[int | None]] = {
        "obj_proj.weight": [None, width, None, None], "obj_proj.bias": [None],
        "bkg_decoder.weight": [1, width, 1, 1], "bkg_decoder.bias": [1],
    }  # fmt: skip
    for name in NAMES:
        if name not in given:
            raise UnknownCheckpoint(f"{hub.name(file)} lacks {name}, which CLIP-DINOiser's training writes")
        shape, wanted = [*given[name].shape], shapes[name]
        fits = len(shape) == len(wanted) and all(a in (None, b) for a, b in zip(wanted, shape, strict=True))
        if not fits or not given[name].isfinite().all():
            expected = ["any" if side is None else side for side in wanted]
            raise UnknownCheckpoint(
                f"{hub.name(file)}: {name} has the shape {shape}; expected {expected}, finite, for blocks of the width "
                f"{width}"
            )
    rows, columns = given["obj_proj.weight"].shape[2:]
    if rows != columns or rows % 2 == 0 or len(given["obj_proj.bias"]) != len(given["obj_proj.weight"]):
        raise UnknownCheckpoint(
            f"{hub.name(file)}: obj_proj.weight is {[*given['obj_proj.weight'].shape]} with a bias of "
            f"{len(given['obj_proj.bias'])}; expected a square of an odd side, and a bias for each output"
        )
    return {name: given[name] for name in NAMES}
