"""Other singular values for the matrices of the blocks: W = U diag(s) V^T becomes U diag(s') V^T.

Source: CLIP-SVD, Koleilat et al. 2025 (arXiv 2509.03740), which trains s alone. q, k and v have a decomposition each,
as in the authors' code; biases stay. ``by`` is a number c, for s' = c s, or a file of tensors (safetensors or torch's):

    LAYER.vector_S      [r] or [1, r]               s', in the order of s, which falls
    LAYER.ratio         [r], [1, r] or one number   s' / s
    LAYER.fc_U.weight   [out, r]                    optional, both: U and V^T of the training, in any order of s
    LAYER.fc_V.weight   [r, in]

LAYER is the matrix's name in CLIP-SVD, in the checkpoint's layout, or ours, for example
``visual.transformer.resblocks.0.attn.q_proj`` or ``image.blocks.0.attn.q``. So a whole CLIP-SVD checkpoint is such a
file; its other tensors are not read.

The result is W + U diag(s' - s) V^T in float64: a matrix whose s' is s keeps its bits. Two decompositions of one W
differ in the signs of a pair u_j, v_j, which cancel in u_j v_j^T, and in the basis of vectors with one singular value.
That basis matters if their s' differ; then the file must hold U and V, or it is refused.

Cost: a decomposition in float64 for each matrix with values and without U and V, on one thread: .24 s for 768 x 768 and
.57 s for 3072 x 768, so about 25 s for the image tower of a ViT-B.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from calmclip.export import layouts, parity
from calmclip.export.adapters import ADAPTERS, Adapter, Context, load_tensors, tensors, with_note
from calmclip.export.checkpoints import hub, read
from calmclip.export.checkpoints.weights import PREFIXES
from calmclip.export.layouts import LAYOUTS
from calmclip.export.nets import Net
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest, UnknownCheckpoint

_MATRIX = re.compile(r"(.*\bblocks\.\d+\.)(attn\.(?:qkv|out|proj)|mlp\.(?:experts\.\d+\.)?(?:up|down|fc1|fc2))\.weight")
_TIE = 1e-6  # of the largest singular value: vectors of two that are closer depend on the rounding of W
_LOST = 1e-3  # of the largest singular value: the largest change of W that ties may leave open
_MISFIT = 1e-2  # largest part of W that U and V of a file may miss: they may be stored in 16 bits


def _number_or_path(value: Any) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value if isinstance(value, Path) else Path(value)
    if not (isfinite(number) and number > 0):
        raise ValueError(f"{value} is no factor; expected a number above 0, or a file of singular values")
    return number


class Params(FrozenModel):
    by: Annotated[float | Path, BeforeValidator(_number_or_path)] = Field(
        description="singular values of matrices: a factor, or a file of trained values (LAYER.vector_S or LAYER.ratio)"
    )
    layers: str = Field(default="*", description="the matrices of --svd-scale, such as 'image.*.attn.v' (default: all)")


@dataclass(frozen=True)
class Matrix:
    """``names``: ours first, then those in files. It is ``rows`` of the tensor ``tensor`` of the net."""

    names: tuple[str, ...]
    tensor: str
    rows: slice


def adapt(net: Net, params: Params, context: Context) -> Net:
    """Raises `BadRequest` for a net without such matrices, or if none is chosen; `UnknownCheckpoint` with the tensor
    of the file that does not fit."""
    state = {} if net.folded else tensors(net)
    if not (listed := matrices(net, state)):
        raise BadRequest(f"svd-scale does not apply to {net.source.model}: no block of it has matrices that it knows")
    chosen = [matrix for matrix in listed if any(fnmatchcase(name, params.layers) for name in matrix.names)]
    if not chosen:
        some = ", ".join(matrix.names[0] for matrix in listed[:6])
        raise BadRequest(f"svd-scale: no matrix is called {params.layers!r}; the matrices are {some}, …")
    changed: dict[str, Tensor] = {}

    def change(matrix: Matrix, values: Tensor) -> None:
        tensor = changed.setdefault(matrix.tensor, state[matrix.tensor].clone())
        tensor[matrix.rows] = values.to(tensor.dtype)

    if isinstance(params.by, float):
        for matrix in chosen:
            change(matrix, state[matrix.tensor][matrix.rows].double() * params.by)
        note, files = f"singular values of {len(chosen)} matrices times {params.by:g}", {}
    else:
        path, files = params.by, {"svd-scale": params.by}
        given, unread = _values(path, listed)
        with parity.one_thread():  # for the same bits on any number of cores
            for matrix in (used := [matrix for matrix in chosen if matrix.names[0] in given]):
                where = f"{path}: {matrix.names[0]}"
                change(matrix, scaled(state[matrix.tensor][matrix.rows], given[matrix.names[0]], where))
        note = f"singular values of {len(used)} matrices from {hub.name(path)}"
        context.say(f"svd-scale: {note}; {unread} other tensors of that file are not read")
    load_tensors(net, {**state, **changed})
    return with_note(net, note, **files)


def matrices(net: Net, state: Mapping[str, Tensor]) -> list[Matrix]:
    """The matrices of the blocks of ``net``, in order; q, k and v apart."""
    listed = []
    for tensor in state:
        if not (match := _MATRIX.fullmatch(tensor)):
            continue
        block, part = match.groups()
        parts = [f"attn.{letter}" for letter in "qkv"] if part == "attn.qkv" else [part]
        for piece, (name, rows) in enumerate(zip(parts, layouts.piece_rows(state, tensor, len(parts)), strict=True)):
            names = [f"{block}{name}"]
            names.append(layouts.checkpoint_name(LAYOUTS.get("clip_svd"), f"{names[0]}.S").removesuffix(".vector_S"))
            if net.layout is not None:
                theirs = layouts.checkpoint_name(net.layout, tensor, piece if len(parts) > 1 else None)
                names += [theirs.removesuffix(".weight")] if theirs != tensor else []  # q, k and v in one have no name
            names += [name.removeprefix(prefix) for name in names for prefix in PREFIXES]  # as `read` removes them
            listed.append(Matrix(tuple(dict.fromkeys(names)), tensor, rows))
    return listed


def scaled(weight: Tensor, given: Mapping[str, Tensor], where: str) -> Tensor:
    """``weight`` [out, in] with the singular values of ``given`` (vector_S or ratio; fc_U.weight and fc_V.weight), in
    float64. Raises `UnknownCheckpoint` for values that do not fit it."""
    weight = weight.double()
    if "fc_U.weight" in given and "fc_V.weight" in given:
        u, v = (given[f"fc_{letter}.weight"].double() for letter in "UV")
        if u.ndim != 2 or v.ndim != 2 or u.shape[1] != len(v) or (len(u), v.shape[-1]) != tuple(weight.shape):
            shapes = f"fc_U.weight {list(u.shape)} and fc_V.weight {list(v.shape)}"
            raise UnknownCheckpoint(f"{where}: {shapes} do not make a matrix of the shape {list(weight.shape)}")
        s, ties = ((u.T @ weight) * v).sum(dim=1), False
        missed = float((weight - (u * s) @ v).norm() / weight.norm().clamp(min=1e-30))
        if missed > _MISFIT:
            raise UnknownCheckpoint(
                f"{where}: its fc_U and fc_V miss {missed:.1%} of this checkpoint's matrix; expected the U and V of "
                "the model that was tuned"
            )
    else:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        ties = True
    name = "vector_S" if "vector_S" in given else "ratio"
    values = given[name].double().flatten()
    if len(values) != len(s) and not (name == "ratio" and len(values) == 1):
        raise UnknownCheckpoint(f"{where}: {name} holds {len(values)} numbers; expected {len(s)}")
    if not values.isfinite().all():
        raise UnknownCheckpoint(f"{where}: {name} holds infinities or NaN; its training diverged")
    change = (values if name == "vector_S" else s * values) - s
    tied = (s[:-1] - s[1:]).abs() <= _TIE * s.max()
    if ties and bool((change.diff().abs()[tied] > _LOST * s.max()).any()):
        raise UnknownCheckpoint(
            f"{where}: some singular values of this matrix are equal, and {name} changes them unequally, so the result "
            "depends on the U and V of the training; add fc_U.weight and fc_V.weight to the file"
        )
    return weight + (u * change) @ v


def _values(path: Path, listed: Sequence[Matrix]) -> tuple[dict[str, dict[str, Tensor]], int]:
    """-> our name of each matrix with singular values -> its tensors, and the number of tensors that are not read."""
    ours = {name: matrix.names[0] for matrix in listed for name in matrix.names}
    given: dict[str, dict[str, Tensor]] = {}
    stored = read(path).tensors
    for name, tensor in stored.items():
        for kind in ("vector_S", "ratio", "fc_U.weight", "fc_V.weight"):
            if name.endswith(f".{kind}"):
                given.setdefault(name.removesuffix(f".{kind}"), {})[kind] = tensor
    given = {layer: kinds for layer, kinds in given.items() if "vector_S" in kinds or "ratio" in kinds}
    if not given:
        raise UnknownCheckpoint(f"{path} holds no singular values; expected tensors LAYER.vector_S or LAYER.ratio")
    if unknown := [layer for layer in given if layer not in ours]:
        some = ", ".join(listed[0].names[:3])
        raise UnknownCheckpoint(f"{path}: {unknown[0]} is no matrix of this checkpoint; the first of them is {some}")
    return {ours[layer]: kinds for layer, kinds in given.items()}, len(stored) - sum(map(len, given.values()))


ADAPTERS.register("svd-scale")(Adapter(Params, adapt, {"--svd-scale": "by", "--svd-layers": "layers"}))
