"""`LabelSets`: registered labels with their templates, one JSON file each, written whole or not at all."""

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path

import orjson

from calmclip.models.errors import BadRequest, LabelSetNotFound, Overloaded, TooManyLabels, suggestion
from calmclip.service.schemas import NAME
from calmclip.service.settings import Limits

TICK_NS = 100_000_000  # longer than the ticks by which file systems tell the time of a change
LOCK_S = 5.0  # how long a change waits for those of others; one takes milliseconds
MAX_CHARACTERS = 1000  # of a label or template; no text tower reads as many


@dataclass(frozen=True)
class LabelSet:
    """``version`` counts the changes, from 1. No templates: the bundle's own prompts.

    ``temperature`` and ``none_below``: of `ClassifyRequest`. ``calibrated_for``: digest of the bundle whose scores the
    temperature was found for; None where a caller chose it, for whichever bundle.
    """

    name: str
    version: int
    labels: tuple[str, ...]
    templates: tuple[str, ...] = ()
    temperature: float = 1.0
    none_below: float | None = None
    calibrated_for: str | None = None

    def temperature_for(self, digest: str) -> float:
        """What was found for one bundle says nothing of another, whose scores stay as they are."""
        return self.temperature if self.calibrated_for in (None, digest) else 1.0


class LabelSets:
    """What the folder holds. Several services may share it, threads may call; a `put` is on disk before it returns.

    Raises `BadRequest` for a file that is none.
    """

    def __init__(self, directory: Path, limits: Limits) -> None:
        self.directory = directory
        self.limits = limits
        self._seen: tuple[int, dict[str, LabelSet]] = 0, {}  # the folder's time, and what lay in it then
        self._look()

    def all(self) -> list[LabelSet]:
        return sorted(self._look().values(), key=attrgetter("name"))

    def get(self, name: str) -> LabelSet:
        sets = self._look()
        try:
            return sets[name]
        except KeyError:
            known = sorted(sets)
            raise LabelSetNotFound(f"there is no label set {name!r}; {suggestion(name, known)}", known=known) from None

    def _look(self) -> dict[str, LabelSet]:
        """By name; read anew when the folder's time has changed, or is too young to tell two changes apart."""
        try:
            changed = self.directory.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        before, sets = self._seen
        if changed != before:
            settled = time.time_ns() - changed > TICK_NS
            sets = {one.name: one for one in map(_read, sorted(self.directory.glob("*.json"))) if one}
            self._seen = (changed if settled else 0), sets
        return sets

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer, of all threads and of all services at this folder: each opens it and so has a lock of its own.

        Raises `Overloaded` where another keeps the lock: the threads that would wait are those that collections need.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.directory, os.O_RDONLY)
        try:
            latest = time.monotonic() + LOCK_S
            while not _lock(folder):
                if time.monotonic() > latest:
                    raise Overloaded(
                        f"another has kept the label sets locked for {LOCK_S:g} s; try again in a second",
                        reason="writes",
                    )
                time.sleep(0.005)
            yield
        finally:
            os.close(folder)

    def resolve(self, labels: Sequence[str], label_set: str | None, templates: Sequence[str]) -> LabelSet:
        """What a request asks for: the set where one is named, but the request's own templates win."""
        named = LabelSet("", 0, tuple(labels)) if label_set is None else self.get(label_set)
        found = replace(named, templates=tuple(templates) or named.templates)
        check_labels(found.labels, found.templates, self.limits)
        return found

    def put(
        self,
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] = (),
        temperature: float = 1.0,
        none_below: float | None = None,
    ) -> LabelSet:
        """Raises `BadRequest`, `TooManyLabels`, `Overloaded`. The same content again keeps its version."""
        check_name("label set", name)
        check_labels(labels, templates, self.limits)
        if repeated := {label for label in labels if labels.count(label) > 1}:
            raise BadRequest(f"the label {min(repeated)!r} is given twice; expected each once")
        with self._alone():
            old = self._look().get(name)
            version = old.version if old else 0
            new = LabelSet(name, version, tuple(labels), tuple(templates), temperature, none_below)
            if old == new:
                return new
            return self._write(replace(new, version=version + 1))

    def calibrate(self, old: LabelSet, temperature: float, digest: str) -> LabelSet:
        """``temperature``: found for the bundle ``digest``.

        Raises `LabelSetNotFound`, and `BadRequest` where the set is no longer ``old``.
        """
        with self._alone():
            if self.get(old.name) != old:
                raise BadRequest(
                    f"label set {old.name!r} was changed while it was being calibrated; calibrate it again"
                )
            new = replace(old, temperature=temperature, calibrated_for=digest, version=old.version + 1)
            return self._write(new)

    def _write(self, new: LabelSet) -> LabelSet:
        write_whole(self.directory / f"{new.name}.json", orjson.dumps(asdict(new), option=orjson.OPT_INDENT_2))
        return new

    def delete(self, name: str) -> None:
        with self._alone():
            self.get(name)
            (self.directory / f"{name}.json").unlink(missing_ok=True)


def _lock(folder: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_name(what: str, name: str) -> None:
    """Names become names of files and tables. Raises `BadRequest`."""
    if not re.fullmatch(NAME, name):
        raise BadRequest(
            f"{name!r} is no name for a {what}; use 1 to 64 of a-z, 0-9, '.', '_', '-', the first a letter or digit"
        )


def check_labels(labels: Sequence[str], templates: Sequence[str], limits: Limits) -> None:
    """Raises `TooManyLabels`, `BadRequest`. No labels may be right (the bundle's own), so they pass."""
    if len(labels) > limits.labels:
        raise TooManyLabels(f"{len(labels)} labels were given; at most {limits.labels} are read at once")
    if len(templates) > limits.templates:
        raise BadRequest(f"{len(templates)} templates were given; at most {limits.templates} are read at once")
    for what, texts in (("label", labels), ("template", templates)):
        for index, text in enumerate(texts):
            if len(text) > MAX_CHARACTERS:
                raise BadRequest(f"{what} {index} has {len(text)} characters; at most {MAX_CHARACTERS} are read")
    for label in labels:
        if not label.strip():
            raise BadRequest(f"label {labels.index(label)} is empty; expected some words")
    for template in templates:
        if "{}" not in template:
            raise BadRequest(f"the template {template!r} has no '{{}}' where the label belongs")


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


def _read(path: Path) -> LabelSet | None:
    """None where it has just been deleted."""
    try:
        data = orjson.loads(path.read_bytes())
        # keyword by keyword: a file of an older version has fewer
        return LabelSet(**{**data, "labels": tuple(data["labels"]), "templates": tuple(data["templates"])})
    except FileNotFoundError:
        return None
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise BadRequest(f"{path} is no label set ({error!r}); repair it or move it away") from None
