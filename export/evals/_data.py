"""Reading the small data set directories that evals take."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from calmclip.models.errors import BadRequest

T = TypeVar("T")


def read(path: Path, expected: str) -> Any:
    """The JSON in ``path``. Raises `BadRequest` that says what the directory must hold."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} cannot be read ({error}); the data directory must hold {expected}") from None


def first(rows: Sequence[T], limit: int | None) -> Sequence[T]:
    """The first ``limit`` of them, or all. Raises `BadRequest` for a limit that leaves none."""
    if limit is not None and limit < 1:
        raise BadRequest(f"limit is {limit}; expected at least 1")
    return rows[:limit]
