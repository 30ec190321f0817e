"""The rule of WinCLIP: sentences of a normal and of a damaged thing, and windows of a dense map beside them.

Source: WinCLIP, Jeong et al. 2023 (arXiv 2303.14814). Section 4.1: state phrases, each in every template. The phrases
and templates here are a short list of ours: each costs a text of the tower at first use of a thing. Sections 4.2 and
4.3: windows of several sizes, and their harmonic mean, here over means of the dense map's cells instead of masked
passes of the tower.
"""

from collections.abc import Sequence

import numpy as np

from calmclip.models.bundle.manifest import AnomalyDefaults
from calmclip.models.classifier import Classifier, fill
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array
from calmclip.models.heads.memory import SIDES
from calmclip.models.labels import check_length, listed
from calmclip.models.tasks.features import unit

THING = "object"
NORMAL = ("{}", "flawless {}", "perfect {}", "unblemished {}", "{} without flaw", "{} without defect", "{} without damage")  # fmt: skip  # noqa: E501
DAMAGED = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage", "{} with a scratch", "{} with a stain")  # fmt: skip  # noqa: E501
TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a close-up photo of a {}.", "a cropped photo of the {}.")
MOST = 2000  # sentences of both sides
WINDOWS = (1, 2, 3)  # cells of a window's side


def states(
    defaults: AnomalyDefaults | None,
    thing: str = "",
    normal: Sequence[str] = (),
    damaged: Sequence[str] = (),
    templates: Sequence[str] = (),
) -> Classifier:
    """Two labels, `SIDES`, with their sentences. What is empty is the bundle's, else the constants above.

    Raises `BadRequest` for a phrase or template without a ``{}``, and above `MOST` sentences.
    """
    given = {"normal": normal, "damaged": damaged, "templates": templates}
    known = {"normal": NORMAL, "damaged": DAMAGED, "templates": TEMPLATES}
    chosen = {}
    for name, texts in given.items():
        asked = tuple(listed(name, texts))
        chosen[name] = asked or (defaults and getattr(defaults, name)) or known[name]
        for index, text in enumerate(asked):
            check_length(f"{name} {index}", text)
            if "{}" not in text:
                raise BadRequest(f"{name} {index} is {text[:200]!r}; it needs a '{{}}' where the thing belongs")
    check_length("thing", thing)
    if (count := (len(chosen["normal"]) + len(chosen["damaged"])) * len(chosen["templates"])) > MOST:
        raise BadRequest(f"the states in all templates make {count} sentences; at most {MOST} are read at once")
    name = thing.strip() or (defaults and defaults.thing) or THING
    sentences = {
        side: tuple(fill(template, fill(state, name)) for state in chosen[side] for template in chosen["templates"])
        for side in SIDES
    }
    return Classifier(SIDES, descriptions=sentences)


def text_scores(patches: Array, sides: Array, scale: float) -> tuple[float, Array]:
    """``patches`` float32 [h, w, D]; ``sides`` float32 [2, D], unit rows of `SIDES` -> the score of the whole picture,
    and a map float32 [h, w], all in [0, 1]."""
    whole = float(_damaged(patches.mean(axis=(0, 1))[None], sides, scale)[0])
    inverse = np.full(patches.shape[:2], 1 / whole)
    sizes = [size for size in WINDOWS if size <= min(patches.shape[:2])]
    for size in sizes:
        inverse += _spread(1 / _damaged(_windows(patches, size), sides, scale), size)
    plane: Array = ((1 + len(sizes)) / inverse).astype(np.float32)
    return whole, plane


def _damaged(rows: Array, sides: Array, scale: float) -> Array:
    """[..., D] -> float64 [...]: the softmax's part of `damaged`, above 0."""
    along = scale * (unit(rows) @ (sides[1] - sides[0])).astype(np.float64)
    scores: Array = 1 / (1 + np.exp(-np.clip(along, -60, 60)))
    return scores


def _windows(patches: Array, size: int) -> Array:
    """[h, w, D] -> means of all squares of ``size`` x ``size`` cells, [h - size + 1, w - size + 1, D]."""
    sums = patches
    for axis in (0, 1):
        count = sums.shape[axis] - size + 1
        sums = np.sum([np.take(sums, range(start, start + count), axis=axis) for start in range(size)], axis=0)
    means: Array = sums / (size * size)
    return means


def _spread(values: Array, size: int) -> Array:
    """[h - size + 1, w - size + 1] -> [h, w]: for each cell the mean of ``values`` of the windows that cover it."""
    rows, columns = (count + size - 1 for count in values.shape)
    sums, visits = np.zeros((rows, columns)), np.zeros((rows, columns))
    for down in range(size):
        for across in range(size):
            part = slice(down, down + values.shape[0]), slice(across, across + values.shape[1])
            sums[part] += values
            visits[part] += 1
    return sums / visits
