"""A classifier as files: JSON, and the arrays of a fitted head as safetensors beside it.

`NAME.json` holds everything except the arrays. `NAME-HASH.safetensors` holds the arrays; HASH is the start of its
SHA-256. The arrays are written first and the JSON file last, both atomically, so a reader never sees one without the
other. Several processes may share a folder. docs/classifiers.md is the normative text.
"""

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from time import time_ns
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError
from safetensors.numpy import load, save

from calmclip.models.bundle.manifest import FrozenModel, explain
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, ClassifierExists, ClassifierNotFound, suggestion
from calmclip.models.files import check_name, exclusive_lock, write_atomically
from calmclip.models.flow import Array, Arrays
from calmclip.models.labels import check_distinct, require_labels
from calmclip.models.tasks.fit import FitReport

FORMAT = 1
CLASSIFIER = ("labels", "templates", "descriptions", "head", "params", "temperature", "none_below", "family")
TICK_NS = 100_000_000  # longer than the resolution of a file system's modification times
READS = 5  # of a file whose arrays are gone: each time another process may just have replaced it


class StoredFit(FrozenModel):
    """What a fit made. ``arrays``: the file's name, None if the head has no arrays; ``sha256``: of that file.
    ``digest``: of all that the fit made, see `digest`. ``report``: None for a head that no fit of ours made."""

    arrays: str | None
    sha256: str | None
    report: FitReport | None
    digest: str


class StoredRows(FrozenModel):
    """The vectors of one label. ``data``: base64 of little-endian float32 [N, ``dim``]."""

    dim: int = Field(ge=1)
    data: str

    @classmethod
    def of(cls, rows: Array) -> "StoredRows":
        return cls(dim=rows.shape[1], data=b64encode(rows.astype("<f4").tobytes()).decode())

    def rows(self) -> Array:
        """float32 [N, dim]. Raises ValueError."""
        return np.frombuffer(b64decode(self.data, validate=True), "<f4").astype(np.float32).reshape(-1, self.dim)


class Stored(FrozenModel):
    """The content of `NAME.json`."""

    format: Literal[1]
    name: str
    version: int
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    descriptions: dict[str, tuple[str, ...]]
    head: str | None
    params: dict[str, Any]
    temperature: float
    none_below: float | None
    family: str | None
    fit: StoredFit | None
    label_vectors: dict[str, StoredRows] | None = None


@dataclass(frozen=True)
class Registered:
    """``version`` counts the changes, from 1. ``sha256``: of the file with the head's arrays; "" without arrays."""

    name: str
    version: int
    classifier: Classifier
    report: FitReport | None = None
    sha256: str = ""

    @property
    def arrays(self) -> str:
        """The name of the file with the head's arrays, or ""."""
        return f"{self.name}-{self.sha256[:16]}.safetensors" if self.sha256 else ""

    def stored(self) -> Stored:
        """The content of its file."""
        classifier = self.classifier
        fit = None
        if self.sha256 or self.report:
            report = asdict(self.report) if self.report else None
            fit = {"arrays": self.arrays or None, "sha256": self.sha256 or None, "report": report, "digest": ""}
        of_classifier = {key: getattr(classifier, key) for key in CLASSIFIER}
        vectors = {label: StoredRows.of(rows) for label, rows in classifier.label_vectors.items()} or None
        stored = Stored.model_validate(
            {
                "format": FORMAT, "name": self.name, "version": self.version, "fit": fit, "label_vectors": vectors,
                **of_classifier,
            }
        )  # fmt: skip
        if stored.fit is None:
            return stored
        return stored.model_copy(update={"fit": stored.fit.model_copy(update={"digest": digest(stored)})})


