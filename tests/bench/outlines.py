"""Names outside COCO: what `segment` finds of things that were outlined by hand in 30 photographs.

    python -m tests.bench.outlines --data FOLDER --bundle mini-int8 [--float mini-float] [--cache FOLDER] [--each]
    python -m tests.bench.outlines --data FOLDER --draw FOLDER

``--data``: a folder with flickr8k/images and imagenet-samples/images; data/outlines.json says which photographs, by
which rule they were chosen, and how they were outlined. They are not part of the repository. ``--draw`` writes the
outlines over the photographs, to check them by eye, and measures nothing.

A figure is the mean over photographs of the IoU of the thing. Its name is asked for "alone", against the background
words, and "among" the names of all outlined things. A background word that means the same as a name of the question is
left out, as the task does. Thresholds: by two folds of all photographs, as in `tests.bench.segment`. Two controls look
at no pixel: the whole picture, and a box in its middle with half its area.
"""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from calmclip import open_bundle
from calmclip.models.datasets import read_json
from calmclip.models.errors import BadRequest
from calmclip.models.evals.outlined import counted, decoded
from calmclip.models.flow import Array
from calmclip.models.preprocess.image import load
from tests.bench.alternate import machine
from tests.bench.label_maps import Recorded, Way, scene, ways
from tests.bench.masks import Figure, enlarged, figure, held_out

FILE = Path(__file__).parent / "data" / "outlines.json"
FORM = "photographs with set, file_name, sha256, width, height, name, polygons and holes"
SETS = ("flickr8k", "imagenet-samples")
ZOOM = 4  # of drawings


@dataclass(frozen=True)
class Outlined:
    """``polygons`` and ``holes``: x0 y0 x1 y1 … in pixels of the file at ``path``."""

    path: Path
    set: str
    name: str
    width: int
    height: int
    polygons: Sequence[Sequence[float]]
    holes: Sequence[Sequence[float]]

    def mask(self) -> Array:
        """bool [height, width]."""
        inside = decoded(self.polygons, self.width, self.height)
        return inside & ~decoded(self.holes, self.width, self.height) if self.holes else inside


def read(data: Path | None = None, file: Path = FILE) -> list[Outlined]:
    """The outlined photographs, in the order of ``file``. Raises `BadRequest` for an outline that breaks the form and,
    with ``data``, for a photograph that is missing or differs."""
    try:
        outlined = [
            Outlined(
                (data or Path()) / row["set"] / "images" / row["file_name"],
                *(row[key] for key in ("set", "name", "width", "height", "polygons", "holes")),
            )
            for row in read_json(file, FORM)["photographs"]
        ]
        digests = [row["sha256"] for row in read_json(file, FORM)["photographs"]]
    except (KeyError, TypeError) as error:
        raise BadRequest(f"{file} cannot be read ({error!r}); it must hold {FORM}") from None
    for each, digest in zip(outlined, digests, strict=True):
        for polygon in (*each.polygons, *each.holes):
            x, y = polygon[::2], polygon[1::2]
            if len(x) != len(y) or len(x) < 3 or min(polygon) < 0 or max(x) > each.width or max(y) > each.height:
                raise BadRequest(
                    f"{each.path.name} has the polygon {polygon}; expected at least 3 pairs of x and y within "
                    f"{each.width} x {each.height} pixels"
                )
        if data and not each.path.is_file():
            raise BadRequest(f"{each.path} is not there; {data} must hold {' and '.join(SETS)}, each with images/")
        if data and hashlib.sha256(each.path.read_bytes()).hexdigest() != digest:
            raise BadRequest(f"{each.path} is not the photograph that was outlined: its SHA-256 is not {digest[:12]}…")
    return outlined


def mean_of_photographs(counts: Array) -> float:
    """int64 [photographs, 3, 1] -> percent: the mean IoU."""
    right, called, true = (counts[:, row, 0] for row in range(3))
    return 100 * float((right / np.maximum(called + true - right, 1)).mean())


def controls(outlined: Sequence[Outlined]) -> dict[str, Array]:
    """-> int64 [photographs, 1, 3, 1]."""
    rows: dict[str, list[Array]] = {"whole picture (control)": [], "box in the middle, half the area (control)": []}
    for each in outlined:
        truth = each.mask()
        x, y = (round(size * (1 - 0.5**0.5) / 2) for size in (each.width, each.height))
        middle = np.zeros_like(truth)
        middle[y : each.height - y, x : each.width - x] = True
        for row, guess in zip(rows.values(), (np.ones_like(truth), middle), strict=True):
            row.append(_scored(truth, [guess]))
    return {title: np.stack(parts) for title, parts in rows.items()}


