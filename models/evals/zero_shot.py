"""Zero-shot classification accuracy, with all class names of the data set as labels.

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1; for the calibration error Guo et al. 2017 (arXiv
1706.04599).

Data: labels.json, a list of {"file", "label" or "name"}; the pictures under images/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calmclip.models.datasets import first, read_json
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Samples, classification
from calmclip.models.evals.progress import progress
from calmclip.models.runner import Picture, Runner

DATA = 'labels.json (a list of {"file", "label"}) and images/'


class Params(classification.Scoring):
    templates: tuple[str, ...] = ()  # each with a {}; if empty, the bundle's own


@dataclass(frozen=True)
class DataSet:
    """``truth``: for each picture the index of its label in ``labels``. Raises `BadRequest` for another number."""

    pictures: Sequence[Picture]
    labels: Sequence[str]
    truth: Sequence[int]

    def __post_init__(self) -> None:
        if not self.pictures or len(self.pictures) != len(self.truth):
            raise BadRequest(f"{len(self.pictures)} pictures and {len(self.truth)} of truth; expected one per picture")
        if wrong := [place for place in self.truth if not 0 <= place < len(self.labels)]:
            raise BadRequest(f"truth holds {wrong[0]}; expected indices of {len(self.labels)} labels, from 0")


def read(data: Path, params: Params, limit: int | None = None) -> DataSet:
    """The labels are those of the pictures. Raises `BadRequest` naming the first wrong entry."""
    path = data / "labels.json"
    entries = read_json(path, DATA)
    if not (isinstance(entries, list) and entries):
        raise BadRequest(f"{path} holds no list of labels; the data directory must hold {DATA}")
    pairs = []
    for entry in entries:
        match entry:
            case {"file": str(file), "label": str(label)} | {"file": str(file), "name": str(label)} if label:
                pairs.append((data / "images" / file, label))
            case _:
                raise BadRequest(f"{path} names no file or no label in {entry!r}; the data directory must hold {DATA}")
    rows = first(pairs, limit)
    labels = sorted({label for _, label in rows})
    return DataSet([file for file, _ in rows], labels, [labels.index(label) for _, label in rows])


def predict(runner: Runner, data: DataSet, params: Params) -> Samples:
    pictures = progress(data.pictures, f"zero-shot {runner.bundle.name}", "picture", len(data.pictures))
    logits = runner.logits(pictures, data.labels, templates=params.templates)
    default = runner.bundle.classifier
    temperature = default.temperature_for(runner.bundle.family)
    return Samples(
        {"pictures": len(data.pictures), "labels": len(data.labels)},
        {"logits": logits, "truth": np.asarray(data.truth, np.int64), "temperature": np.array(temperature)},
        {"labels": tuple(data.labels), "head": (str(default.head),)},
    )


EVALS.register("zero_shot")(
    Eval(
        "classify", DATA, Params, read, predict, classification.score, classification.together, classification.plots,
        frozenset({"bins", "temperature"}),
    )
)  # fmt: skip
