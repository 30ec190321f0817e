"""Reading the small data set directories that evals take."""

import json
from pathlib import Path
from typing import Any

from models.errors import BadRequest


def read(path: Path, expected: str) -> Any:
    """The JSON in ``path``. Raises `BadRequest` that says what the directory must hold."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} cannot be read ({error}); the data directory must hold {expected}") from None
