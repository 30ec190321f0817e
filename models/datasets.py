"""The files of data sets for evals and training: JSON, lines of text, captions of pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from calmclip.models.errors import BadRequest

T = TypeVar("T")
FORM = '{"file": [captions]}, or as .jsonl {"image": file, "captions": [captions]} a line'


def first(rows: Sequence[T], limit: int | None) -> Sequence[T]:
    """The first ``limit`` rows, or all. Raises `BadRequest` for a limit below 1."""
    if limit is not None and limit < 1:
        raise BadRequest(f"limit is {limit}; expected at least 1")
    return rows[:limit]


def read_json(path: Path, expected: str) -> Any:
    """The JSON in ``path``. Raises `BadRequest`; ``expected`` describes the data directory in the message."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} cannot be read ({error}); the data directory must hold {expected}") from None


def lines(file: Path) -> list[str]:
    """The lines of ``file`` that are not empty. Raises `BadRequest`."""
    try:
        texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{file} is not text in UTF-8 ({error}); expected one document per line") from None
    if not texts:
        raise BadRequest(f"{file} has no text; expected one document per line")
    return texts


def read_captions(file: Path) -> dict[str, list[str]]:
    """Picture -> its captions, at least one, in the order of the file. Raises `BadRequest`."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            pictures = {row["image"]: row["captions"] for row in rows}
        else:
            pictures = json.loads(text)
        for picture, captions in pictures.items():
            if not (isinstance(captions, list) and captions and all(isinstance(caption, str) for caption in captions)):
                raise ValueError(f"{picture!r} has no list of captions")
        if not pictures:
            raise ValueError("no pictures")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRequest(f"{file} cannot be read ({error!r}); it must hold {FORM}") from None
    return pictures
