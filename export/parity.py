"""Two ways to compute one thing, on the same feeds: how far apart, per output."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx
import torch

from export import light
from export.nets import Tower
from models.errors import ParityLost
from models.flow import Array, Arrays
from models.ops.library import Library

Run = Callable[[Arrays], Mapping[str, Array]]


def compare(
    reference: Run, candidate: Run, feeds: Iterable[Arrays], summary: Callable[[Arrays], Arrays] | None = None
) -> dict[str, dict[str, float]]:
    """Per output: ``max_abs`` difference; ``cosine`` mean, its standard error ``cosine_error`` and ``cosine_min`` over
    rows; ``sqnr_db``.

    SQNR = 10 log10(sum reference^2 / sum (reference - candidate)^2), over all feeds together.
    ``summary``, where given, makes of a run's outputs what is compared (see `Tower`).
    """
    pairs: dict[str, list[tuple[Array, Array]]] = {}
    for feed in feeds:
        left, right = reference(feed), candidate(feed)
        if summary:
            left, right = summary(left), summary(right)
        for name in left:
            pairs.setdefault(name, []).append((_rows(left[name]), _rows(right[name])))
    result = {}
    for name, both in pairs.items():
        a, b = (np.concatenate([pair[side] for pair in both]) for side in (0, 1))
        noise, signal = float(np.sum((a - b) ** 2)), float(np.sum(a**2))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = np.sum(a * b, axis=1)[norms > 0] / norms[norms > 0]
        result[name] = {
            "max_abs": float(np.max(np.abs(a - b))),
            "cosine": float(cosine.mean()) if cosine.size else 1.0,
            "cosine_error": float(cosine.std(ddof=1) / cosine.size**0.5) if cosine.size > 1 else 0.0,
            "cosine_min": float(cosine.min()) if cosine.size else 1.0,
            "sqnr_db": round(10 * float(np.log10(signal / noise)), 2) if noise > 0 and signal > 0 else 999.0,
        }
    return result


def require(
    found: Mapping[str, Mapping[str, float]], *, max_abs: float = np.inf, min_cosine: float = -1.0, what: str
) -> None:
    """Raises `ParityLost` naming the output that differs by more than ``max_abs`` or has a row under ``min_cosine``."""
    for name, numbers in found.items():
        if not numbers["max_abs"] <= max_abs:
            raise ParityLost(
                f"{what}: output {name!r} differs by {numbers['max_abs']:.2e}; at most {max_abs:.0e} is rounding"
            )
        if not numbers["cosine_min"] >= min_cosine:
            raise ParityLost(
                f"{what}: a row of output {name!r} has the cosine {numbers['cosine_min']:.7f}; at least {min_cosine} "
                "is rounding"
            )


def torch_run(tower: Tower) -> Run:
    """The tower itself, answering arrays by output name."""

    def run(feeds: Arrays) -> dict[str, Array]:
        with torch.inference_mode():
            found = tower.module(*(torch.from_numpy(np.asarray(feeds[name])) for name in tower.inputs))
        outputs = found if isinstance(found, tuple) else (found,)
        return {name: value.numpy() for name, value in zip(tower.outputs, outputs, strict=True)}

    return run


def onnx_run(model: onnx.ModelProto, *, threads: int = 0, library: Library | None = None) -> Run:
    """A graph in memory, answering arrays by output name; our ops by their local functions, or by ``library``."""
    session = light.Session(model, threads=threads, library=library)
    names = [o.name for o in model.graph.output]

    def run(feeds: Arrays) -> dict[str, Array]:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return run


def kept(run: Run, feeds: Sequence[Arrays]) -> Run:
    """What ``run`` answers to each of ``feeds``, worked out now, so that its graph need not stay open."""
    answers = [(feed, run(feed)) for feed in feeds]
    return lambda feed: next(answer for one, answer in answers if one is feed)


def _rows(array: Array) -> Array:
    return (
        np.asarray(array, np.float64).reshape(-1, array.shape[-1]) if array.ndim else np.asarray([[array]], np.float64)
    )
