"""Run a float graph over calibration feeds and look at its tensors: the ranges that static quantizers need."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx

from calmclip.export.graph import tap
from calmclip.export.quantizers import Feeds
from calmclip.models.errors import BadRequest, ExportError
from calmclip.models.flow import Array

T = TypeVar("T")


def collect(
    model: onnx.ModelProto, feeds: Feeds, names: Sequence[str], summarize: Callable[[str, Array], T]
) -> dict[str, list[T]]:
    """Run ``model`` over ``feeds``; -> tensor -> ``summarize(tensor, values)``, one entry per feed.

    Raises `BadRequest` if there are no feeds; `ExportError` naming a tensor that holds NaN or infinity, or that is
    empty for every feed.
    """
    run = tap(model, names)
    summaries: dict[str, list[T]] = {name: [] for name in names}
    number = 0
    for number, feed in enumerate(feeds, 1):
        for name, values in run(feed).items():
            if not np.isfinite(values).all():
                raise ExportError(
                    f"the float graph's tensor {name!r} holds NaN or infinity on calibration input {number}, so it has "
                    "no range; look at the checkpoint's weights, or at that input"
                )
            if values.size:  # an expert of a mixture may get no token
                summaries[name].append(summarize(name, values))
    if names and not number:
        raise BadRequest("there is nothing to calibrate on; give pictures (--images) or texts (--texts)")
    if empty := [name for name in names if not summaries[name]]:
        raise ExportError(
            f"no calibration input gives {empty[0]} a value, and {len(empty)} tensors in all, so they have no range; "
            "give more pictures or texts, or, if experts are routed, export with --experts dense"
        )
    return summaries


def extremes(values: Array, axis: int | None = None) -> tuple[Array, Array]:
    """Minimum and maximum of ``values``, for each position along ``axis`` if it is given."""
    others = None if axis is None else tuple(i for i in range(values.ndim) if i != axis % values.ndim)
    return values.min(axis=others), values.max(axis=others)


def widest(limits: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """The smallest range that holds all ``limits``: numbers, or lists of numbers."""
    return np.min([low for low, _ in limits], axis=0).tolist(), np.max([high for _, high in limits], axis=0).tolist()
