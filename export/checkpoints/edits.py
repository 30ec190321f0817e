"""Edits of weights, on tensors by our names: State -> State. None changes its argument; what is not edited is shared.

Errors name the tensor whose shape differs: by our names, or by what ``said`` makes of them.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from calmclip.models.errors import BadRequest, UnknownCheckpoint

State = Mapping[str, Tensor]
KEEP = 20  # positions that a stretch leaves as they are: most captions are no longer


def over(base: State, image: State, what: str, said: Callable[[str], str] = str) -> dict[str, Tensor]:
    """``base`` with the image tower of ``image`` (names under ``image.``); its projection may be absent there.

    For weights of a fine-tuned image tower alone (DIVA, arXiv 2407.20171; un2CLIP, arXiv 2505.24517): the text tower
    and the temperature stay. ``what`` names the file. Raises `UnknownCheckpoint` naming what is missing, unexpected or
    of another shape.
    """
    wanted = {name: tensor for name, tensor in base.items() if name.startswith("image.")}
    given = {name: tensor for name, tensor in image.items() if name.startswith("image.")}
    for name, tensor in wanted.items():
        if name.startswith("image.projection."):
            given.setdefault(name, tensor)
    _same(wanted, given, what, said)
    return {**base, **given}


def mix(base: State, other: State, alpha: float, what: str, said: Callable[[str], str] = str) -> dict[str, Tensor]:
    """(1 - alpha) base + alpha other, each tensor in float64; at 0 and 1 the bits of one side.

    Integers are the base's. The temperature is mixed as its logarithm, which is what `logit_scale` is.
    Source: Wortsman et al. 2022 (arXiv 2109.01903), equation 1. Raises as `over`, and `BadRequest` for an ``alpha``
    outside 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise BadRequest(f"alpha is {alpha}; expected a share from 0 to 1")
    _same(base, other, what, said)
    return {name: _between(tensor, other[name], alpha) for name, tensor in base.items()}


def stretch(base: State, context: int, keep: int = KEEP) -> dict[str, Tensor]:
    """The text tower's table of positions [C, W], made to ``context`` rows: keep + ratio (C - keep).

    The first ``keep`` rows stay; those that follow are interpolated, ratio - 1 between two neighbours, and the last
    goes on with the step before it. Source: Long-CLIP (arXiv 2403.15378), section 3.1. Raises `BadRequest` for a
    ``context`` that no whole ratio gives, and for a BERT, of whose table only a part was ever trained on captions.
    """
    name = "text.positions"
    if name not in base:
        raise BadRequest("stretch: the text tower has no table of positions to stretch")
    if "text.types" in base:
        raise BadRequest("stretch: the text tower is a BERT, whose table is longer than its context already")
    table = base[name]
    rest = len(table) - keep
    ratio, left = divmod(context - keep, rest) if rest > 1 else (0, 1)
    if left or ratio < 1:
        fitting = ", ".join(str(keep + rest * n) for n in (2, 3, 4)) if rest > 1 else "none"
        raise BadRequest(f"stretch: a table of {len(table)} positions cannot become {context}; it can become {fitting}")
    tail = table[keep:].double()
    following = torch.cat([tail[1:], (2 * tail[-1] - tail[-2])[None]])
    shares = torch.arange(ratio, dtype=torch.float64)[:, None] / ratio
    between = tail[:, None] * (1 - shares) + following[:, None] * shares
    return {**base, name: torch.cat([table[:keep], between.flatten(0, 1).to(table.dtype)])}


def _between(one: Tensor, other: Tensor, alpha: float) -> Tensor:
    if alpha == 0 or not one.is_floating_point():
        return one
    if alpha == 1:
        return other.to(one.dtype)
    return ((1 - alpha) * one.double() + alpha * other.double()).to(one.dtype)


def _same(wanted: State, given: State, what: str, said: Callable[[str], str]) -> None:
    for name, tensor in wanted.items():
        if name not in given:
            raise UnknownCheckpoint(f"{what} lacks {said(name)}, which the base has")
        if given[name].shape != tensor.shape:
            raise UnknownCheckpoint(
                f"{what}: {said(name)} has the shape {list(given[name].shape)}; the base's is {list(tensor.shape)}"
            )
    if extra := [name for name in given if name not in wanted]:
        raise UnknownCheckpoint(f"{what} holds {said(extra[0])}, which the base does not have")
