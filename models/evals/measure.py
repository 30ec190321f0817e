"""The steps of an eval: check params, read data, predict samples, score."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from calmclip.models.bundle.manifest import FrozenModel, explain
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS
from calmclip.models.evals.figures import Figure
from calmclip.models.evals.samples import Origin, Samples, fingerprint
from calmclip.models.runner import Runner


def params_of(name: str, params: Mapping[str, Any] | None = None) -> FrozenModel:
    """The checked params. Raises `UnknownName` for the eval, `BadRequest` naming the wrong param."""
    model: type[FrozenModel] = EVALS.get(name).params
    try:
        return model.model_validate(params or {})
    except ValidationError as error:
        known = ", ".join(model.model_fields) or "none"
        raise BadRequest(f"params of {name}: {explain(error)}; its params: {known}") from None


def read(name: str, directory: Path, params: Mapping[str, Any] | None = None, limit: int | None = None) -> Any:
    """The eval's data set in ``directory``, at most ``limit`` pictures."""
    return EVALS.get(name).read(directory, params_of(name, params), limit)


def predict(name: str, runner: Runner, data: Any, params: Mapping[str, Any] | None = None) -> Samples:
    """``data``: from `read`, or a data set of the eval's own type. Raises `TaskNotServed`."""
    measured, checked = EVALS.get(name), params_of(name, params)
    runner.bundle.require(measured.task)
    origin = Origin(
        eval=name, bundle=runner.bundle.name, digest=runner.bundle.digest, data=fingerprint(data),
        params=checked.model_dump(mode="json"),
    )  # fmt: skip
    return replace(measured.predict(runner, data, checked), origin=origin)


def figures(samples: Samples, params: Mapping[str, Any] | None = None) -> list[Figure]:
    """The figures of all pictures. ``params`` override those of the samples; see `rescored`."""
    checked = rescored(samples, params or {})
    return [*EVALS.get(samples.made.eval).score(samples, checked)(np.arange(samples.count))]


def named(samples: Samples) -> dict[str, float | int | None]:
    """Figures and counts by name, None for a figure without a value: one bundle's part of a report."""
    values = {" ".join(filter(None, figure.key)): figure.value for figure in figures(samples)}
    return {**{name: value if math.isfinite(value) else None for name, value in values.items()}, **samples.counts}


def rescored(samples: Samples, changes: Mapping[str, Any]) -> FrozenModel:
    """The params of ``samples`` with ``changes``. Raises `BadRequest` for a change that needs new samples."""
    origin = samples.made
    merged = params_of(origin.eval, {**origin.params, **changes})
    before, after = params_of(origin.eval, origin.params).model_dump(), merged.model_dump()
    for key in sorted(after.keys() - EVALS.get(origin.eval).scoring):
        if before[key] != after[key]:
            raise BadRequest(f"the samples have {key} = {before[key]!r}; measure again for {after[key]!r}")
    return merged
