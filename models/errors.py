"""Every error calmclip raises on purpose, as one tree.

    CalmclipError
    ├── BundleError
    │   ├── BundleNotFound        no bundle of that name or at that path
    │   ├── BundleInvalid         a sealed directory that is not what its manifest says
    │   └── BundleTooNew          a format this version does not read
    ├── InputError                what the caller sent
    │   ├── BadRequest            values that make no sense together
    │   ├── BadImage              bytes that are no picture we read
    │   ├── ImageTooLarge         over a limit of bytes or pixels
    │   ├── TooManyLabels         no labels, or more than the limit
    │   └── TextTooLong           more tokens than the text tower's context
    ├── UnknownName               no plug-in, verb or graph of that name
    ├── TaskNotServed             the bundle exists but does not do this
    ├── CollectionError
    │   ├── CollectionNotFound
    │   └── CollectionMismatch    vectors of one bundle, asked with another
    ├── ClassifierError
    │   ├── ClassifierNotFound
    │   └── ClassifierMismatch    fitted to vectors of one family of bundles, asked with another
    ├── Unavailable               not now; try again
    │   ├── Overloaded            too much is under way
    │   └── StoreUnavailable      the database of the collections does not answer
    ├── DeadlineExceeded          too late to be of use
    ├── OpsLibraryMissing         the op library was demanded and cannot be used; says why
    ├── OpsNotBuilt               no compiler, no headers, or the compiler refused
    ├── ExtraMissing              an optional dependency is not installed; says which
    └── ExportError               raised only in export/
        ├── UnknownCheckpoint     a directory no net recognises
        ├── WeightsMissing        a package or file with weights is absent or altered
        ├── ParityLost            the ONNX graph does not compute what torch computes
        └── BarMissed             a sealed bundle would break a bar of its recipe

A message says what was, what was expected, and what to do. ``known`` holds the names that would have
worked, where there are such names. `service.problems` maps classes to HTTP; `calmclip.models.cli` to exit codes.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class CalmclipError(Exception):
    """Base of all of them."""

    def __init__(self, message: str, *, known: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.known = sorted(known)


class BundleError(CalmclipError): ...


class BundleNotFound(BundleError): ...


class BundleInvalid(BundleError): ...


class BundleTooNew(BundleError): ...


class InputError(CalmclipError): ...


class BadRequest(InputError): ...


class BadImage(InputError): ...


class ImageTooLarge(InputError): ...


class TooManyLabels(InputError): ...


class TextTooLong(InputError): ...


class UnknownName(CalmclipError): ...


class TaskNotServed(CalmclipError): ...


class CollectionError(CalmclipError): ...


class CollectionNotFound(CollectionError): ...


class CollectionMismatch(CollectionError): ...


class ClassifierError(CalmclipError): ...


class ClassifierNotFound(ClassifierError): ...


class ClassifierMismatch(ClassifierError): ...


class Unavailable(CalmclipError):
    """``retry_after``: seconds after which it is likely to go."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    """Turned away before any work was done. ``reason``: one word for what was full."""

    def __init__(self, message: str, *, retry_after: float = 1.0, reason: str = "queue") -> None:
        super().__init__(message, retry_after=retry_after)
        self.reason = reason


class StoreUnavailable(Unavailable): ...


class DeadlineExceeded(CalmclipError): ...


class OpsLibraryMissing(CalmclipError): ...


class OpsNotBuilt(CalmclipError): ...


class ExtraMissing(CalmclipError): ...


class ExportError(CalmclipError): ...


class UnknownCheckpoint(ExportError): ...


class WeightsMissing(ExportError): ...


class ParityLost(ExportError): ...


class BarMissed(ExportError): ...


def suggestion(name: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown name: the nearest known one, else all of them."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known) or 'none'}."
