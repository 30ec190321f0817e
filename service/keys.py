"""API keys: a file of names, hashes and scopes, read again when it changes. No key itself is kept anywhere.

A key is 256 random bits, so one SHA-256 is the right hash for it: nobody guesses it, however fast a guess is. A slow
hash protects what people think up; here it would cost each request tens of milliseconds, also those without a key.
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
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from calmclip.models.errors import BadRequest

log = logging.getLogger("calmclip")

Scope = Literal["read", "write", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "calmclip_"  # by which scanners for secrets, and people, know one
BITS = 256


class Key(BaseModel):
    """What the file says of one key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]


class KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...]

    @field_validator("keys")
    @classmethod
    def _once(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        if len({key.name for key in keys}) < len(keys):
            raise ValueError("a name is given twice")
        return keys


class Keys:
    """The keys of one file, as it is now. Raises `BadRequest` where it cannot be read at the start.

    A file that breaks later leaves the keys in force that were, and the log says so; an empty list shuts everybody out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = _state(path)
        self._keys = read(path)

    def find(self, secret: bytes) -> Key | None:
        """Whose ``secret`` it is. It is compared with all of them, and each time to the end."""
        self._renew()
        digest = hashlib.sha256(secret).hexdigest()
        same = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        return same[0] if same else None

    def _renew(self) -> None:
        state = _state(self.path)
        if state == self._state:
            return
        self._state = state
        try:
            self._keys = read(self.path)
        except BadRequest as error:
            log.warning("%s; the keys that were read before stay in force", error)
        else:
            log.info("%s was read again: %d keys", self.path, len(self._keys))


def read(path: Path) -> tuple[Key, ...]:
    """Raises `BadRequest`, without what the file holds: somebody may have put a key itself there."""
    try:
        return KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise BadRequest(
            f"the keys in {path} cannot be read: {error.strerror}; 'calmclip keys add' makes the first"
        ) from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise BadRequest(f"{path} is no file of keys: {place}: {first['msg']}; 'calmclip keys' writes one") from None


def add(path: Path, name: str, scopes: Iterable[Scope]) -> str:
    """A new key, which is nowhere but in the answer. Raises `BadRequest` for a name that is taken or is none."""
    secret = PREFIX + secrets.token_urlsafe(BITS // 8)
    try:
        key = Key(name=name, sha256=hashlib.sha256(secret.encode()).hexdigest(), scopes=tuple(dict.fromkeys(scopes)))
    except ValidationError:
        raise BadRequest(f"{name!r} is no name: use 1 to 64 letters, digits, '.', '_', '-'") from None
    with _alone(path):
        keys = read(path) if path.exists() else ()
        if name in {key.name for key in keys}:
            raise BadRequest(f"{path} has a key {name!r} already; remove it first, or choose another name")
        _write(path, (*keys, key))
    return secret


def remove(path: Path, name: str) -> None:
    """Raises `BadRequest` for a name that is not there."""
    with _alone(path):
        keys = read(path)
        left = tuple(key for key in keys if key.name != name)
        if len(left) == len(keys):
            raise BadRequest(f"{path} has no key {name!r}; 'calmclip keys list' shows those it has")
        _write(path, left)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of several that would change the file one does at a time; the others wait.

    The lock is on the folder: the file itself is replaced, and one beside it would stay there.
    """
    folder = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)  # with the lock


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    """Whole or not at all, for the owner alone."""
    path = path.resolve()  # or a link would be replaced instead of what it means
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
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
