"""The data directory of the eval robustness: labelled pictures, and optional extras that add figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calmclip.models.datasets import first, pictures_in, read_classes, read_json, read_table
from calmclip.models.errors import BadRequest
from calmclip.models.evals import zero_shot
from calmclip.models.runner import Picture

DATA = (
    'labels.json (a list of {"file", "label"}) and images/, or a folder of pictures for each class; optional: '
    "outliers/ (pictures of none of the labels), factors.csv (file, and a column for each factor, or file,factor), "
    'cue_conflict.json (a list of {"file", "shape", "texture"}) or cue_conflict.csv with these columns'
)
OUTLIERS, FACTORS, CONFLICTS = "outliers", "factors.csv", "cue_conflict"
_NOT_CLASSES = {OUTLIERS, "images", CONFLICTS}
_LONG, _VALUES = "factor", 100  # the column of the long form; how many values of a factor are a mistake


@dataclass(frozen=True)
class Conflicts:
    """Pictures with the shape of one thing and the texture of another; names are labels of `labels`."""

    pictures: Sequence[Picture] = ()
    shape: Sequence[str] = ()
    texture: Sequence[str] = ()

    @property
    def labels(self) -> list[str]:
        return sorted({*self.shape, *self.texture})


@dataclass(frozen=True)
class DataSet:
    """``truth``: for each picture the index of its label. ``outliers``: pictures of none of the labels, no `str`.
    ``factors``: factor -> value -> the indices of its pictures."""

    pictures: Sequence[Picture]
    labels: Sequence[str]
    truth: Sequence[int]
    outliers: Sequence[Picture] = ()
    conflicts: Conflicts = field(default_factory=Conflicts)
    factors: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        zero_shot.DataSet(self.pictures, self.labels, self.truth)  # raises for a wrong truth
        if len(self.labels) < 2:
            raise BadRequest(f"all pictures have the label {self.labels[0]!r}; expected at least 2 labels")


def read(data: Path, limit: int | None = None) -> DataSet:
    """At most ``limit`` pictures, as many of each label, and as many outliers and cue conflicts. Nothing is opened.

    Raises `BadRequest` naming the file and the entry that is wrong.
    """
    files, labels, truth = _labelled(data)
    chosen = balanced(truth, limit)
    pictures = [files[place] for place in chosen]
    folder = data / OUTLIERS
    outliers = pictures_in(folder) if folder.is_dir() else []
    if folder.is_dir() and not outliers:
        raise BadRequest(f"{folder} has no picture; the data directory must hold {DATA}")
    kinds = sorted({file.parent for file in outliers})
    outliers = [outliers[place] for place in balanced([kinds.index(file.parent) for file in outliers], limit)]
    rows = [truth[place] for place in chosen]
    return DataSet(pictures, labels, rows, outliers, _conflicts(data, limit), _factors(data, pictures, files))


def _labelled(data: Path) -> tuple[list[Path], Sequence[str], Sequence[int]]:
    """labels.json, or the folders of classes if there is none."""
    folders = data.is_dir() and {p.name for p in data.iterdir() if p.is_dir() and p.name[0] != "."} - _NOT_CLASSES
    if (data / "labels.json").exists() or not folders:
        try:
            labelled = zero_shot.read(data, zero_shot.Params())
        except BadRequest as error:
            raise BadRequest(str(error).replace(zero_shot.DATA, DATA)) from None
        return [Path(str(picture)) for picture in labelled.pictures], labelled.labels, labelled.truth
    classes = read_classes(data, _NOT_CLASSES)
    rows = [(file, label) for label, (_, files) in enumerate(classes.items()) for file in files]
    return [file for file, _ in rows], [*classes], [label for _, label in rows]


def balanced(truth: Sequence[int], limit: int | None) -> list[int]:
    """Places of ``limit`` pictures in their order: the first of every label, then the second of every label, …"""
    seen: Counter[int] = Counter()
    ranked = []
    for place, label in enumerate(truth):
        ranked.append((seen[label], place))
        seen[label] += 1
    return sorted(place for _, place in first(sorted(ranked), limit))


def _factors(data: Path, pictures: Sequence[Path], files: Sequence[Path]) -> dict[str, dict[str, list[int]]]:
    """An empty cell has no value. Rows of pictures beyond the limit are left out."""
    path = data / FACTORS
    if not path.exists():
        return {}
    table = read_table(path, ["file"], DATA)
    roots = (data / "images", data)
    known = {name: file for file in files for root in roots if (name := _name(file, root))}
    place = {file: index for index, file in enumerate(pictures)}
    names = [column for column in table.columns if column != "file"]
    if not names:
        raise BadRequest(f"{path} has no factor; the data directory must hold {DATA}")
    long = names == [_LONG]
    of_factor: dict[str, dict[str, set[int]]] = {} if long else {name: {} for name in names}
    for row, cells in enumerate(table.rows):
        if cells["file"] not in known:
            raise table.wrong(row, "file", "a file of the labelled pictures")
        index = place.get(known[cells["file"]])
        for name in names:
            factor, value = (cells[name], "yes") if long else (name, cells[name])
            if index is not None and cells[name]:
                of_factor.setdefault(factor, {}).setdefault(value, set()).add(index)
    for factor, values in of_factor.items():
        if len(values) > _VALUES:
            raise BadRequest(f"{path}: the factor {factor!r} has {len(values)} values; at most {_VALUES} make sense")
    return {
        factor: {value: sorted(values[value]) for value in sorted(values)}
        for factor, values in of_factor.items()
        if values
    }


def _name(file: Path, root: Path) -> str | None:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else None


def _conflicts(data: Path, limit: int | None) -> Conflicts:
    """A picture whose shape and texture are the same is left out, as in Geirhos et al. 2019."""
    path, table = data / f"{CONFLICTS}.json", data / f"{CONFLICTS}.csv"
    if path.exists():
        entries = read_json(path, DATA)
    elif table.exists():
        path, entries = table, [dict(row) for row in read_table(table, ["file", "shape", "texture"], DATA).rows]
    else:
        return Conflicts()
    rows = []
    for entry in entries if isinstance(entries, list) else [entries]:
        match entry:
            case {"file": str(file), "shape": str(shape), "texture": str(texture)} if file and shape and texture:
                rows.append((_found(data, file), shape, texture))
            case _:
                raise BadRequest(
                    f"{path} lacks a file, a shape or a texture in {str(entry)[:200]}; the data directory must hold "
                    f"{DATA}"
                )
    apart = [row for row in rows if row[1] != row[2]]
    if not apart:
        raise BadRequest(f"{path} has no picture with a shape and another texture; the data directory must hold {DATA}")
    shapes = sorted({shape for _, shape, _ in apart})
    kept = [apart[place] for place in balanced([shapes.index(shape) for _, shape, _ in apart], limit)]
    return Conflicts([file for file, _, _ in kept], [row[1] for row in kept], [row[2] for row in kept])


def _found(data: Path, name: str) -> Path:
    """The picture under cue_conflict/ if there is such a folder, else under images/."""
    folder = data / CONFLICTS
    return (folder if folder.is_dir() else data / "images") / name