def _scored(truth: Array, guesses: Sequence[Array]) -> Array:
    """Masks bool [h, w] -> int64 [guesses, 3, 1]."""
    return np.stack([counted(truth.astype(np.int16) - 1, guess.astype(np.int16) - 1, 1) for guess in guesses])


def measured(driver: Recorded, chosen: Mapping[str, Way], outlined: Sequence[Outlined]) -> dict[tuple[str, str], Array]:
    """-> (way, "alone" or "among") -> int64 [photographs, thresholds, 3, 1]."""
    names = list(dict.fromkeys(each.name for each in outlined))
    rows: dict[tuple[str, str], list[Array]] = {}
    for each in outlined:
        image, truth = load(each.path, max_pixels=each.width * each.height), each.mask()
        for kind, labels in (("alone", [each.name]), ("among", names)):
            asked = driver.run(scene(driver.bundle, image, labels))
            for name, way in chosen.items():
                maps = driver.run(way.flow(driver.bundle, asked, way.thresholds))
                guesses = [enlarged(labelled, each.width, each.height) == labels.index(each.name) for labelled in maps]
                rows.setdefault((name, kind), []).append(_scored(truth, guesses))
    return {key: np.stack(parts) for key, parts in rows.items()}


def draw(outlined: Sequence[Outlined], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for each in outlined:
        with Image.open(each.path) as file:
            sheet = file.convert("RGB").resize((each.width * ZOOM, each.height * ZOOM))
        tint = Image.fromarray(each.mask().astype(np.uint8) * 110).resize(sheet.size)
        sheet.paste((255, 0, 255), (0, 0), tint)
        pen = ImageDraw.Draw(sheet)
        for polygon in (*each.polygons, *each.holes):
            points = [ZOOM * value for value in polygon]
            pen.line((*points, *points[:2]), fill="yellow")
        sheet.save(folder / f"{each.path.stem}.png")


def line(title: str, figures: Sequence[Figure | None]) -> str:
    return f"| {title} | " + " | ".join(f"{f.value:.1f} ± {f.deviation:.1f}" if f else "-" for f in figures) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--bundle", type=Path)
    options.add_argument("--float", type=Path, help="its float bundle")
    options.add_argument("--cache", type=Path)
    options.add_argument("--draw", type=Path, metavar="FOLDER")
    options.add_argument("--each", action="store_true", help="print the IoU of each photograph too")
    options.add_argument("--ways", nargs="+", choices=[*ways()], default=[*ways()])
    given = options.parse_args(arguments)
    outlined = read(given.data)
    if given.draw:
        draw(outlined, given.draw)
        return
    bundles = {"INT8": given.bundle} | ({"float": given.float} if given.float else {})
    counts: dict[tuple[str, str, str], Array] = {}
    for side, path in bundles.items():
        driver = Recorded(open_bundle(path, threads=1), given.cache)
        fit = {n: w for n, w in ways().items() if n in given.ways and w.why_not(driver.bundle.manifest) is None}
        counts |= {(side, *key): rows for key, rows in measured(driver, fit, outlined).items()}
    parts = {each: [n for n, row in enumerate(outlined) if row.set == each] for each in SETS}
    print(f"{', '.join(f'{each}: {len(rows)}' for each, rows in parts.items())}; {machine(1)}")
    columns = [(side, part, kind) for side in bundles for part in SETS for kind in ("alone", "among")]
    print("| way | " + " | ".join(f"{side}, {part}, {kind}" for side, part, kind in columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for title, rows in controls(outlined).items():
        print(line(title, [_part(rows[:, 0][parts[part]]) for _, part, _ in columns]))
    for name, way in ways().items():
        if name not in given.ways:
            continue
        kept = {
            key: held_out(rows, way.thresholds, mean_of_photographs) for key, rows in counts.items() if key[1] == name
        }
        cells = [kept.get((side, name, kind)) for side, _, kind in columns]
        figures = [
            cell and _part(cell[0][parts[part]], cell[1]) for cell, (_, part, _) in zip(cells, columns, strict=True)
        ]
        print(line(way.title, figures))
        print(f"  thresholds: { {key: settings for key, (_, settings) in kept.items()} }")
        if given.each:
            for key, (rows, _) in kept.items():
                print(
                    "  ",
                    *key,
                    *(f"{each.name} {mean_of_photographs(rows[[n]]):.0f}," for n, each in enumerate(outlined)),
                )


def _part(rows: Array, settings: tuple[float, float] = (0.0, 0.0)) -> Figure:
    return figure(rows, settings, mean_of_photographs)


if __name__ == "__main__":
    main()
