"""A user's photographs, in one of five layouts of folders, for `calmclip teach`.

    coco      instances.json (COCO's form) and images/
    yolo      images/, labels/ with a text file for each picture (a line: class x y w h, the centre and the size of a
              box relative to the picture), and the classes' names in data.yaml or classes.txt
    labels    labels.json (a list of {"file", "label"}) and images/, as the eval zero_shot reads them
    folders   a folder of pictures for each name
    plain     pictures without names

What a folder holds decides on its layout; the first that fits counts. The pictures of the last two may lie under
images/.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calmclip.models.errors import BadImage, BadRequest
from calmclip.models.evals import NoParams, detection, zero_shot
from calmclip.models.evals.average_precision import Boxes
from calmclip.models.flow import Array
from calmclip.models.preprocess.image import NAMES, SUFFIXES, upright_size

OUTSIDE = 0.02  # of a side of the picture: rounding may move a box's side so far out of it
LAYOUTS = (
    "instances.json and images/ (COCO); images/, labels/ and data.yaml or classes.txt (YOLO); labels.json and images/; "
    "a folder of pictures for each name; or pictures"
)
_NAMES = ("data.yaml", "classes.txt", "labels/classes.txt", "../data.yaml")  # files with the names of YOLO's classes


@dataclass(frozen=True)
class Photographs:
    """``truth``: the boxes of each picture in pixels of the upright picture, or empty if the layout has no boxes.
    ``labels``: the name of each picture, or empty. Both count ``names``."""

    layout: str
    pictures: tuple[Path, ...]
    names: tuple[str, ...] = ()
    truth: tuple[Boxes, ...] = ()
    labels: tuple[int, ...] = ()

    def only(self, places: Sequence[int]) -> "Photographs":
        """The pictures at these places."""
        return replace(
            self,
            pictures=tuple(self.pictures[place] for place in places),
            truth=tuple(self.truth[place] for place in places if self.truth),
            labels=tuple(self.labels[place] for place in places if self.labels),
        )


def read(folder: Path) -> Photographs:
    """Reads the header of each picture.

    Raises `BadRequest` for a folder of no layout, one without pictures, and a box or a class that cannot be; `BadImage`
    with the file that is no picture.
    """
    fitting = [read_layout for fits, read_layout in _READERS if fits(folder)]
    data = fitting[0](folder) if fitting else None
    if data is None or not data.pictures:
        raise BadRequest(f"{folder} holds no photographs in a known layout; expected {LAYOUTS}")
    for path in data.pictures:
        if not path.is_file():
            raise BadRequest(f"{path} is not there, and {folder} names it; add the picture or remove its entry")
    sizes = [_size(path) for path in data.pictures]
    if not data.truth:
        return data
    if not any(len(row.classes) for row in data.truth):
        raise BadRequest(f"{folder} holds no box for {len(data.pictures)} pictures; expected boxes, or pictures alone")
    truth = tuple(map(_inside, data.truth, sizes, data.pictures))
    return replace(data, truth=truth)


def _coco(folder: Path) -> Photographs:
    instances = detection.read(folder, NoParams())
    return Photographs("coco", _paths(instances.pictures), tuple(instances.names), tuple(instances.truth))


def _labels(folder: Path) -> Photographs:
    data = zero_shot.read(folder, zero_shot.Params())
    return Photographs("labels", _paths(data.pictures), tuple(data.labels), labels=tuple(data.truth))


def _folders(folder: Path) -> Photographs:
    root = _root(folder)
    if loose := _files(root, "*"):
        raise BadRequest(
            f"{root} holds pictures, such as {loose[0].name}, beside folders of pictures; expected a folder for each "
            "name, or pictures alone: move them"
        )
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and _files(path, "*"))
    rows = [(path, place) for place, name in enumerate(names) for path in _files(root / name, "*")]
    labels = tuple(place for _, place in rows)
    shown = tuple(name.replace("_", " ") for name in names)
    return Photographs("folders", tuple(path for path, _ in rows), shown, labels=labels)


def _plain(folder: Path) -> Photographs:
    return Photographs("plain", tuple(_files(_root(folder), "*")))


def _yolo(folder: Path) -> Photographs:
    """Source: the text format of Redmon et al. 2016 (arXiv 1506.02640). A picture without a file shows none of the
    classes."""
    names, pictures = _class_names(folder), _files(folder / "images", "**/*")
    truth = []
    for path in pictures:
        file = (folder / "labels" / path.relative_to(folder / "images")).with_suffix(".txt")
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        rows = [
            _line(line, f"{file}, line {number}", len(names)) for number, line in enumerate(lines, 1) if line.strip()
        ]
        truth.append(_pixels(rows, _size(path)))
    return Photographs("yolo", tuple(pictures), names, tuple(truth))


def _line(line: str, where: str, classes: int) -> tuple[float, ...]:
    """-> class, x and y of the centre, width, height."""
    try:
        row = tuple(float(word) for word in line.split())
    except ValueError:
        row = ()
    if len(row) != 5:
        raise BadRequest(f"{where}: {line[:80]!r}; expected five numbers: class x y w h, relative to the picture")
    if row[0] not in range(classes):
        raise BadRequest(f"{where}: the class is {row[0]:g}; expected 0 to {classes - 1}, for {classes} names")
    if not all(-OUTSIDE <= number <= 1 + OUTSIDE for number in row[1:]):
        raise BadRequest(f"{where}: {line[:80]!r}; expected x y w h from 0 to 1: divide pixels by the picture's size")
    return row


def _pixels(rows: Sequence[tuple[float, ...]], size: tuple[int, int]) -> Boxes:
    numbers = np.array(rows, np.float64).reshape(-1, 5)
    centre, half = numbers[:, 1:3] * size, numbers[:, 3:5] * size / 2
    return Boxes.true(np.concatenate((centre - half, centre + half), 1), numbers[:, 0].astype(np.int64))


def _class_names(folder: Path) -> tuple[str, ...]:
    file = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    if file is None:
        raise BadRequest(f"{folder} has no names of its classes; expected data.yaml, or classes.txt with a name a line")
    text = file.read_text(encoding="utf-8")
    names = _yaml_names(text) if file.suffix == ".yaml" else [line.strip() for line in text.splitlines()]
    names = [name for name in names if name]
    if not names:
        raise BadRequest(f"{file} holds no names; expected names: [a, b], a list, or numbers with names, from 0 on")
    return tuple(names)


def _yaml_names(text: str) -> list[str]:
    """The key `names` of YOLO's data.yaml, in its three forms: [a, b]; lines "- a"; lines "0: a"."""
    block = re.search(r"^names:(.*?)(?=^\w|\Z)", text, re.MULTILINE | re.DOTALL)
    body = re.sub(r"(^|\s)#.*", "", block[1]) if block else ""
    flow = re.match(r"\s*[\[{]([^\]}]*)[\]}]", body)
    rows = flow[1].split(",") if flow else body.splitlines()
    entries = [re.fullmatch(r"(?:-\s+|(\d+)\s*:\s*)?(['\"]?)(.*?)\2", row.strip()) for row in rows if row.strip()]
    numbered = [(int(entry[1] or place), entry[3].strip()) for place, entry in enumerate(entries) if entry]
    ordered = sorted(numbered)
    return [name for _, name in ordered] if [number for number, _ in ordered] == [*range(len(ordered))] else []


