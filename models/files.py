"""Files that several services may share: checked names, atomic writes, one writer at a time."""

import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calmclip.models.errors import BadRequest, Overloaded

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
LOCK_S = 5.0  # how long a change waits for the lock; a change takes milliseconds


def check_name(kind: str, name: str) -> None:
    """Raises `BadRequest` for a name that cannot be the name of a file or table."""
    if not re.fullmatch(NAME, name):
        raise BadRequest(
            f"{name!r} is not a name for a {kind}; use 1 to 64 of a-z, 0-9, '.', '_', '-', the first a letter or digit"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new file, also after a crash."""
    name = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with name.open("xb") as file:  # readable by all that the umask allows: a service may have another user
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


@contextmanager
def exclusive_lock(directory: Path, kind: str) -> Iterator[None]:
    """One writer in ``directory``, among all threads and all services: each call opens a lock of its own.

    Raises `Overloaded` after `LOCK_S`, because waiting threads are taken from the pool that collections need.
    """
    directory.mkdir(parents=True, exist_ok=True)
    folder = os.open(directory, os.O_RDONLY)
    try:
        latest = time.monotonic() + LOCK_S
        while not _try_lock(folder):
            if time.monotonic() > latest:
                raise Overloaded(
                    f"another writer has locked the {kind} for {LOCK_S:g} s; try again in a second", reason="writes"
                )
            time.sleep(0.005)
        yield
    finally:
        os.close(folder)


def _try_lock(folder: int) -> bool:
    """Whether this call took the lock."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
