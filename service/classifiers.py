"""`Classifiers`: registered classifiers, a JSON file each, and the arrays of fitted heads beside them.

`NAME.json` says everything but the arrays, which lie in `NAME-HASH.npz` under the first digits of their SHA-256. The
arrays are written first and the JSON file last, each whole or not at all, so that a reader never sees one without the
other. Several services may share the folder.
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

from calmclip.models.classifier import Classifier, check_distinct, require_labels
from calmclip.models.errors import BadRequest, ClassifierNotFound, TooManyLabels, suggestion
from calmclip.models.flow import Arrays
from calmclip.service.files import alone, check_name, write_whole
from calmclip.service.settings import Limits

TICK_NS = 100_000_000  # longer than the ticks by which file systems tell the time of a change
MAX_CHARACTERS = 1000  # of a label, template or description; no text tower reads as many


@dataclass(frozen=True)
class Registered:
    """``version`` counts the changes, from 1. ``assets``: the file of the head's arrays, by its name; "" without."""

    name: str
    version: int
    classifier: Classifier
    assets: str = ""

    def said(self) -> dict[str, Any]:
        """All that its file says: equal for equal content, whatever the version."""
        one = self.classifier
        return {
            "name": self.name,
            "labels": list(one.labels),
            "templates": list(one.templates),
            "descriptions": {label: list(lines) for label, lines in one.descriptions.items()},
            "head": one.head,
            "params": dict(one.params),
            "temperature": one.temperature,
            "none_below": one.none_below,
            "family": one.family,
            "assets": self.assets,
        }


class Classifiers:
    """What the folder holds. Several services may share it, threads may call; a change is on disk before it returns.

    Raises `BadRequest` for a file that is none.
    """

    def __init__(self, directory: Path, limits: Limits) -> None:
        self.directory = directory
        self.limits = limits
        self._seen: tuple[int, dict[str, Registered]] = 0, {}  # the folder's time, and what lay in it then
        self._look()

    def all(self) -> list[Registered]:
        return sorted(self._look().values(), key=attrgetter("name"))

    def get(self, name: str) -> Registered:
        """Raises `ClassifierNotFound`."""
        known = self._look()
        try:
            return known[name]
        except KeyError:
            raise ClassifierNotFound(
                f"there is no classifier {name!r}; {suggestion(name, known)}", known=sorted(known)
            ) from None

    def of_request(
        self, name: str | None, labels: Sequence[str], templates: Sequence[str]
    ) -> tuple[Classifier | None, Sequence[str], Sequence[str]]:
        """The classifier that a request names, if it names one, and its own labels and templates, within the limits.

        Raises `ClassifierNotFound`, `TooManyLabels`, `BadRequest`.
        """
        check_sizes(labels, templates, {}, self.limits)
        return (self.get(name).classifier if name else None), labels, templates

    def put(self, name: str, new: Classifier) -> Registered:
        """Registered under ``name``; the same content again keeps its version.

        Raises `BadRequest`, `TooManyLabels`, `Overloaded`.
        """
        check_name("classifier", name)
        require_labels(new.labels)
        check_sizes(new.labels, new.templates, new.descriptions, self.limits)
        check_distinct(new.labels)
        if new.head is not None:
            _ = new.bound  # whose params and assets are checked
        with alone(self.directory, "classifiers"):
            old = self._look().get(name)
            return self._write(old, Registered(name, 1, new))

    def change(self, old: Registered, **changed: Any) -> Registered:
        """``old`` with these fields of its classifier. Raises `ClassifierNotFound`, and `BadRequest` where another
        change came first."""
        with alone(self.directory, "classifiers"):
            if self.get(old.name).version != old.version:
                raise BadRequest(
                    f"classifier {old.name!r} was changed while pictures were looked at for it; send them again"
                )
            return self._write(old, replace(old, classifier=replace(old.classifier, **changed)))

    def delete(self, name: str) -> None:
        """Raises `ClassifierNotFound`."""
        with alone(self.directory, "classifiers"):
            gone = self.get(name)
            (self.directory / f"{name}.json").unlink(missing_ok=True)
            self._forget(gone.assets)

    def _write(self, old: Registered | None, new: Registered) -> Registered:
        data = _npz(new.classifier.assets) if new.classifier.assets else b""
        new = replace(new, assets=f"{new.name}-{hashlib.sha256(data).hexdigest()[:16]}.npz" if data else "")
        if old and old.said() == new.said():
            return old
        new = replace(new, version=old.version + 1 if old else 1)
        if data:
            write_whole(self.directory / new.assets, data)
        content = {"version": new.version, **new.said()}
        write_whole(self.directory / f"{new.name}.json", orjson.dumps(content, option=orjson.OPT_INDENT_2))
        if old and old.assets != new.assets:
            self._forget(old.assets)
        return new

    def _forget(self, assets: str) -> None:
        if assets:
            (self.directory / assets).unlink(missing_ok=True)

    def _look(self) -> dict[str, Registered]:
        """By name; read anew when the folder's time has changed, or is too young to tell two changes apart."""
        try:
            changed = self.directory.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        before, known = self._seen
        if changed != before:
            settled = time.time_ns() - changed > TICK_NS
            files = sorted(self.directory.glob("*.json"))
            known = {one.name: one for one in (_read(path, known) for path in files) if one}
            self._seen = (changed if settled else 0), known
        return known


