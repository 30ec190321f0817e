"""FAMILY evals: a `Runner` and a data set -> samples; samples of one bundle or two -> figures.

An eval is one module that registers one `Eval`. The frame does the rest, the same for all: samples are saved and read
back (`samples`), two bundles are compared by a paired bootstrap over pictures (`bootstrap`), figures become a table
(`tables`) or a page with plots (`page`), and `calmclip eval` is the verb for it (`commands`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

# int64 [n], places of pictures, one as often as it was drawn -> the figures of just these; NaN where there is no value
Statistic: TypeAlias = Callable[[Array], Sequence[Figure]]


class NoParams(FrozenModel):
    """Of an eval with nothing to set."""


@dataclass(frozen=True)
class Eval(Generic[D, P]):
    """``task``: what a bundle must serve. ``data``: the files a data directory must hold, in words.

    ``read(directory, params, limit)``: the data set as a value, a frozen dataclass of texts, numbers, arrays and
    pictures; pictures are not opened. At most ``limit`` pictures. `BadRequest` where the directory does not hold it.
    ``predict(runner, data set, params)``: what the bundle answers, all that scores are made of.
    ``score(samples, params)``: does what is done once (ranks, matches) and returns a `Statistic`, which the bootstrap
    calls a thousand times. The same pictures give figures of the same names, whatever the bundle.
    ``together(samples, others, params)``: the statistic of two bundles at once, such as how often they agree.
    ``plots({side: samples}, params)``: curves for the page.
    ``scoring``: the params that `predict` does not look at. They may be changed for samples read from a file.
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


EVALS: Registry[Eval[Any, Any]] = Registry("evals", "calmclip.models.evals")
