"""Outliers inside a bundle's float graphs, as export measured them and report.json keeps them.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 3. The larger they are, the less of a tensor's 8 bits is left
for all its other numbers.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

STATISTICS = ("max_inf_norm", "avg_inf_norm", "max_kurtosis", "avg_kurtosis")


class Pair(NamedTuple):
    """Of one tensor: its largest magnitude and its kurtosis (3: Gaussian), means over the inputs."""

    inf_norm: FiniteFloat
    kurtosis: FiniteFloat


class Outliers(BaseModel, frozen=True):
    """Of one graph. ``tensors``: in order of depth; ``worst``: their names, those of the highest kurtosis first."""

    max_inf_norm: FiniteFloat
    avg_inf_norm: FiniteFloat
    max_kurtosis: FiniteFloat
    avg_kurtosis: FiniteFloat
    inputs: int
    worst: tuple[str, ...]
    tensors: dict[str, Pair] = Field(min_length=1)


def outliers(directory: Path, roles: Collection[str]) -> dict[str, Outliers]:
    """Role -> what report.json says; those of whom it says nothing, or what is no `Outliers`, are left out."""
    try:
        graphs = json.loads((directory / "report.json").read_bytes())["graphs"]
        told = {role: graphs[role]["outliers"] for role in roles if "outliers" in graphs.get(role, {})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    found = {}
    for role, facts in told.items():
        try:
            found[role] = Outliers.model_validate(facts)
        except ValidationError:
            continue
    return found
