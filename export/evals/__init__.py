"""FAMILY evals: a `Runner` and a data set directory -> named numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from models.registry import Registry
from models.runner import Runner


@dataclass(frozen=True)
class Eval:
    """``measure(runner, data, limit) -> {name: value}``; accuracies in percent. ``limit``: at most so many pictures."""

    measure: Callable[[Runner, Path, int | None], Mapping[str, float]]
    data: str  # the files the directory must hold, in words


EVALS: Registry[Eval] = Registry("evals", "export.evals")
