"""FAMILY evals: a `Runner` and a data set -> samples; samples of one bundle or two -> figures.

An eval is one module that registers one `Eval`. All evals share the other steps: `samples` saves and loads samples,
`bootstrap` compares two bundles by a paired bootstrap over pictures, `tables` makes a table of figures, `page` an HTML
page with plots. `calmclip.models.eval_cli` is the verb `calmclip eval`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.evals.figures import Figure, Line, Plot
from calmclip.models.evals.samples import Samples
from calmclip.models.flow import Array
from calmclip.models.registry import Registry
from calmclip.models.runner import Runner

__all__ = ["EVALS", "Eval", "Figure", "Line", "NoParams", "Plot", "Samples", "Statistic"]

D = TypeVar("D")
P = TypeVar("P", bound=FrozenModel)

# int64 [n], indices of pictures, with repetitions -> the figures of these pictures; NaN for a figure without a value
Statistic: TypeAlias = Callable[[Array], Sequence[Figure]]


class NoParams(FrozenModel):
    """The params of an eval without params."""


@dataclass(frozen=True)
class Eval(Generic[D, P]):
    """``task``: the task that a bundle must serve. ``data``: a description of the files in a data directory.

    ``read(directory, params, limit)``: the data set, a frozen dataclass of texts, numbers, arrays and at most ``limit``
    pictures, which are not opened. Raises `BadRequest` if the directory does not hold such a data set.
    ``predict(runner, data set, params)``: the bundle's answers, from which all scores are computed.
    ``score(samples, params)``: computes ranks or matches once and returns a `Statistic`, which the bootstrap calls a
    thousand times. The names of the figures depend on the pictures only, not on the bundle.
    ``together(samples, others, params)``: the statistic that compares two bundles, such as their agreement.
    ``plots({side: samples}, params)``: curves for the page.
    ``scoring``: the params that `predict` does not use. They may change for samples from a file.
    ``limit``: the ``limit`` of `read` unless the caller gives one, so that a run takes two minutes at most on two
    cores; None: no limit. ``full``: the params of ``calmclip eval --full``, which has no limit.
    """

    task: str
    data: str
    params: type[P]
    read: Callable[[Path, P, int | None], D]
    predict: Callable[[Runner, D, P], Samples]
    score: Callable[[Samples, P], Statistic]
    together: Callable[[Samples, Samples, P], Statistic] | None = None
    plots: Callable[[Mapping[str, Samples], P], Sequence[Plot]] | None = None
    scoring: frozenset[str] = frozenset()
    limit: int | None = None
    full: Mapping[str, Any] = field(default_factory=dict)


EVALS: Registry[Eval[Any, Any]] = Registry("evals", "calmclip.models.evals")
