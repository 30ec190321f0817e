"""Captions of pictures in a file: what `calmclip align` trains on and the eval `retrieval` asks."""

import json
from pathlib import Path

from calmclip.models.errors import BadRequest

FORM = '{"file": [captions]}, or as .jsonl {"image": file, "captions": [captions]} a line'


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
