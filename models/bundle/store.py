"""Bundle directories on disk: read, verify, seal, list. Knows no ONNX.

A sealed bundle never changes. A new one is written in a hidden directory beside its target and renamed into
place, so a reader sees all of it or none.
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

MAX_MANIFEST_BYTES = 1 << 20  # a manifest is a page; more is an attack or a mistake
MAX_FILES = 1000
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Sealed(NamedTuple):
    """A verified bundle directory. ``digest``: sha256 of bundle.json, which names the whole content."""

    directory: Path
    manifest: Manifest
    digest: str


def read(directory: Path, *, verify: bool = True) -> Sealed:
    """Open the bundle in ``directory``; with ``verify`` every listed file is hashed.

    Raises `BundleNotFound`, `BundleTooNew`, or `BundleInvalid` naming the file that is wrong: absent, of
    another size, of another hash, a link, or not listed.
    """
    try:
        return _read(directory, verify=verify)
    except OSError as error:
        raise BundleInvalid(f"{error.filename or directory} cannot be read: {error.strerror}") from None
    except RecursionError:  # Python 3.11 walks folders by recursion
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
    manifest = parse(text, str(path))
    if not manifest.files:
        raise BundleInvalid(f"{path} lists no files; it was never sealed")
    if len(manifest.files) > MAX_FILES:
        raise BundleInvalid(f"{path} lists {len(manifest.files)} files; at most {MAX_FILES} are read")
    _compare(directory, manifest, contents=verify)
    return Sealed(directory, manifest, hashlib.sha256(text).hexdigest())


def find(name: str, bundles: Path) -> Path:
    """The directory of the bundle called ``name`` under ``bundles``, or ``name`` itself where that is a path."""
    if name in (known := names(bundles)):
        return bundles / name
    if os.path.isfile(os.path.join(name, MANIFEST)):
        return Path(name)
    raise BundleNotFound(f"there is no bundle {name!r} in {bundles}; {suggestion(name, known)}", known=known)


def digest_of(directory: Path) -> str | None:
    """sha256 of its bundle.json, which names the whole content; None where there is none to read."""
    try:
        with (directory / MANIFEST).open("rb") as file:
            return hashlib.sha256(file.read(MAX_MANIFEST_BYTES)).hexdigest()
    except OSError:
        return None


def names(bundles: Path) -> list[str]:
    """Bundle directories under ``bundles``, sorted; hidden ones are exports under way."""
    if not bundles.is_dir():
        return []
    return sorted(d.name for d in bundles.iterdir() if not d.name.startswith(".") and (d / MANIFEST).is_file())


@contextmanager
def stage(bundles: Path, name: str) -> Iterator[Path]:
    """A hidden directory under ``bundles`` to write ``name`` in; gone afterwards unless `seal` renamed it.

    Raises `BundleError` where it cannot be made, and when the disk or a quota is full before all is written.
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
            f"{bundles} took no more of {name}: {error.strerror}. Nothing of it was sealed; make room, or give another "
            "place (--out)"
        ) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def describe(directory: Path, manifest: Manifest) -> Manifest:
    """Write ``manifest`` into ``directory`` with the hash and size of every file there, and return it.

    Raises `BundleInvalid` for a file whose name no bundle holds, and for a manifest that names an absent one.
    """
    files = {
        path.relative_to(directory).as_posix(): File(sha256=_sha256(path), bytes=path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }
    text = manifest.model_copy(update={"files": files}).model_dump_json(indent=2, exclude_none=True).encode() + b"\n"
    complete = parse(text, str(directory / MANIFEST))
    (directory / MANIFEST).write_bytes(text)
    return complete


def seal(staged: Path, manifest: Manifest, *, replace: bool = False) -> Sealed:
    """Hash every file of ``staged`` into the manifest, flush to disk, verify, and rename into place.

    Raises `BundleError` when the target exists and not ``replace``, `BundleInvalid` when ``staged`` would be no
    bundle; then nothing has changed. With ``replace`` the two directories change places in one step where the
    system can (Linux), so that at every moment one whole bundle bears the name; elsewhere the old one is moved
    aside first, and for that moment none does. Of several that seal one name at once, each succeeds or says why.
    """
    target = staged.parent / manifest.name
    describe(staged, manifest)
    staged.chmod(0o755)  # mkdtemp made it private
    for path in (*staged.rglob("*"), staged):
        if not path.is_symlink():
            _flush(path)
    sealed = read(staged)
    with tempfile.TemporaryDirectory(prefix=f".{manifest.name}-old-", dir=staged.parent) as aside:
        while not _moved(staged, target):
            if not replace:
                raise BundleError(
                    f"{target} exists, and a sealed bundle never changes; remove it, name another, or pass --replace"
                )
            if _exchanged(staged, target):
                shutil.rmtree(staged, ignore_errors=True)
                break
            with suppress(FileNotFoundError):  # another sealer was quicker
                os.rename(target, tempfile.mkdtemp(dir=aside))
    _flush(target.parent)
    return sealed._replace(directory=target)


def _moved(source: Path, target: Path) -> bool:
    """Rename; False when the target is there (a rename onto a directory that holds something fails)."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        return False
    return True


def _exchanged(one: Path, other: Path) -> bool:
    """Let two directories change names in one step: renameat2(2) with RENAME_EXCHANGE; False without it."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _compare(directory: Path, manifest: Manifest, *, contents: bool) -> None:
    """What is in the directory must be exactly what the manifest lists. Sizes first: no byte is read before."""
    root = directory.resolve()
    for name, file in manifest.files.items():
        path = directory / name
        if path.is_symlink() or not path.resolve().is_relative_to(root):
            raise BundleInvalid(f"{path} is a link or leads out of the bundle; a bundle holds plain files only")
        if not path.is_file():
            raise BundleInvalid(f"{path} is listed in {MANIFEST} but is not there")
        if (size := path.stat().st_size) != file.bytes:
            raise BundleInvalid(f"{path} has {size} bytes; {MANIFEST} lists {file.bytes}")
    found = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_symlink() or not p.is_dir()}
    if stray := sorted(found - manifest.files.keys() - {MANIFEST}):
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
