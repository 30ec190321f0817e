"""Top-1 accuracy of a picture classifier with fixed classes.

Source: Deng et al. 2009 (ImageNet); for the calibration error Guo et al. 2017 (arXiv 1706.04599).

Data: a folder of pictures for each class, with the name of one of the bundle's labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.datasets import first
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Samples, classification
from calmclip.models.evals.progress import progress
from calmclip.models.flow import Array, Flow
from calmclip.models.runner import Picture, Runner
from calmclip.models.tasks.features import prepared
from calmclip.models.tasks.raw import RawRequest, raw

DATA = "a folder of pictures for each class, with the name of one of the bundle's labels"
ROLE = "logits"


@dataclass(frozen=True)
class DataSet:
    """``truth``: the class name of each picture."""

    pictures: Sequence[Picture]
    truth: Sequence[str]


def read(data: Path, params: classification.Scoring, limit: int | None = None) -> DataSet:
    """The first picture of every class, then the second of every class. Raises `BadRequest` if there are none."""
    folders = sorted(p for p in data.iterdir() if p.is_dir()) if data.is_dir() else []
    each = [sorted(file for file in folder.iterdir() if file.is_file()) for folder in folders]
    ranked = sorted((place, file) for files in each for place, file in enumerate(files))
    if not ranked:
        raise BadRequest(f"{data} holds no pictures; the data directory must hold {DATA}")
    files = [file for _, file in first(ranked, limit)]
    return DataSet(files, [file.parent.name for file in files])


def predict(runner: Runner, data: DataSet, params: classification.Scoring) -> Samples:
    bundle, labels = runner.bundle, runner.bundle.classifier.labels
    if ROLE not in bundle.manifest.graphs or not labels:
        raise BadRequest(f"{bundle.name} has no graph {ROLE!r} with labels; top1 needs a classifier with fixed classes")
    if unknown := sorted({*data.truth} - {*labels}):
        raise BadRequest(f"the class {unknown[0]!r} is none of the {len(labels)} labels of {bundle.name}")
    pictures = progress(data.pictures, f"top-1 {bundle.name}", "picture", len(data.pictures))
    logits = np.stack([*runner.map(_logits(bundle, picture) for picture in pictures)])
    return Samples(
        {"pictures": len(data.pictures), "labels": len(labels)},
        {
            "logits": logits,
            "truth": np.array([labels.index(name) for name in data.truth], np.int64),
            "temperature": np.array(1.0),
        },
        {"labels": labels, "head": ("cosine",)},  # its scores are a softmax
    )


def _logits(bundle: Bundle, picture: Picture) -> Flow[Array]:
    """-> float32 [C]."""
    feeds, _ = yield from prepared(bundle, Path(picture) if isinstance(picture, str) else picture, ROLE)
    (logits,) = (yield from raw(bundle, RawRequest(ROLE, feeds))).values()
    row: Array = logits[0]
    return row


EVALS.register("top1")(
    Eval(
        "raw", DATA, classification.Scoring, read, predict, classification.score, classification.together,
        classification.plots, frozenset({"bins", "temperature"}),
    )
)  # fmt: skip
