"""Scenes for `tests.bench.anomaly`: views of a photograph, and the same with damage that a seed draws.

A scene is a photograph of `export/samples`, whose README.md states author and terms of each. A view is a crop of 90 to
100 % of each side, in light of 85 to 115 %, with noise of at most 6 levels. A damaged view has a fault on .5 to 3 % of
its area, drawn before the light and the noise: a scratch, a blob, a patch from elsewhere in the photograph, blur, or a
change of colour, in turn. A fault that changes its pixels by less than `LEAST` levels on average is drawn anew,
because it is none.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from calmclip.export import samples
from calmclip.models.flow import Array

SEED = 23_0086  # of the scenes that are reported
TUNING = 7  # of those that settings are chosen on, of other photographs
LEAST_AREA, MOST_AREA = 0.005, 0.03
LEAST = 8.0  # levels of 255
Draw = np.random.Generator


@dataclass(frozen=True)
class Scene:
    """``references`` and ``normal``: views; ``damaged``: views, each with its fault's mask bool [h, w] and kind."""

    name: str
    references: list[Image.Image]
    normal: list[Image.Image]
    damaged: list[tuple[Image.Image, Array, str]]


def reported() -> Iterator[Scene]:
    """The 20 photographs of the certificate."""
    yield from _scenes(sorted(samples.pictures()), SEED)


def tuning() -> Iterator[Scene]:
    """The 21 photographs of the calibration set, without the drawn pictures."""
    paths = [path for path in sorted(samples.calibration_pictures()) if not path.stem.startswith("leaves-")]
    yield from _scenes(paths, TUNING)


def _scenes(paths: list[Path], seed: int) -> Iterator[Scene]:
    for number, path in enumerate(paths):
        draw = np.random.default_rng([seed, number])
        photograph = np.asarray(Image.open(path).convert("RGB"), np.float32)
        references = [_lit(_crop(photograph, draw), draw) for _ in range(4)]
        normal = [_lit(_crop(photograph, draw), draw) for _ in range(20)]
        damaged = [_damaged(_crop(photograph, draw), draw, kind) for kind in [*KINDS] * 4]
        yield Scene(path.stem, references, normal, damaged)


def _crop(photograph: Array, draw: Draw) -> Array:
    rows, columns = photograph.shape[:2]
    height, width = (round(side * draw.uniform(0.9, 1.0)) for side in (rows, columns))
    top, left = draw.integers(rows - height + 1), draw.integers(columns - width + 1)
    return photograph[top : top + height, left : left + width].copy()


def _lit(view: Array, draw: Draw) -> Image.Image:
    noisy = view * draw.uniform(0.85, 1.15) + draw.normal(0, draw.uniform(0, 6), view.shape)
    return Image.fromarray(np.clip(noisy + 0.5, 0, 255).astype(np.uint8))


def _damaged(view: Array, draw: Draw, kind: str) -> tuple[Image.Image, Array, str]:
    for _ in range(1000):
        mask, changed = KINDS[kind](view, draw)
        if LEAST_AREA <= mask.mean() <= MOST_AREA and np.abs(changed - view)[mask].mean() >= LEAST:
            return _lit(np.where(mask[..., None], changed, view), draw), mask, kind
    raise RuntimeError(f"no {kind} was drawn")


def _drawn(view: Array, paint: Callable[[ImageDraw.ImageDraw], None]) -> Array:
    image = Image.new("1", (view.shape[1], view.shape[0]))
    paint(ImageDraw.Draw(image))
    return np.asarray(image, bool)


def _somewhere(view: Array, draw: Draw) -> tuple[Array, float]:
    """A point x, y, and the side of a square of a drawn part of the area."""
    rows, columns = view.shape[:2]
    side = (draw.uniform(LEAST_AREA, MOST_AREA) * rows * columns) ** 0.5
    return draw.uniform([0, 0], [columns, rows]), side


def _blob_mask(view: Array, draw: Draw) -> Array:
    """An uneven closed curve around a point."""
    centre, side = _somewhere(view, draw)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    waves = [draw.uniform(-0.2, 0.2) * np.cos(k * angles + draw.uniform(0, 6.3)) for k in (1, 2, 3)]
    radii = side * 0.56 * (1 + np.stack(waves).sum(axis=0))
    points = centre + np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    return _drawn(view, lambda pen: pen.polygon([(x, y) for x, y in points.tolist()], fill=1))


def _scratch(view: Array, draw: Draw) -> tuple[Array, Array]:
    """A bent line, bright or dark."""
    start, side = _somewhere(view, draw)
    width = draw.integers(2, 6)
    angle = draw.uniform(0, 6.3) + np.cumsum(draw.normal(0, 0.25, 8))
    steps = np.stack([np.cos(angle), np.sin(angle)], axis=1) * (side * side / width / 8)
    points = np.concatenate([start[None], start + np.cumsum(steps, axis=0)])
    mask = _drawn(view, lambda pen: pen.line([(x, y) for x, y in points.tolist()], fill=1, width=int(width)))
    level = draw.uniform(0, 60) if draw.random() < 0.5 else draw.uniform(195, 255)
    return mask, np.full_like(view, level)


def _blob(view: Array, draw: Draw) -> tuple[Array, Array]:
    """A stain of one colour that covers half to all of what is below."""
    mask, colour, cover = _blob_mask(view, draw), draw.uniform(0, 255, 3), draw.uniform(0.5, 1)
    return mask, (1 - cover) * view + cover * colour


def _paste(view: Array, draw: Draw) -> tuple[Array, Array]:
    """What lies elsewhere in the view, turned upside down."""
    mask = _blob_mask(view, draw)
    shift = [int(draw.uniform(0.2, 0.8) * side) for side in view.shape[:2]]
    return mask, np.roll(view, shift, axis=(0, 1))[::-1]


def _blur(view: Array, draw: Draw) -> tuple[Array, Array]:
    image = Image.fromarray(view.astype(np.uint8)).filter(ImageFilter.GaussianBlur(draw.uniform(4, 8)))
    return _blob_mask(view, draw), np.asarray(image, np.float32)


def _colour(view: Array, draw: Draw) -> tuple[Array, Array]:
    """The same structure in other colours: each channel has another gain."""
    return _blob_mask(view, draw), np.clip(view * draw.uniform(0.4, 1.6, 3), 0, 255)


KINDS: dict[str, Callable[[Array, Draw], tuple[Array, Array]]] = {
    "scratch": _scratch, "blob": _blob, "paste": _paste, "blur": _blur, "colour": _colour,
}  # fmt: skip
