"""Outliers in a bundle's float graphs, as export measures them and writes them to report.json.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 3. The larger the outliers, the fewer of a tensor's 8 bits
resolve its other values.
"""

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from calmclip.models.bundle.manifest import REPORT

STATISTICS = ("max_inf_norm", "avg_inf_norm", "max_kurtosis", "avg_kurtosis")


class Pair(NamedTuple):
    """One tensor's largest magnitude and its kurtosis (a Gaussian has 3), means over the inputs."""

    inf_norm: FiniteFloat
    kurtosis: FiniteFloat


class Outliers(BaseModel, frozen=True):
    """The outliers of one graph. ``tensors``: in order of depth; ``worst``: their names by descending kurtosis."""

    max_inf_norm: FiniteFloat
    avg_inf_norm: FiniteFloat
    max_kurtosis: FiniteFloat
    avg_kurtosis: FiniteFloat
    inputs: int
    worst: tuple[str, ...]
    tensors: dict[str, Pair] = Field(min_length=1)


def outliers(directory: Path, roles: Collection[str]) -> dict[str, Outliers]:
    """Role -> outliers from report.json, without roles that have none there, or none that are valid."""
    try:
        graphs = json.loads((directory / REPORT).read_bytes())["graphs"]
        entries = {role: graphs[role]["outliers"] for role in roles if "outliers" in graphs.get(role, {})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    measured = {}
    for role, entry in entries.items():
        with suppress(ValidationError):
            measured[role] = Outliers.model_validate(entry)
    return measured
