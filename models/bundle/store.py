"""Bundle directories on disk: read, verify, seal, list. This module reads no ONNX.

A sealed bundle never changes. A new bundle is written into a hidden directory beside its target and then renamed, so a
reader sees the complete bundle or none.
"""

import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from calmclip.models.bundle.manifest import MANIFEST, File, Manifest, parse
from calmclip.models.errors import BundleError, BundleInvalid, BundleNotFound, suggestion
from calmclip.models.tasks import require

MAX_MANIFEST_BYTES = 1 << 20  # a manifest has a few KiB; a larger file is an attack or a mistake
MAX_FILES = 1000
State = frozenset[tuple[str, int, int, int, int]]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Sealed(NamedTuple):
    """A verified bundle directory. ``digest``: sha256 of bundle.json, which has the hash of every file."""

    directory: Path
    manifest: Manifest
    digest: str


def read(directory: Path, *, verify: bool = True) -> Sealed:
    """Open the bundle in ``directory``; with ``verify`` every listed file is hashed.

    Raises `BundleNotFound`, `BundleTooNew`, or `BundleInvalid` naming the wrong file: it is absent, a link, not listed,
    or has another size or hash.
    """
    try:
        return _read(directory, verify=verify)
    except OSError as error:
        raise BundleInvalid(f"{error.filename or directory} cannot be read: {error.strerror}") from None
    except RecursionError:  # Python 3.11 walks folders recursively
        raise BundleInvalid(f"{directory} holds folders too deep to walk") from None