def check_sizes(
    labels: Sequence[str], templates: Sequence[str], descriptions: Mapping[str, Sequence[str]], limits: Limits
) -> None:
    """Raises `TooManyLabels`, `BadRequest`. No labels may be right: those of the classifier, or the bundle's own."""
    if len(labels) > limits.labels:
        raise TooManyLabels(f"{len(labels)} labels were given; at most {limits.labels} are read at once")
    if len(templates) > limits.templates:
        raise BadRequest(f"{len(templates)} templates were given; at most {limits.templates} are read at once")
    for label, lines in descriptions.items():
        if len(lines) > limits.templates:
            raise BadRequest(
                f"{len(lines)} descriptions of {label[:200]!r} were given; at most {limits.templates} are read"
            )
    said = (("label", labels), ("template", templates), *(("description", lines) for lines in descriptions.values()))
    for what, texts in said:
        for index, text in enumerate(texts):
            if len(text) > MAX_CHARACTERS:
                raise BadRequest(f"{what} {index} has {len(text)} characters; at most {MAX_CHARACTERS} are read")


def _read(path: Path, known: Mapping[str, Registered]) -> Registered | None:
    """None where it has just been deleted. Arrays that were read before under the same hash are not read again."""
    try:
        data = orjson.loads(path.read_bytes())
        before = known.get(data["name"])
        assets: Arrays = {}
        if data["assets"]:
            same = before is not None and before.assets == data["assets"]
            assets = before.classifier.assets if before and same else _arrays(path.parent / data["assets"])
        found = Classifier(
            tuple(data["labels"]), tuple(data["templates"]),
            {label: tuple(lines) for label, lines in data["descriptions"].items()},
            data["head"], data["params"], assets, None, data["temperature"], data["none_below"], data["family"],
        )  # fmt: skip
        return Registered(data["name"], data["version"], found, data["assets"])
    except FileNotFoundError:
        return None
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, BadRequest) as error:
        raise BadRequest(f"{path} is no classifier ({error!r}); repair it or move it away") from None


def _npz(arrays: Arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())})  # type: ignore[arg-type]
    return file.getvalue()


def _arrays(path: Path) -> dict[str, Any]:
    """Raises `BadRequest` where the file is not the one that its name says."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:16] != path.stem.rpartition("-")[2]:
        raise BadRequest(f"{os.fspath(path)} is not what was written; fit the classifier again")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