class ClassifierFolder:
    """The classifiers of a folder. Threads and processes may share it. A change is on disk when its method returns.

    Raises `BadRequest` for a file that does not hold a classifier.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._cached: tuple[int, dict[str, Registered]] = 0, {}  # the folder's modification time, its classifiers then

    def all(self) -> list[Registered]:
        return sorted(self._load().values(), key=attrgetter("name"))

    def get(self, name: str) -> Registered:
        """Raises `ClassifierNotFound`."""
        known = self._load()
        try:
            return known[name]
        except KeyError:
            raise ClassifierNotFound(
                f"there is no classifier {name!r}; {suggestion(name, known)}", known=sorted(known)
            ) from None

    def require_free(self, name: str) -> None:
        """Raises `ClassifierExists`, and `BadRequest` for what cannot be a name."""
        check_name("classifier", name)
        if known := self._load().get(name):
            raise ClassifierExists(
                f"there is a classifier {name!r} already, of version {known.version}; choose another name, or ask for "
                "`replace`"
            )

    def store(self, name: str, new: Classifier, report: FitReport | None = None, *, replace: bool = True) -> Registered:
        """Store ``new`` under ``name``, with the ``report`` of its fit. The same content again keeps its version.

        Raises `BadRequest` and `TooManyLabels` for a classifier that cannot be stored, `Overloaded`, and, unless
        ``replace``, `ClassifierExists`.
        """
        check_name("classifier", name)
        require_labels(new.labels)
        check_distinct(new.labels)
        if new.head is not None:
            _ = new.bound  # checks the head's params and assets
        with exclusive_lock(self.directory, "classifiers"):
            if not replace:
                self.require_free(name)
            return self._write(self._load().get(name), Registered(name, 1, new, report))

    def change(self, old: Registered, **changed: Any) -> Registered:
        """``old`` with these fields of its classifier changed. They are none of those that a fit makes.

        Raises `ClassifierNotFound`, and `BadRequest` if another change came first.
        """
        with exclusive_lock(self.directory, "classifiers"):
            if self.get(old.name).version != old.version:
                raise BadRequest(
                    f"another request changed classifier {old.name!r} while this one read its pictures; send them again"
                )
            return self._write(old, replace(old, classifier=replace(old.classifier, **changed)))

    def delete(self, name: str) -> None:
        """Raises `ClassifierNotFound`."""
        with exclusive_lock(self.directory, "classifiers"):
            deleted = self.get(name)
            (self.directory / f"{name}.json").unlink(missing_ok=True)
            self._delete_arrays(deleted.arrays)

    def _write(self, old: Registered | None, new: Registered) -> Registered:
        data = save(dict(new.classifier.assets)) if new.classifier.assets else b""
        new = replace(new, version=old.version if old else 1, sha256=hashlib.sha256(data).hexdigest() if data else "")
        if old and old.stored() == new.stored():
            return old
        new = replace(new, version=old.version + 1 if old else 1)
        if data:
            write_atomically(self.directory / new.arrays, data)
        absent = {"label_vectors"} if not new.classifier.label_vectors else None  # an older calmclip refuses the key
        text = json.dumps(new.stored().model_dump(mode="json", exclude=absent), indent=2, ensure_ascii=False)
        write_atomically(self.directory / f"{new.name}.json", text.encode())
        if old and old.arrays != new.arrays:
            self._delete_arrays(old.arrays)
        return new

    def _delete_arrays(self, arrays: str) -> None:
        if arrays:
            (self.directory / arrays).unlink(missing_ok=True)

    def _load(self) -> dict[str, Registered]:
        """By name. Reads the files again if the folder's modification time has changed, or if that time is so recent
        that a second change could have the same."""
        try:
            changed = self.directory.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        before, known = self._cached
        if changed != before:
            settled = time_ns() - changed > TICK_NS
            files = sorted(self.directory.glob("*.json"))
            known = {entry.name: entry for entry in (_read(path, known) for path in files) if entry}
            self._cached = (changed if settled else 0), known
        return known


def read_classifier(path: Path) -> Registered:
    """The classifier of `NAME.json`. Raises `ClassifierNotFound`; `BadRequest` as `ClassifierFolder`."""
    registered = _read(path, {})
    if registered is None:
        raise ClassifierNotFound(f"there is no file {path}; expected the JSON of a classifier, such as NAME.json")
    return registered


def digest(stored: Stored) -> str:
    """SHA-256 of what a fit made, as JSON in UTF-8 with sorted keys and no spaces. It leaves out the name, the version,
    the format, and what `calibrate` sets: the temperature and the threshold."""
    assert stored.fit is not None
    parts = stored.model_dump(mode="json", include={"labels", "templates", "descriptions", "head", "params", "family"})
    parts |= stored.fit.model_dump(mode="json", include={"sha256", "report"})
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, known: Mapping[str, Registered]) -> Registered | None:
    """None if the file has just been deleted. Arrays with the same hash as in ``known`` are not read again."""
    for attempt in range(READS):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return _parsed(path, data, known)
        except FileNotFoundError as error:
            if attempt == READS - 1:
                raise _unreadable(path, f"its arrays {error.filename} are missing") from None
        except (ValidationError, BadRequest) as error:
            why = explain(error) if isinstance(error, ValidationError) else str(error)
            raise _unreadable(path, why) from None
    raise AssertionError("unreachable")


def _parsed(path: Path, data: bytes, known: Mapping[str, Registered]) -> Registered:
    stored = Stored.model_validate_json(data)
    if stored.name != path.stem:
        raise BadRequest(f"it holds the classifier {stored.name!r}; rename it to {stored.name}.json")
    fit = stored.fit
    assets: Arrays = {}
    if fit and fit.digest != digest(stored):
        raise BadRequest("what the fit made has changed since it was written; fit the classifier again")
    if fit and fit.sha256:
        if fit.arrays != f"{stored.name}-{fit.sha256[:16]}.safetensors":
            raise BadRequest(f"its arrays are called {fit.arrays!r}; expected the name and the hash of the classifier")
        before = known.get(stored.name)
        same = before is not None and before.sha256 == fit.sha256
        assets = before.classifier.assets if before and same else _arrays(path.parent, fit)
    try:
        vectors = {label: rows.rows() for label, rows in (stored.label_vectors or {}).items()}
    except ValueError as error:
        raise BadRequest(f"its label vectors cannot be read: {error}") from None
    of_classifier = {key: getattr(stored, key) for key in CLASSIFIER}
    classifier = Classifier(assets=assets, label_vectors=vectors, **of_classifier)
    report, sha256 = (fit.report, fit.sha256 or "") if fit else (None, "")
    return Registered(stored.name, stored.version, classifier, report, sha256)


def _arrays(directory: Path, fit: StoredFit) -> Arrays:
    """Raises `BadRequest` if the content does not match the hash, `FileNotFoundError`."""
    assert fit.arrays is not None
    data = (directory / fit.arrays).read_bytes()
    if hashlib.sha256(data).hexdigest() != fit.sha256:
        raise BadRequest(f"{fit.arrays} has changed since it was written; fit the classifier again")
    return load(data)


def _unreadable(path: Path, why: str) -> BadRequest:
    return BadRequest(f"{path} is not a classifier ({why}); repair the file or move it away")
