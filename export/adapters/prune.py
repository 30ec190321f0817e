"""Fewer patches in the image tower: from a block on it reads the class token and the patches that the class token
attends to most; `calmclip.export.towers.prune` has the rule.

Source: A-CLIP, Yang et al. 2023 (arXiv 2212.08653). There the rule masks pictures in training, by the attention of an
average of past weights. Here it is the tower's own, and saves time in serving. Weights do not change. A keep that
leaves every cell changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any, cast

from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from calmclip.export import parity
from calmclip.export.adapters import ADAPTERS, Adapter, Context, with_note
from calmclip.export.nets import Net, Tower, ready
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.towers.prune import Pruning, cell_side, kept_cells
from calmclip.models.bundle.manifest import FrozenModel, ImagePreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.spec import SOFTMAX

_DEPTH = 3  # by default the first third of the blocks reads all patches


class Params(FrozenModel):
    keep: float = Field(
        gt=0, le=1, description="let the later blocks of the image tower read this part of the patches: 0.5"
    )
    after: int | None = Field(
        default=None, ge=1, description="with --prune: the last block that reads all patches (default: depth / 3)"
    )


def adapt(net: Net, params: Params, context: Context) -> Net:
    """``net`` itself if every cell stays. Raises `BadRequest` for a net without an image tower that is a transformer
    with a class token, and for a block that the tower lacks or that no block follows."""
    role = next((role for role, tower in net.towers.items() if _fits(tower)), None)
    if role is None or net.folded:
        raise BadRequest(
            f"prune does not apply to {net.source.model}: expected an image tower that is a transformer, with a class "
            "token whose last state becomes the vector, because the attention of that token chooses the patches"
        )
    tower = net.towers[role]
    image, pixels = cast(VisionTransformer, tower.module), cast(ImagePreprocess, tower.preprocess)
    if image.pruning is not None:
        raise BadRequest("prune: the image tower is pruned already; expected one prune, so remove the other")
    depth = len(image.blocks)
    after = params.after or max(1, depth // _DEPTH)
    if after >= depth:
        raise BadRequest(
            f"prune: --prune-after is {after}; expected 1 to {depth - 1}, because the tower has {depth} blocks and a "
            "block must follow"
        )
    rows, columns = (size // int(side) for size, side in zip(pixels.size, image.patch.kernel_size, strict=True))
    cells = rows * columns // cell_side((rows, columns)) ** 2
    kept = kept_cells(params.keep, cells)
    if kept == cells:
        return net
    plain = _folded(net, role)
    image.pruning = Pruning((rows, columns), kept, after)
    promises = {**tower.promises, SOFTMAX.name: tower.promises.get(SOFTMAX.name, 0) + 1}
    pruned = replace(net, towers={**net.towers, role: replace(tower, promises=promises)})
    tokens = [image.pruning.tokens, 1 + rows * columns]
    facts, speed = _measured(plain, _folded(pruned, role), context.feeds(net, tower))
    facts = {"after": after, "cells": [kept, cells], "tokens": tokens} | facts
    context.say(
        f"prune: {kept} of {cells} cells after block {after}; mean cosine {facts['cosine']:.4f} to the whole tower on "
        f"{facts['inputs']} samples; {speed:.2f} x as fast in torch"
    )
    pruned = replace(pruned, facts={**net.facts, "prune": facts}, times={**net.times, "prune": {"torch_speed": speed}})
    return with_note(pruned, f"prune: {kept} of {cells} cells after block {after}")


def _fits(tower: Tower) -> bool:
    image = tower.module
    return isinstance(image, VisionTransformer) and image.style.pool == "cls" and image.cls is not None


def _folded(net: Net, role: str) -> Tower:
    return ready(replace(net, towers={role: net.towers[role]})).towers[role]


def _measured(plain: Tower, pruned: Tower, feeds: Sequence[Arrays]) -> tuple[dict[str, Any], float]:
    """Two float towers: their agreement and the part of the multiply-accumulates that the second saves; and how many
    times as fast it is with one thread, from the medians of runs in turn."""
    spent: tuple[list[float], list[float]] = ([], [])
    with parity.one_thread():
        whole, part = (_timed(parity.torch_run(t), times) for t, times in zip((plain, pruned), spent, strict=True))
        (agreement,) = parity.compare(whole, part, feeds, plain.summary).values()
    facts: dict[str, Any] = {name: round(agreement[name], 5) for name in ("cosine", "cosine_min")}
    facts["inputs"] = len(feeds)
    facts["macs_saved"] = round(1 - _work(pruned, feeds[0]) / _work(plain, feeds[0]), 5)
    return facts, round(median(spent[0]) / median(spent[1]), 2)


def _work(tower: Tower, feeds: Arrays) -> int:
    with FlopCounterMode(display=False) as counter:
        parity.torch_run(tower)(feeds)
    return int(counter.get_total_flops())


def _timed(run: parity.Run, spent: list[float]) -> parity.Run:
    def timed(feeds: Arrays) -> Mapping[str, Array]:
        start = perf_counter()
        outputs = run(feeds)
        spent.append(perf_counter() - start)
        return outputs

    return timed


ADAPTERS.register("prune")(Adapter(Params, adapt, {"--prune": "keep", "--prune-after": "after"}))
