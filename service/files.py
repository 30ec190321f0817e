"""Files that several services may share: names that become names of files, whole writes, one writer at a time."""

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calmclip.models.errors import BadRequest, Overloaded
from calmclip.service.schemas import NAME

LOCK_S = 5.0  # how long a change waits for those of others; one takes milliseconds


def check_name(what: str, name: str) -> None:
    """Names become names of files and tables. Raises `BadRequest`."""
    if not re.fullmatch(NAME, name):
        raise BadRequest(
            f"{name!r} is no name for a {what}; use 1 to 64 of a-z, 0-9, '.', '_', '-', the first a letter or digit"
        )


def write_whole(path: Path, data: bytes) -> None:
    """A reader, also one after a crash, sees the old file or the new one."""
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def alone(directory: Path, what: str) -> Iterator[None]:
    """One writer in ``directory``, of all threads and of all services: each opens it and so has a lock of its own.

    Raises `Overloaded` where another keeps the lock: the threads that would wait are those that collections need.
    """
    directory.mkdir(parents=True, exist_ok=True)
    folder = os.open(directory, os.O_RDONLY)
    try:
        latest = time.monotonic() + LOCK_S
        while not _lock(folder):
            if time.monotonic() > latest:
                raise Overloaded(
                    f"another has kept the {what} locked for {LOCK_S:g} s; try again in a second", reason="writes"
                )
            time.sleep(0.005)
        yield
    finally:
        os.close(folder)


def _lock(folder: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
