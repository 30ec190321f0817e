"""Files that measurements and trainings read: JSON, lines of text, captions of pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from calmclip.models.errors import BadRequest

T = TypeVar("T")
FORM = '{"file": [captions]}, or as .jsonl {"image": file, "captions": [captions]} a line'


def first(rows: Sequence[T], limit: int | None) -> Sequence[T]:
    """The first ``limit`` of them, or all. Raises `BadRequest` for a limit that leaves none."""
    if limit is not None and limit < 1:
        raise BadRequest(f"limit is {limit}; expected at least 1")
    return rows[:limit]


def read_json(path: Path, expected: str) -> Any:
    """The JSON in ``path``. Raises `BadRequest` that says what the directory must hold, ``expected``."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} cannot be read ({error}); the data directory must hold {expected}") from None


def lines(file: Path) -> list[str]:
    """The texts in ``file``, one a line, without those that are empty. Raises `BadRequest`."""
    try:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{file} is no text in UTF-8 ({error}); expected one document a line") from None
    if not found:
        raise BadRequest(f"{file} holds no text; expected one document a line")
    return found


def read_captions(file: Path) -> dict[str, list[str]]:
    """Picture -> its captions, at least one each, in the file's order. Raises `BadRequest` naming what is wrong."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            found = {row["image"]: row["captions"] for row in rows}
        else:
            found = json.loads(text)
        for picture, captions in found.items():
            if not (isinstance(captions, list) and captions and all(isinstance(one, str) for one in captions)):
                raise ValueError(f"{picture!r} has no list of captions")
        if not found:
            raise ValueError("no pictures")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRequest(f"{file} cannot be read ({error!r}); it must hold {FORM}") from None
    return found
