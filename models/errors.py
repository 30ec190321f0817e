"""The errors of models, export and service, as one tree; errors that only HTTP knows are in `service/errors.py`.

A message says what was, what was expected, and what to do. ``known`` has the names that would have worked, if there are
such names. `service.problems` maps the classes to HTTP answers, `calmclip.models.cli` maps them to exit codes.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class CalmclipError(Exception):
    """The base class."""

    def __init__(self, message: str, *, known: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.known = sorted(known)


class BundleError(CalmclipError): ...


class BundleNotFound(BundleError): ...  # no bundle with that name or at that path


class BundleInvalid(BundleError): ...  # a sealed directory that differs from its manifest


class BundleTooNew(BundleError): ...  # a format or a set of tasks that this version does not know


class InputError(CalmclipError): ...  # the caller's input is wrong


class BadRequest(InputError): ...  # values out of range, or values that contradict each other


class BadImage(InputError): ...  # bytes that are no complete picture of a format that is read


class ImageTooLarge(InputError): ...  # more bytes or pixels than the limit


class TooManyLabels(InputError): ...  # no labels, or more than the limit


class TextTooLong(InputError): ...  # more tokens than the text tower's context


class UnknownName(CalmclipError): ...  # no plug-in, verb or graph has that name


class TaskNotServed(CalmclipError): ...  # the bundle does not serve the task


class CollectionError(CalmclipError): ...


class CollectionNotFound(CollectionError): ...


class ItemNotFound(CollectionError): ...  # no item with that id


class CollectionExists(CollectionError): ...  # a name that is in use


class CollectionMismatch(CollectionError): ...  # the collection holds vectors of another bundle


class CollectionDamaged(
    CollectionError
): ...  # a file or a database object is missing, truncated, unreadable or foreign


class ClassifierError(CalmclipError): ...


class ClassifierNotFound(ClassifierError): ...


class ClassifierExists(ClassifierError): ...  # a name that is in use, and no leave to replace its classifier


class ClassifierMismatch(ClassifierError): ...  # the classifier was fitted to another family of bundles


class Unavailable(CalmclipError):
    """The service cannot answer now. ``retry_after``: seconds after which a new try may succeed."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    """Rejected before any work was done. ``reason``: one word for the limit that was reached."""

    def __init__(self, message: str, *, retry_after: float = 1.0, reason: str = "queue") -> None:
        super().__init__(message, retry_after=retry_after)
        self.reason = reason


class StoreUnavailable(Unavailable): ...  # the database of the collections does not answer


class StoreLocked(StoreUnavailable): ...  # another process writes to the folder of the collections


class StoreFull(StoreUnavailable): ...  # the disk of the collections has no room for a write


class DeadlineExceeded(CalmclipError): ...  # the deadline of the request has passed


class OpsLibraryMissing(CalmclipError): ...  # the op library is required and cannot be used


class OpsNotBuilt(CalmclipError): ...  # no compiler, no headers, or a compiler error


class ExtraMissing(CalmclipError): ...  # an optional dependency is not installed


class ExportError(CalmclipError): ...  # raised only in export


class UnknownCheckpoint(ExportError): ...  # no net recognises the directory


class WeightsMissing(ExportError): ...  # a package or file with weights is absent or altered


class ParityLost(ExportError): ...  # the ONNX graph and the torch module disagree


class BarMissed(ExportError): ...  # the bundle misses a bar of its recipe


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, else all known names."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}."


KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}


def kind(value: object) -> str:
    """A JSON value in words, without what the caller sent."""
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return KINDS[type(value)]
