"""FAMILY evals: a `Runner` and a data set directory -> named numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmclip.models.registry import Registry
from calmclip.models.runner import Runner


@dataclass(frozen=True)
class Eval:
    """``measure(runner, data, limit) -> {name: value}``; accuracies in percent. ``limit``: at most so many pictures.

    ``read(data)``: what is measured on, but for the pictures; `BadRequest` where the directory does not hold it.
    """

    measure: Callable[[Runner, Path, int | None], Mapping[str, float]]
    read: Callable[[Path], Any]
    task: str  # that a bundle must serve
    data: str  # the files the directory must hold, in words


EVALS: Registry[Eval] = Registry("evals", "calmclip.export.evals")
