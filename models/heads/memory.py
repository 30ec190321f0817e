"""Memory head: how far a vector lies from the patches of normal pictures.

Source: PatchCore, Roth et al. 2022 (arXiv 2106.08265), sections 3.1 and 3.2: the memory and its greedy coreset, chosen
         on a random projection. The distance is that of WinCLIP, Jeong et al. 2023 (arXiv 2303.14814), section 4.4.
In:     image [B, D], unit rows: patches of a picture.
Assets: patches float32 [M, D], unit rows; side float32 [C], -1 for normal and 1 for damaged; distances float32 [N]: of
        each normal picture the largest distance of a patch to the patches of the others; empty for one picture.
Out:    d = (1 - the highest cosine) / 2; logits float32 [B, C] = scale * side * (d - threshold); the threshold is a
        quantile of the distances; scores sum to 1 over C.

The task `anomaly` compares all patches of a picture. For `classify` a picture is one patch, its vector.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays
from calmclip.models.heads import HEADS, Asset, Columns, Examples, Fit, Head
from calmclip.models.heads.cosine import softmax

SIDES = ("normal", "damaged")
AT_ONCE = 1 << 22  # cosines
POOL = 8  # patches that the coreset is chosen from, for each patch of it
PROJECTED = 64  # dimensions in which it is chosen


class Params(FrozenModel):
    scale: float = Field(default=100.0, gt=0, le=1e4)
    coreset: int = Field(default=4096, ge=1, le=65_536, description="patches that are kept, at most")
    quantile: float = Field(default=1.0, ge=0, le=1, description="of the normal pictures' distances: the threshold")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the coreset")


def distances(rows: Array, patches: Array) -> Array:
    """Unit rows [P, D] and the memory [M, D] -> float32 [P] in [0, 1]. Memory: `AT_ONCE` numbers; time grows with
    P * M * D."""
    step = max(1, AT_ONCE // len(patches))
    highest = [(rows[start : start + step] @ patches.T).max(axis=1) for start in range(0, len(rows), step)]
    halves: Array = np.clip((1 - np.concatenate(highest)) / 2, 0, 1)
    return halves


def coreset(rows: Array, most: int, seed: int) -> Array:
    """-> indices of at most ``most`` of the ``rows`` [K, D]: each next one is the farthest from those before it, so
    that no row is far from all (k-center). All of them if there are no more than ``most``.

    Above `POOL` times as many rows, a random part of them is looked at. Time grows with their number times ``most``.
    """
    if len(rows) <= most:
        return np.arange(len(rows))
    draw = np.random.default_rng(seed)
    pool = np.sort(draw.permutation(len(rows))[: POOL * most])
    dim = rows.shape[1]
    near = rows[pool] @ draw.standard_normal((dim, min(dim, PROJECTED))).astype(np.float32)
    squares = (near**2).sum(axis=1)
    chosen = [int(draw.integers(len(pool)))]
    gaps = np.full(len(pool), np.inf, np.float32)
    while len(chosen) < most:
        last = chosen[-1]
        np.minimum(gaps, squares + squares[last] - 2 * (near @ near[last]), out=gaps)
        gaps[last] = -np.inf
        chosen.append(int(gaps.argmax()))
    picked: Array = np.sort(pool[chosen])
    return picked


def fit(examples: Examples, params: Params) -> Arrays:
    """Raises `BadRequest` without a normal picture. Pictures of `damaged` are not remembered."""
    shown = np.flatnonzero(examples.truth == 0).tolist()
    if not shown:
        raise BadRequest(f"the label {examples.labels[0]!r} has no picture; expected at least one")
    views = [_views(examples, index) for index in shown]
    rows = np.concatenate([view.reshape(-1, view.shape[-1]) for view in views])
    owners = np.repeat(np.arange(len(views)), [view.shape[0] * view.shape[1] for view in views])
    kept = coreset(rows, params.coreset, params.seed)
    patches, owners = rows[kept].astype(np.float32), owners[kept]
    others = [patches[owners != number] for number in range(len(views))]
    apart = [distances(view[0], rest).max() for view, rest in zip(views, others, strict=True) if len(rest)]
    return {"patches": patches, "side": np.array([-1, 1], np.float32), "distances": np.array(apart, np.float32)}


def _views(examples: Examples, index: int) -> Array:
    """[V, P, D]: the patches of the picture, then those of its crops. Without patches the vector is one."""
    return examples.image[index][None, None] if examples.patches is None else examples.patches[index]


def threshold(assets: Arrays, params: Params) -> float | None:
    """None if no distances are known."""
    known = assets["distances"]
    return float(np.quantile(known, params.quantile, method="higher")) if len(known) else None


def notes(examples: Examples, params: Params, assets: Arrays) -> Sequence[str]:
    """The threshold, and what it says of the pictures of `damaged`, which the fit does not read otherwise."""
    limit, number = threshold(assets, params), len(assets["distances"])
    lines = [f"{len(assets['patches'])} patches are kept"]
    if limit is None:
        return [*lines, "there is no threshold: it needs at least two normal pictures"]
    lines.append(
        f"threshold {limit:.4f}: quantile {params.quantile:g} of the distances of {number} normal pictures, each to "
        "the others"
    )
    damaged = np.flatnonzero(examples.truth == 1).tolist()
    if damaged:
        above = sum(distances(_views(examples, i)[0], assets["patches"]).max() > limit for i in damaged)
        lines.append(f"{above} of {len(damaged)} damaged pictures are above it")
    return lines


def logits(image: Array, columns: Columns, params: Params) -> Array:
    beyond = distances(image, columns.assets["patches"]) - np.float32(threshold(columns.assets, params) or 0)
    scaled: Array = np.float32(params.scale) * beyond[:, None] * columns.assets["side"]
    return scaled


ASSETS = {"patches": Asset(("M", "D")), "side": Asset(("C",)), "distances": Asset(("N",))}
FIT = Fit(fit, labels=2, open=True, patches=True, names=SIDES, notes=notes)
HEADS.register("memory")(Head(Params, logits, softmax, ASSETS, FIT))
