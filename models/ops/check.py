"""Every operator beside its oracle, on the same small models: compiled, and by the local function that bundles carry.

The models ship in ``probes/``, because making them takes the onnx package. `python -m calmclip.export.functions`
writes them anew.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calmclip.models.ops.library import Mode, find, why_not
from calmclip.models.ops.table import TABLE, Probe, Row
from calmclip.models.runtime.session import Session, SessionOptions

FOLDER = Path(__file__).with_name("probes")
ROUNDS = 20
WAYS: dict[str, Mode] = {"library": "all", "function": "off"}


@dataclass(frozen=True)
class Result:
    """The largest difference between a probe's outputs and the oracle's; ``trouble``: why there is no comparison."""

    probe: str
    way: str
    rounds: int = ROUNDS
    difference: float = 0.0
    trouble: str = ""
    passed: bool = True


def check(table: tuple[Row, ...] = TABLE) -> Iterator[Result]:
    """Every probe, by the library and by its function. A missing library is a failure."""
    if find() is None:
        yield Result("library", "library", 0, trouble=why_not(), passed=False)
    for row in table:
        for probe in row.probes:
            for way, mode in WAYS.items():
                if mode == "off" or find() is not None:
                    yield _compare(row, probe, way, mode)


def _compare(row: Row, probe: Probe, way: str, mode: Mode) -> Result:
    result = Result(probe.name, way)
    random = np.random.default_rng(0)
    graph = row.graph(probe)
    session = Session(FOLDER / graph.file, graph, SessionOptions(threads=1, ops=mode))
    largest = 0.0
    for _ in range(ROUNDS):
        feeds = probe.draw(random)
        try:
            outputs = session.run(feeds)
        except Exception as error:  # includes ONNX Runtime's own types, which are not public
            return replace(result, trouble=str(error), passed=False)
        for (name, array), expected in zip(outputs.items(), row.expected(feeds, probe), strict=True):
            if array.shape != expected.shape or array.dtype != expected.dtype:
                actual, wanted = (f"{a.dtype} {list(a.shape)}" for a in (array, expected))
                return replace(result, trouble=f"{name} is {actual}; expected {wanted}", passed=False)
            if array.size:
                difference = np.abs(array.astype(np.float64) - expected.astype(np.float64))
                largest = max(largest, float(difference.max()) if np.isfinite(difference).all() else np.inf)
    return replace(result, difference=largest, passed=largest <= row.tolerance)


def as_json(result: Result) -> dict[str, Any]:
    return {name: getattr(result, name) for name in Result.__dataclass_fields__}
