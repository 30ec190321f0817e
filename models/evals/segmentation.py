"""Segmentation: dataset mIoU of the masks of the task `segment` on photographs with outlined objects.

Each photograph is segmented twice: with the names that it shows, and with all names of the set. `outlined` defines the
figure. Intervals resample photographs.

Source: Zhou et al. 2022, MaskCLIP (arXiv 2112.01071), section 4.1, for zero-shot segmentation with the names of a set.

Cost: a run of `segment` for each photograph and set of names; samples of 6 x classes numbers for each photograph.

Data: instances.json (COCO form, with polygons or runs), images/.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.datasets import first
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Figure, Samples, Statistic, outlined
from calmclip.models.evals.outlined import NONE, Photograph, counted, mean_iou
from calmclip.models.evals.progress import progress
from calmclip.models.flow import Array, Flow
from calmclip.models.runner import Runner
from calmclip.models.tasks.segment import SegmentRequest, segment

SETS = {"present": "mIoU present names", "every": "mIoU all names"}  # array of the samples -> name of the figure


class Params(FrozenModel):
    """Those of `SegmentRequest`; None: the bundle's."""

    method: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict, description="params of the method")
    templates: tuple[str, ...] = ()
    threshold: float | None = Field(default=None, ge=0, le=1)


@dataclass(frozen=True)
class DataSet:
    """``photographs``: at least one. A class is an index into ``names``."""

    names: Sequence[str]
    photographs: Sequence[Photograph]

    def __post_init__(self) -> None:
        if not self.photographs or not self.names:
            raise BadRequest(
                f"the data set has {len(self.photographs)} photographs and {len(self.names)} names; expected both"
            )


def read(data: Path, params: Params, limit: int | None = None) -> DataSet:
    """Raises `BadRequest` for a folder in another form, `ExtraMissing` without pycocotools."""
    names, photographs = outlined.read(data)
    chosen = first(photographs, limit)
    if chosen:
        chosen[0].truth()  # raises before minutes of work
    return DataSet(names, chosen)


def predict(runner: Runner, data: DataSet, params: Params) -> Samples:
    """-> ``present``, ``every`` int64 [N, 3, classes]; see `outlined.counted`."""
    bundle = runner.bundle
    photographs = progress(data.photographs, f"segmentation {bundle.name}", "photograph", len(data.photographs))
    rows = [*runner.map(_counts(bundle, photograph, data.names, params) for photograph in photographs)]
    arrays: Mapping[str, Array] = {key: np.stack([row[key] for row in rows]) for key in SETS}
    return Samples(
        {"photographs": len(data.photographs), "names": len(data.names)}, arrays, {"names": tuple(data.names)}
    )


def _counts(bundle: Bundle, photograph: Photograph, names: Sequence[str], params: Params) -> Flow[Mapping[str, Array]]:
    truth, counts = photograph.truth(), {}
    for key, classes in (("present", photograph.present), ("every", [*range(len(names))])):
        labels: Array = np.full(truth.shape, NONE, np.int16)
        if classes:  # else it shows crowds alone, and no name is asked for
            labels = yield from _map(bundle, photograph, classes, names, params)
        if labels.shape != truth.shape:
            height, width = labels.shape
            raise BadRequest(
                f"{photograph.path} has {width} x {height} pixels; instances.json says {photograph.width} x "
                f"{photograph.height}"
            )
        counts[key] = counted(truth, labels, len(names))
    return counts


def _map(
    bundle: Bundle, photograph: Photograph, classes: Sequence[int], names: Sequence[str], params: Params
) -> Flow[Array]:
    """-> int16 [height, width]: the class of each pixel, or `NONE`."""
    request = SegmentRequest(
        photograph.path, [names[index] for index in classes], params.templates, None, params.method, params.settings,
        threshold=params.threshold,
    )  # fmt: skip
    segments = yield from segment(bundle, request)
    labels = np.full((segments.height, segments.width), NONE, np.int16)
    for each in segments:  # they do not overlap
        labels[each.mask.pixels()] = classes[each.index]
    return labels


def score(samples: Samples, params: Params) -> Statistic:
    counts = {key: samples.arrays[key].reshape(samples.count, -1).astype(np.float64) for key in SETS}
    shape = samples.arrays["present"].shape[1:]

    def of(rows: Array) -> Sequence[Figure]:
        weights = np.bincount(rows, minlength=samples.count)  # a sum by weights copies no rows
        sums = {key: (weights @ rows_of).reshape(shape) for key, rows_of in counts.items()}
        return [Figure(title, mean_iou(sums[key]), "%") for key, title in SETS.items()]

    return of


EVALS.register("segmentation")(Eval("segment", outlined.DATA, Params, read, predict, score, limit=100))