def _inside(boxes: Boxes, size: tuple[int, int], path: Path) -> Boxes:
    """The boxes, clipped to the picture. Raises `BadRequest` for one without area, or out of it by over `OUTSIDE`."""
    limit = np.array([*size, *size], np.float64)
    for box in boxes.boxes:
        if not (box[0] < box[2] and box[1] < box[3]):
            raise BadRequest(f"{path}: the box {_shown(box)} has no area; expected x0 < x1 and y0 < y1")
        if (box < -OUTSIDE * limit).any() or (box > (1 + OUTSIDE) * limit).any():
            raise BadRequest(
                f"{path}: the box {_shown(box)} lies outside the picture of {size[0]} x {size[1]} pixels; expected "
                "pixels of the upright picture: correct or remove it"
            )
    return replace(boxes, boxes=np.clip(boxes.boxes, 0.0, limit))


def _shown(box: Array) -> str:
    return " ".join(f"{number:g}" for number in box.round(1).tolist())


def _size(path: Path) -> tuple[int, int]:
    """Width and height of the upright picture, from its header."""
    try:
        return upright_size(path.read_bytes())
    except (OSError, BadImage) as error:
        raise BadImage(f"{path} is no picture: {error}; expected a {NAMES}: remove it or write it anew") from None


def _paths(pictures: Sequence[object]) -> tuple[Path, ...]:
    return tuple(Path(str(path)) for path in pictures)


def _root(folder: Path) -> Path:
    return folder / "images" if (folder / "images").is_dir() else folder


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES and path.is_file())


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(_files(_root(folder), "*/*"))


_READERS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Photographs]], ...] = (
    (lambda folder: (folder / "instances.json").is_file(), _coco),
    (lambda folder: (folder / "labels").is_dir() and (folder / "images").is_dir(), _yolo),
    (lambda folder: (folder / "labels.json").is_file(), _labels),
    (_has_folders, _folders),
    (lambda folder: folder.is_dir(), _plain),
)
