"""`Classifiers`: the registered classifiers of a service, within its limits."""

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from types import MappingProxyType

from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest
from calmclip.models.labels import check_sizes
from calmclip.models.preprocess.vectors import label_rows
from calmclip.models.stored_classifier import ClassifierFolder, Registered
from calmclip.service.settings import Limits


class Classifiers(ClassifierFolder):
    """One per app. Several services may share the folder, and each sees the changes of the others at once."""

    def __init__(self, directory: Path, limits: Limits) -> None:
        super().__init__(directory)
        self.limits = limits
        self.all()  # raises now for a file that does not hold a classifier

    def for_request(
        self,
        name: str | None,
        labels: Sequence[str],
        templates: Sequence[str],
        descriptions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> Classifier | None:
        """The classifier that a request names, or None. Checks the sizes of the request's own labels and texts.

        Raises `ClassifierNotFound`, `TooManyLabels`, `BadRequest`.
        """
        self.check_sizes(labels, templates, descriptions)
        return self.get(name).classifier if name else None

    def of_vectors(self, label_vectors: Mapping[str, Sequence[Sequence[float]]]) -> Classifier:
        """A classifier of the vectors that a request has for each label. Raises `TooManyLabels`, `BadRequest`."""
        self.check_sizes(tuple(label_vectors), (), {})
        self._check_vectors(label_vectors)
        return Classifier(tuple(label_vectors), label_vectors=label_rows(label_vectors))

    def _check_vectors(self, label_vectors: Mapping[str, Sized]) -> None:
        for label, rows in label_vectors.items():
            if len(rows) > (most := self.limits.templates):
                raise BadRequest(f"{len(rows)} label vectors of {label[:200]!r} were given; at most {most} are read")

    def check_sizes(
        self, labels: Sequence[str], templates: Sequence[str], descriptions: Mapping[str, Sequence[str]]
    ) -> None:
        """Raises `TooManyLabels`, `BadRequest`."""
        limits = self.limits
        check_sizes(labels, templates, descriptions, max_labels=limits.labels, max_templates=limits.templates)

    def put(self, name: str, new: Classifier) -> Registered:
        """Store a classifier that a request made. Raises as `check_sizes` and `store`."""
        self.check_sizes(new.labels, new.templates, new.descriptions)
        self._check_vectors(new.label_vectors)
        return self.store(name, new)
