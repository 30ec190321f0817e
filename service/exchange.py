"""A collection as a file: what the formats `parquet` and `bank` share."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from calmclip.models.errors import BadRequest
from calmclip.service.stores import Info, Row

MAX_ID = 512  # characters, as in a request
UNIT = 1e-3  # a unit vector's length may differ from 1 by so much


@dataclass
class File:
    """An open file. ``rows`` reads and checks it as it goes, and raises `BadRequest`; meanwhile it counts the vectors
    that it had to scale to unit length, in ``scaled``."""

    info: Info
    rows: Iterator[list[Row]]
    scaled: int = 0


class Ids:
    """The ids of a file, checked one by one. ``place`` begins an error."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._seen: set[str] = set()

    def check(self, id_: str) -> str:
        """Raises `BadRequest` for an id that is repeated, or that no request could have."""
        if not 1 <= len(id_) <= MAX_ID or "\0" in id_:
            raise BadRequest(f"{self._place} has the id {id_[:80]!r}; expected 1 to {MAX_ID} characters without NUL")
        if id_ in self._seen:
            raise BadRequest(f"{self._place} has the id {id_!r} twice; expected each id once")
        self._seen.add(id_)
        return id_


@contextmanager
def whole(path: Path, *, replace: bool) -> Iterator[BinaryIO]:
    """A file that appears under ``path`` at the end of the block, or not at all.

    Raises `BadRequest` if there is one without ``replace``.
    """
    if path.exists() and not replace:
        raise BadRequest(f"{path} exists; choose another name, or --replace")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
