"""Bounds from calibration inputs: the least and the greatest number of each layer.

Source: Chen et al. 2021, Ranger (arXiv 2003.13874), section 3: bounds are the extremes over calibration data.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx

from calmclip.export.graph import tap
from calmclip.export.quantizers.ranges import extremes
from calmclip.export.resilience.bounds import Site, by_neuron, clips
from calmclip.export.resilience.forms import Bound
from calmclip.models.errors import BadRequest, ExportError
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.library import Library

METHODS = ("layer", "hybrid")
MIXED = "mixed"
# Two ways to compute one graph (our kernels or their functions, another batch size or fusion) round differently. The
# bounds are so much wider than the extremes, as a part of the greater one, that no rounding reaches them.
MARGIN = 1e-4
# A clamp moves a number of an unseen input that is a little out of range to the bound; the other forms drop it. So
# their bounds are twice as far out. A flipped bit of an exponent passes that by orders of magnitude.
SLACK = 1.0


def observe(
    model: onnx.ModelProto, feeds: Iterable[Arrays], places: Sequence[Site], libraries: Sequence[Library | None]
) -> dict[str, tuple[Array, Array]]:
    """Site's tensor -> least and greatest number of each channel, over ``feeds``, by each of ``libraries``."""
    axes = {site.tensor: site.axis for site in places}
    runs = [tap(model, [*axes], library=library) for library in libraries]
    seen: dict[str, tuple[Array, Array]] = {}
    count = 0
    for count, feed in enumerate(feeds, 1):
        for run in runs:
            for name, values in run(feed).items():
                if not np.isfinite(values).all():
                    raise ExportError(
                        f"the graph's tensor {name!r} holds NaN or infinity on calibration input {count}, so it has no "
                        "bound; look at the bundle's weights, or at that input"
                    )
                if values.size:
                    low, high = extremes(values, axes[name])
                    old = seen.get(name, (low, high))
                    seen[name] = np.minimum(old[0], low), np.maximum(old[1], high)
    if not count:
        raise BadRequest("there is nothing to calibrate on; give a folder of pictures and texts (--data)")
    return seen


def bounds(
    model: onnx.ModelProto,
    places: Sequence[Site],
    seen: Mapping[str, tuple[Array, Array]],
    method: str = "layer",
    slack: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Bound]:
    """``method``: of `METHODS`. ``slack``: how much wider than the extremes, as a part of the greater one, by tensor. A
    site that no input reached has no bound. The limits of a Clip are never widened."""
    neurons, limits = by_neuron(model, places) if method == "hybrid" else None, clips(model)
    result = {}
    for site in places:
        if site.tensor in seen:
            low, high = seen[site.tensor]
            if site != neurons:
                low, high = low.min(), high.max()
            elif site.axis == 1:
                low, high = low.reshape(-1, 1, 1), high.reshape(-1, 1, 1)
            wide = _wider(np.asarray(low), np.asarray(high), MARGIN + slack.get(site.tensor, 0.0))
            least, most = limits.get(site.tensor, (-np.inf, np.inf))
            result[site.tensor] = Bound(
                np.maximum(wide.low, np.float32(least)), np.minimum(wide.high, np.float32(most))
            )
    return result


def forms(places: Sequence[Site], form: str) -> dict[str, str]:
    """Site's tensor -> its form. mixed: a clamp behind a convolution, where ONNX Runtime computes it with the product;
    else zero, which keeps far more answers and costs time (docs/evaluation.md)."""
    return {site.tensor: ("clamp" if site.axis == 1 else "zero") if form == MIXED else form for site in places}


def _wider(low: Array, high: Array, part: float) -> Bound:
    more = np.float32(part) * np.maximum(np.abs(low), np.abs(high)).max()
    return Bound(np.asarray(low - more, np.float32), np.asarray(high + more, np.float32))
