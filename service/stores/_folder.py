"""A folder of LanceDB tables: who writes to it, who reads a version, and atomic changes of whole tables.

A table is a folder NAME.lance. A table is built in a hidden folder and renamed into place, and renamed out of place
before it is deleted, so a killed process leaves no half table. `Folder` removes such leftovers when it opens the folder
for writing.

A lock is an flock: the kernel releases it when its process ends. On NFS it works if the server and all clients support
locks; a mount with ``nolock`` or ``local_lock`` does not.
"""

import fcntl
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from calmclip.models.errors import CollectionNotFound, StoreLocked

SUFFIX = ".lance"
WRITER = "calmclip.lock"  # holds the id of the process that writes
BUILT, REPLACED, DROPPED = ".built-", ".replaced-", ".dropped-"  # hidden folders, each with one table
PIN = "calmclip-rows-"  # a tag of the version that a process reads; a locked file of the same name stands beside it


class Folder:
    """Raises `CollectionNotFound` if it is to be read and is not there, `StoreLocked` if another process, or another
    store of this process, writes to it."""

    def __init__(self, path: Path, read_only: bool) -> None:
        self.path = path
        self._unlock: Callable[[], object] = lambda: None
        if read_only:
            if not path.is_dir():
                raise CollectionNotFound(f"there is no folder {path}")
        else:
            path.mkdir(parents=True, exist_ok=True)
            self._unlock = weakref.finalize(self, os.close, self._take())  # also if the store is dropped unclosed
            self._tidy()

    def names(self) -> list[str]:
        """Also of what is no table, such as a file or a link to nothing."""
        return sorted(name.removesuffix(SUFFIX) for name in os.listdir(self.path) if _is_table(name))

    def table(self, name: str) -> Path:
        return self.path / f"{name}{SUFFIX}"

    @contextmanager
    def built(self, name: str) -> Iterator[Path]:
        """A folder in which the caller creates the table ``name``; it then takes the place of what has that name."""
        hidden = self._hidden(BUILT)
        try:
            yield hidden
            if os.path.lexists(self.table(name)):
                old = self._hidden(REPLACED)
                os.rename(self.table(name), old / self.table(name).name)
                os.rename(hidden / self.table(name).name, self.table(name))
                _remove(old)
            else:
                os.rename(hidden / self.table(name).name, self.table(name))
        finally:
            _remove(hidden)

    def drop(self, name: str) -> None:
        hidden = self._hidden(DROPPED)
        os.rename(self.table(name), hidden / self.table(name).name)
        _remove(hidden)

    @contextmanager
    def pinned(self) -> Iterator[str]:
        """A name for a tag; `abandoned` is false for it until the end of the block, or of the process."""
        name = f"{PIN}{uuid4().hex}"
        lock = _locked(self.path / name)
        assert lock is not None, name
        try:
            yield name
        finally:
            (self.path / name).unlink()
            os.close(lock)

    def abandoned(self, pin: str) -> bool:
        """Whether the process that took it has ended."""
        if not (self.path / pin).exists():
            return True
        lock = _locked(self.path / pin)
        if lock is None:
            return False
        (self.path / pin).unlink(missing_ok=True)
        os.close(lock)
        return True

    def close(self) -> None:
        self._unlock()

    def _take(self) -> int:
        file = self.path / WRITER
        lock = _locked(file)
        if lock is None:
            process = file.read_text().strip() or "unknown"
            raise StoreLocked(
                f"process {process} writes to {self.path}, and one process alone may; stop it, or let it do the work "
                "(calmclip index --url), or keep the collections in PostgreSQL (CALMCLIP_STORE=pgvector:…)",
                retry_after=5,
            )
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        return lock

    def _tidy(self) -> None:
        """Finish what a killed process began. What `built` has moved away and not replaced comes back."""
        for entry in list(os.scandir(self.path)):
            if entry.name.startswith(REPLACED):
                for table in os.listdir(entry.path):
                    if not os.path.lexists(self.path / table):
                        os.rename(Path(entry.path, table), self.path / table)
            if entry.name.startswith((BUILT, REPLACED, DROPPED)):
                _remove(Path(entry.path))

    def _hidden(self, prefix: str) -> Path:
        path = self.path / f"{prefix}{uuid4().hex}"
        path.mkdir()
        return path


def _is_table(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith(".")


def _locked(file: Path) -> int | None:
    """The descriptor of the locked file, or None if another descriptor has the lock."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(folder: Path) -> None:
    """``folder`` has at most one table, which may be no folder."""
    for table in folder.iterdir() if folder.exists() else ():
        if table.is_dir() and not table.is_symlink():
            shutil.rmtree(table)
        else:
            table.unlink()
    folder.rmdir()
