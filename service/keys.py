"""API keys: a file of names, hashes and scopes, read again when it changes. The keys themselves are stored nowhere.

A key is 256 random bits, so one SHA-256 protects it: no attacker guesses it, however fast a guess is. A slow hash is
for passwords; here it would cost every request tens of milliseconds, even requests with a wrong key.
"""

import fcntl
import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from calmclip.models.errors import BadRequest
from calmclip.service.scopes import Scope

log = logging.getLogger("calmclip")

PREFIX = "calmclip_"  # by which secret scanners and people recognize a key
BITS = 256


class Key(BaseModel):
    """One key, as the file holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]


class KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...]

    @field_validator("keys")
    @classmethod
    def _unique(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        if len({key.name for key in keys}) < len(keys):
            raise ValueError("a name appears twice")
        return keys


class Keys:
    """The keys of one file, as it is now. Raises `BadRequest` if the file cannot be read at the start.

    If the file breaks later, the last good keys stay in force and the log says so. An empty list admits no client.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = _state(path)
        self._keys = read(path)

    def find(self, secret: bytes) -> Key | None:
        """The key of this ``secret``. The comparison takes the same time for every secret."""
        self._renew()
        digest = hashlib.sha256(secret).hexdigest()
        matches = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        return matches[0] if matches else None

    def _renew(self) -> None:
        state = _state(self.path)
        if state == self._state:
            return
        self._state = state
        try:
            self._keys = read(self.path)
        except BadRequest as error:
            log.warning("%s; the keys read before stay in force", error)
        else:
            log.info("%s was read again: %d keys", self.path, len(self._keys))


def read(path: Path) -> tuple[Key, ...]:
    """Raises `BadRequest`. Its message quotes nothing of the file, which may hold a key by mistake."""
    try:
        return KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise BadRequest(
            f"the keys in {path} cannot be read: {error.strerror}; 'calmclip keys add' creates the file"
        ) from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise BadRequest(f"{path} is not a file of keys: {place}: {first['msg']}; 'calmclip keys' writes one") from None


def add(path: Path, name: str, scopes: Iterable[Scope]) -> str:
    """Add a key and return its secret, which is stored nowhere. Raises `BadRequest` for a taken or invalid name."""
    secret = PREFIX + secrets.token_urlsafe(BITS // 8)
    try:
        key = Key(name=name, sha256=hashlib.sha256(secret.encode()).hexdigest(), scopes=tuple(dict.fromkeys(scopes)))
    except ValidationError:
        raise BadRequest(f"{name!r} is not a name: use 1 to 64 letters, digits, '.', '_', '-'") from None
    with _locked(path):
        keys = read(path) if path.exists() else ()
        if name in {key.name for key in keys}:
            raise BadRequest(f"{path} has a key {name!r} already; remove it first, or choose another name")
        _write(path, (*keys, key))
    return secret


def remove(path: Path, name: str) -> None:
    """Raises `BadRequest` for an unknown name."""
    with _locked(path):
        keys = read(path)
        others = tuple(key for key in keys if key.name != name)
        if len(others) == len(keys):
            raise BadRequest(f"{path} has no key {name!r}; 'calmclip keys list' shows its keys")
        _write(path, others)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time changes the file; the others wait.

    The lock is on the folder, because the file is replaced and a lock file would stay behind.
    """
    folder = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)  # releases the lock


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    """Atomically, readable by the owner alone."""
    path = path.resolve()  # else a symbolic link would be replaced, not its target
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(KeyFile(keys=keys).model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