def _read(directory: Path, *, verify: bool) -> Sealed:
    path = directory / MANIFEST
    if not path.is_file():
        raise BundleNotFound(f"{directory} holds no {MANIFEST}; expected a directory that 'calmclip export' sealed")
    if path.is_symlink():
        raise BundleInvalid(f"{path} is a link; a bundle holds plain files only")
    if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
        raise BundleInvalid(f"{path} has {size} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
    text = path.read_bytes()
    manifest = load(text, str(path))
    if not manifest.files:
        raise BundleInvalid(f"{path} lists no files, so it is not sealed")
    if len(manifest.files) > MAX_FILES:
        raise BundleInvalid(f"{path} lists {len(manifest.files)} files; at most {MAX_FILES} are read")
    _compare(directory, manifest, contents=verify)
    return Sealed(directory, manifest, hashlib.sha256(text).hexdigest())


def load(text: bytes, where: str) -> Manifest:
    """The manifest in ``text``, with everything that its tasks need. Raises as `parse`."""
    manifest = parse(text, where)
    try:
        require(manifest)
    except ValueError as error:
        raise BundleInvalid(f"{where}: manifest: {error}") from None
    return manifest


def find(name: str, bundles: Path) -> Path:
    """The directory of the bundle ``name`` under ``bundles``, or ``name`` itself if it is a path."""
    if name in (known := names(bundles)):
        return bundles / name
    if os.path.isfile(os.path.join(name, MANIFEST)):
        return Path(name)
    raise BundleNotFound(f"there is no bundle {name!r} in {bundles}; {suggestion(name, known)}", known=known)


def digest_of(directory: Path) -> str | None:
    """sha256 of bundle.json; None if the file cannot be read."""
    try:
        with (directory / MANIFEST).open("rb") as file:
            return hashlib.sha256(file.read(MAX_MANIFEST_BYTES)).hexdigest()
    except OSError:
        return None


def state_of(directory: Path) -> State:
    """(path, size, mtime and ctime in ns, inode) of every file in ``directory``, without following links. Empty if the
    folder cannot be read. No file is read, so this is cheap. It differs after every change of a file.
    """
    entries: list[tuple[str, int, int, int, int]] = []
    folders = [directory]
    try:
        while folders:  # not recursive: folders may be deep
            with os.scandir(folders.pop()) as listing:
                for entry in listing:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    else:
                        of = entry.stat(follow_symlinks=False)
                        entries.append((entry.path, of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino))
    except OSError:
        return frozenset()
    return frozenset(entries)


def names(bundles: Path) -> list[str]:
    """Bundle directories under ``bundles``, sorted, without hidden ones, which are unfinished exports."""
    if not bundles.is_dir():
        return []
    return sorted(d.name for d in bundles.iterdir() if not d.name.startswith(".") and (d / MANIFEST).is_file())


@contextmanager
def stage(bundles: Path, name: str) -> Iterator[Path]:
    """A hidden directory under ``bundles`` for the files of ``name``; removed at the end unless `seal` renamed it.

    Raises `BundleError` if it cannot be created, and if the disk or a quota is full.
    """
    try:
        bundles.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=bundles))
    except OSError as error:
        raise BundleError(f"{bundles} cannot be written: {error.strerror}") from None
    try:
        yield directory
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise BundleError(
            f"{name} cannot be written to {bundles}: {error.strerror}. Nothing was sealed; free some space, or choose "
            "another directory (--out)"
        ) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def describe(directory: Path, manifest: Manifest) -> Manifest:
    """Write ``manifest`` into ``directory`` with the hash and size of every file there, and return it.

    Raises `BundleInvalid` for a file name that no bundle may have, and for a manifest that names an absent file.
    """
    files = {
        path.relative_to(directory).as_posix(): File(sha256=_sha256(path), bytes=path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }
    text = manifest.model_copy(update={"files": files}).model_dump_json(indent=2, exclude_none=True).encode() + b"\n"
    complete = load(text, str(directory / MANIFEST))
    (directory / MANIFEST).write_bytes(text)
    return complete


def seal(staged: Path, manifest: Manifest, *, replace: bool = False) -> Sealed:
    """Hash every file of ``staged`` into the manifest, flush to disk, verify, and rename into place.

    Raises `BundleError` if the target exists without ``replace``, `BundleInvalid` if ``staged`` is no valid bundle;
    then nothing has changed. With ``replace`` the two directories are exchanged atomically on Linux; elsewhere the old
    one is moved away first, and for a moment no bundle has the name. Several processes may seal one name at the same
    time.
    """
    target = staged.parent / manifest.name
    describe(staged, manifest)
    staged.chmod(0o755)  # mkdtemp creates private directories
    for path in (*staged.rglob("*"), staged):
        if not path.is_symlink():
            _flush(path)
    sealed = read(staged)
    with tempfile.TemporaryDirectory(prefix=f".{manifest.name}-old-", dir=staged.parent) as aside:
        while not _moved(staged, target):
            if not replace:
                raise BundleError(
                    f"{target} exists; a sealed bundle never changes, so remove it, rename the new one, or --replace"
                )
            if _exchanged(staged, target):
                shutil.rmtree(staged, ignore_errors=True)
                break
            with suppress(FileNotFoundError):  # another process was faster
                os.rename(target, tempfile.mkdtemp(dir=aside))
    _flush(target.parent)
    return sealed._replace(directory=target)


def _moved(source: Path, target: Path) -> bool:
    """Rename; False if the target exists and is not empty."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        return False
    return True


def _exchanged(source: Path, target: Path) -> bool:
    """Exchange two directories atomically by renameat2(2) with RENAME_EXCHANGE; False if that is not possible."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(cwd, os.fsencode(source), cwd, os.fsencode(target), exchange) == 0


def _compare(directory: Path, manifest: Manifest, *, contents: bool) -> None:
    """The directory must hold exactly the files of the manifest. Sizes are compared before any file is read."""
    root = directory.resolve()
    for name, file in manifest.files.items():
        path = directory / name
        if path.is_symlink() or not path.resolve().is_relative_to(root):
            raise BundleInvalid(f"{path} is a link or leads out of the bundle; a bundle holds plain files only")
        if not path.is_file():
            raise BundleInvalid(f"{path} is listed in {MANIFEST} but does not exist")
        if (size := path.stat().st_size) != file.bytes:
            raise BundleInvalid(f"{path} has {size} bytes; {MANIFEST} lists {file.bytes}")
    files = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_symlink() or not p.is_dir()}
    if stray := sorted(files - manifest.files.keys() - {MANIFEST}):
        raise BundleInvalid(f"{directory / stray[0]} is not listed in {MANIFEST}")
    for name, file in manifest.files.items() if contents else ():
        if (digest := _sha256(directory / name)) != file.sha256:
            raise BundleInvalid(
                f"{directory / name} has sha256 {digest[:12]}…; {MANIFEST} lists {file.sha256[:12]}…. Export it again."
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
