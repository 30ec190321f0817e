"""`Classifiers`: registered classifiers. Each is a JSON file; the arrays of a fitted head are a file beside it.

`NAME.json` holds everything except the arrays. `NAME-HASH.npz` holds the arrays; HASH is the start of their SHA-256.
The arrays are written first and the JSON file last, both atomically, so a reader never sees one without the other.
Several services may share the folder.
"""

import hashlib
import io
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, ClassifierNotFound, suggestion
from calmclip.models.flow import Arrays
from calmclip.models.labels import check_distinct, check_sizes, require_labels
from calmclip.service.files import check_name, exclusive_lock, write_atomically
from calmclip.service.settings import Limits

TICK_NS = 100_000_000  # longer than the resolution of a file system's modification times


@dataclass(frozen=True)
class Registered:
    """``version`` counts the changes, from 1. ``assets`` is the name of the file with the head's arrays, or ""."""

    name: str
    version: int
    classifier: Classifier
    assets: str = ""

    def content(self) -> dict[str, Any]:
        """What its file holds, without the version."""
        classifier = self.classifier
        return {
            "name": self.name,
            "labels": list(classifier.labels),
            "templates": list(classifier.templates),
            "descriptions": {label: list(lines) for label, lines in classifier.descriptions.items()},
            "head": classifier.head,
            "params": dict(classifier.params),
            "temperature": classifier.temperature,
            "none_below": classifier.none_below,
            "family": classifier.family,
            "assets": self.assets,
        }


class Classifiers:
    """The classifiers of a folder. Threads may call its methods. A change is on disk when its method returns.

    Raises `BadRequest` for a file that does not hold a classifier.
    """

    def __init__(self, directory: Path, limits: Limits) -> None:
        self.directory = directory
        self.limits = limits
        self._cached: tuple[int, dict[str, Registered]] = 0, {}  # the folder's modification time, its classifiers then
        self._load()

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

    def for_request(self, name: str | None, labels: Sequence[str], templates: Sequence[str]) -> Classifier | None:
        """The classifier that a request names, or None. Checks the sizes of the request's own labels and templates.

        Raises `ClassifierNotFound`, `TooManyLabels`, `BadRequest`.
        """
        self._check_sizes(labels, templates, {})
        return self.get(name).classifier if name else None

    def _check_sizes(
        self, labels: Sequence[str], templates: Sequence[str], descriptions: Mapping[str, Sequence[str]]
    ) -> None:
        limits = self.limits
        check_sizes(labels, templates, descriptions, max_labels=limits.labels, max_templates=limits.templates)

    def put(self, name: str, new: Classifier) -> Registered:
        """Register ``new`` under ``name``. The same content again keeps its version.

        Raises `BadRequest`, `TooManyLabels`, `Overloaded`.
        """
        check_name("classifier", name)
        require_labels(new.labels)
        self._check_sizes(new.labels, new.templates, new.descriptions)
        check_distinct(new.labels)
        if new.head is not None:
            _ = new.bound  # checks the head's params and assets
        with exclusive_lock(self.directory, "classifiers"):
            old = self._load().get(name)
            return self._write(old, Registered(name, 1, new))

    def change(self, old: Registered, **changed: Any) -> Registered:
        """``old`` with these fields of its classifier changed.

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
            self._delete_assets(deleted.assets)

    def _write(self, old: Registered | None, new: Registered) -> Registered:
        data = _npz(new.classifier.assets) if new.classifier.assets else b""
        new = replace(new, assets=f"{new.name}-{hashlib.sha256(data).hexdigest()[:16]}.npz" if data else "")
        if old and old.content() == new.content():
            return old
        new = replace(new, version=old.version + 1 if old else 1)
        if data:
            write_atomically(self.directory / new.assets, data)
        content = {"version": new.version, **new.content()}
        write_atomically(self.directory / f"{new.name}.json", orjson.dumps(content, option=orjson.OPT_INDENT_2))
        if old and old.assets != new.assets:
            self._delete_assets(old.assets)
        return new

    def _delete_assets(self, assets: str) -> None:
        if assets:
            (self.directory / assets).unlink(missing_ok=True)

    def _load(self) -> dict[str, Registered]:
        """By name. Reads the files again if the folder's modification time has changed, or if that time is so recent
        that a second change could have the same."""
        try:
            changed = self.directory.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        before, known = self._cached
        if changed != before:
            settled = time.time_ns() - changed > TICK_NS
            files = sorted(self.directory.glob("*.json"))
            known = {entry.name: entry for entry in (_read(path, known) for path in files) if entry}
            self._cached = (changed if settled else 0), known
        return known


def _read(path: Path, known: Mapping[str, Registered]) -> Registered | None:
    """None if the file has just been deleted. Arrays with the same hash as in ``known`` are not read again."""
    try:
        data = orjson.loads(path.read_bytes())
        before = known.get(data["name"])
        assets: Arrays = {}
        if data["assets"]:
            same = before is not None and before.assets == data["assets"]
            assets = before.classifier.assets if before and same else _arrays(path.parent / data["assets"])
        classifier = Classifier(
            tuple(data["labels"]), tuple(data["templates"]),
            {label: tuple(lines) for label, lines in data["descriptions"].items()},
            data["head"], data["params"], assets, None, data["temperature"], data["none_below"], data["family"],
        )  # fmt: skip
        return Registered(data["name"], data["version"], classifier, data["assets"])
    except FileNotFoundError:
        return None
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, BadRequest) as error:
        raise BadRequest(f"{path} is not a classifier ({error!r}); repair the file or move it away") from None


def _npz(arrays: Arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())})  # type: ignore[arg-type]
    return file.getvalue()


def _arrays(path: Path) -> dict[str, Any]:
    """Raises `BadRequest` if the content does not match the hash in the file's name."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:16] != path.stem.rpartition("-")[2]:
        raise BadRequest(f"{os.fspath(path)} has changed since it was written; fit the classifier again")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
