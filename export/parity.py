"""Compare two ways to compute the same outputs, on the same feeds. torch is imported where a module of it runs."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx

from calmclip.export import light
from calmclip.export.nets import Tower
from calmclip.models.errors import ParityLost
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.library import Library

Run = Callable[[Arrays], Mapping[str, Array]]


def compare(
    reference: Run, candidate: Run, feeds: Iterable[Arrays], summary: Callable[[Arrays], Arrays] | None = None
) -> dict[str, dict[str, float]]:
    """Per output: ``max_abs`` difference; ``largest`` magnitude in the reference; ``cosine`` mean, its standard error
    ``cosine_error`` and ``cosine_min`` over rows; ``sqnr_db``.

    SQNR = 10 log10(sum reference^2 / sum (reference - candidate)^2), over all feeds; see `decibels`. A row that is zero
    on both sides has no cosine and does not count; a row that is zero on one side, or holds NaN or infinity, has the
    cosine 0. ``summary`` is optional: it turns a run's outputs into the values to compare (see `Tower`).
    """
    cosines: dict[str, list[Array]] = {}
    differences: dict[str, float] = {}
    largest: dict[str, float] = {}
    squares: dict[str, tuple[float, float]] = {}  # of the reference, of the difference
    for feed in feeds:
        left, right = reference(feed), candidate(feed)
        if summary:
            left, right = summary(left), summary(right)
        for name in left:
            a, b = _rows(left[name]), _rows(right[name])
            lost = a - b
            cosines.setdefault(name, []).append(_cosines(a, b))
            differences[name] = float(np.maximum(differences.get(name, 0.0), np.abs(lost).max()))
            largest[name] = float(np.maximum(largest.get(name, 0.0), np.abs(a).max()))
            signal, noise = squares.get(name, (0.0, 0.0))
            squares[name] = signal + float(np.sum(a**2)), noise + float(np.sum(lost**2))
    result = {}
    for name, parts in cosines.items():
        cosine = np.concatenate(parts)
        result[name] = {
            "max_abs": differences[name],
            "largest": largest[name],
            "cosine": float(cosine.mean()) if cosine.size else 1.0,
            "cosine_error": float(cosine.std(ddof=1) / cosine.size**0.5) if cosine.size > 1 else 0.0,
            "cosine_min": float(cosine.min()) if cosine.size else 1.0,
            "sqnr_db": decibels(*squares[name]),
        }
    return result


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread, because its sums depend on the number of threads, and a bundle must not."""
    torch = sys.modules.get("torch")
    if torch is None:  # then no torch module computes
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two sums of squares; 999 for no noise, -999 for no signal or infinite noise."""
    if noise == 0:
        return 999.0
    return round(10 * float(np.log10(signal / noise)), 2) if signal > 0 and np.isfinite(noise) else -999.0


def require(
    agreement: Mapping[str, Mapping[str, float]], *, max_abs: float = np.inf, min_cosine: float = -1.0, what: str
) -> None:
    """Raises `ParityLost` naming the output that differs by more than ``max_abs`` or has a row under ``min_cosine``.

    ``max_abs`` is absolute for numbers up to 1 (vectors of length 1), and relative to the largest number above that
    (logits).
    """
    for name, numbers in agreement.items():
        most = max_abs * (max(1.0, numbers["largest"]) if np.isfinite(numbers["largest"]) else 1.0)
        if not numbers["max_abs"] <= most:
            raise ParityLost(
                f"{what}: output {name!r} differs by {numbers['max_abs']:.2e}; at most {most:.0e} is rounding"
            )
        if not numbers["cosine_min"] >= min_cosine:
            raise ParityLost(
                f"{what}: a row of output {name!r} has the cosine {numbers['cosine_min']:.7f}; at least {min_cosine} "
                "is rounding"
            )


def torch_run(tower: Tower) -> Run:
    """Run the torch module; outputs are arrays by name."""

    import torch

    def run(feeds: Arrays) -> dict[str, Array]:
        with torch.inference_mode():
            outputs = tower.module(*(torch.from_numpy(np.asarray(feeds[name])) for name in tower.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {name: value.numpy() for name, value in zip(tower.outputs, outputs, strict=True)}

    return run


def onnx_run(
    model: onnx.ModelProto, *, threads: int = 0, library: Library | None = None, apart: Sequence[str] = ()
) -> Run:
    """Run a graph in memory; outputs are arrays by name. Our ops run by their local functions, or by ``library``.

    ``apart``: tensors that the runtime must compute as the graph states, without fusing over them.
    """
    names = [output.name for output in model.graph.output]
    try:  # the runtime does not fuse over an output
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in apart if name not in names)
        session = light.Session(model, threads=threads, library=library)
    finally:
        del model.graph.output[len(names) :]

    def run(feeds: Arrays) -> dict[str, Array]:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return run


def stored(run: Run, feeds: Sequence[Arrays]) -> Run:
    """Run all ``feeds`` now; -> a `Run` that looks up their outputs, so that the graph need not stay open."""
    answers = {id(feed): (feed, run(feed)) for feed in feeds}
    return lambda feed: answers[id(feed)][1]


def _cosines(a: Array, b: Array) -> Array:
    """Cosine of each row of two float64 [N, C], without rows that are zero on both sides."""
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    length, nonzero = norms[0] * norms[1], (norms[0] != 0) | (norms[1] != 0)
    finite = np.isfinite(length) & (length > 0)
    cosines = np.zeros(len(a))
    cosines[finite] = np.sum(a[finite] * b[finite], axis=1) / length[finite]
    return np.asarray(cosines[nonzero])


def _rows(array: Array) -> Array:
    return np.asarray(array, np.float64).reshape(-1, array.shape[-1] if array.ndim else 1)
