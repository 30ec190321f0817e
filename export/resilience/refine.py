"""Shrink bounds layer by layer, last layer first, without training.

Source: ProAct (code `hamidmousavi0/reliable-relu-toolbox`): bounds change one layer at a time, the last layer first; a
state is kept while top-1 stays within 0.2 points of the start, otherwise the last good state returns. There, gradients
move the bounds; here, a list of factors does, and the state with the best agreement under drawn faults is kept.

The answer to an input is the clean vector that is nearest to its vector, so no labels are needed. The bounds are
initializers that a feed replaces, so a session is opened once for each set of faults.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from calmclip.export import light
from calmclip.export.graph import Draft
from calmclip.export.resilience.faults import Tensor, draw, flipped, kinds, number
from calmclip.export.resilience.forms import HIGH, LOW, Bound
from calmclip.export.resilience.inject import cosines
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.library import Library

FACTORS = (0.9, 0.75, 0.5)
TOLERANCE = 0.002  # of the agreement without faults: the paper's 0.2 points
COSINE = 0.99  # and of the mean cosine: an answer may stay while its vector does not
Run = Callable[[Mapping[str, Bound]], Array]


@dataclass(frozen=True)
class Step:
    """One layer: the factor that was kept (1: none), and agreement and cosine under faults after it."""

    tensor: str
    factor: float
    agreement: float
    cosine: float


def refine(
    clean: Run,
    faulty: Sequence[Run],
    bounds: Mapping[str, Bound],
    shown: Callable[[list[str]], Iterable[str]] = list,
) -> tuple[dict[str, Bound], list[Step]]:
    """``clean`` and ``faulty``: bounds -> vectors [N, D]; ``bounds``: by tensor, in topological order.

    -> the bounds with the best agreement (then cosine) under faults among those that keep `TOLERANCE` and `COSINE`.
    """
    best = dict(bounds)
    truth = clean(best)
    start = agreement(truth, truth)
    score = _score(faulty, best, truth)
    steps = []
    for tensor in shown([*bounds][::-1]):
        kept = 1.0
        for factor in FACTORS:
            candidate = {**best, tensor: Bound(bounds[tensor].low * factor, bounds[tensor].high * factor)}
            answers = clean(candidate)
            if agreement(answers, truth) < start - TOLERANCE or cosines(answers, truth).mean() < COSINE:
                break
            if (candidate_score := _score(faulty, candidate, truth)) > score:
                best, score, kept = candidate, candidate_score, factor
        steps.append(Step(tensor, kept, *score))
    return best, steps


def agreement(vectors: Array, truth: Array) -> float:
    """Share of the rows whose nearest row of ``truth``, by cosine, is their own. NaN and infinity have none."""
    finite = np.isfinite(vectors).all(axis=1) & (vectors != 0).any(axis=1)
    rows = np.where(finite[:, None], vectors, 0).astype(np.float64)
    unit = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    return float((finite & ((rows @ unit.T).argmax(axis=1) == np.arange(len(rows)))).mean())


def runs(
    model: onnx.ModelProto, output: str, feed: Arrays, bounds: Mapping[str, Bound], rate: float, count: int, seed: int,
    library: Library | None = None,
) -> tuple[Run, list[Run]]:  # fmt: skip
    """-> `refine`'s runs of a graph with bounds: the clean one, and ``count`` with faults at ``rate``. A faulty graph
    that the runtime refuses answers NaN."""
    draft = Draft(model)
    known = {name: kind for name, kind in kinds(model).items() if not name.endswith((LOW, HIGH))}
    tensors = [Tensor(kind, draft.array(name), (("graph", name),)) for name, kind in sorted(known.items())]
    bits = sum(tensor.data.size * tensor.width for tensor in tensors)
    clean = _run(model, output, feed, bounds, library)
    assert clean is not None  # the caller's graph has run before
    rows = len(clean(bounds))
    faulty: list[Run] = []
    for repetition in range(count):
        rng = np.random.default_rng([seed, repetition])
        faults = draw(tensors, number(bits, rate, "exact", rng), rng)
        changed = Draft(model)
        for index in np.unique(faults.tensor).tolist():
            hit = faults.tensor == index
            name = tensors[index].holders[0][1]
            changed.add(name, flipped(tensors[index].data, faults.place[hit], faults.bit[hit]))
        faulty.append(_run(changed.finish(), output, feed, bounds, library) or (lambda _: np.full((rows, 1), np.nan)))
    return clean, faulty


def _run(
    model: onnx.ModelProto, output: str, feed: Arrays, bounds: Mapping[str, Bound], library: Library | None
) -> Run | None:
    open_to = onnx.ModelProto()
    open_to.CopyFrom(model)
    for tensor, bound in bounds.items():
        for end, array in ((LOW, bound.low), (HIGH, bound.high)):
            open_to.graph.input.append(
                helper.make_tensor_value_info(tensor + end, onnx.TensorProto.FLOAT, np.shape(array))
            )
    try:
        session = light.Session(open_to, threads=1, library=library)
    except Exception:  # a clean graph has run: this one is refused for its numbers
        return None

    def run(state: Mapping[str, Bound]) -> Array:
        limits = {
            tensor + end: np.asarray(array, np.float32)
            for tensor, bound in state.items()
            for end, array in ((LOW, bound.low), (HIGH, bound.high))
        }
        answer: Array = session.run([output], {**feed, **limits})[0]
        return answer.reshape(len(answer), -1)

    return run


def _score(faulty: Sequence[Run], state: Mapping[str, Bound], truth: Array) -> tuple[float, float]:
    answers = [run(state) for run in faulty]
    agreements = [agreement(vectors, truth) if vectors.shape == truth.shape else 0.0 for vectors in answers]
    likeness = [cosines(vectors, truth).mean() if vectors.shape == truth.shape else 0.0 for vectors in answers]
    return float(np.mean(agreements)), float(np.mean(likeness))
