"""`Bundle`: an open bundle without its sessions."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from calmclip.models.bundle.embedding import embedding_digest
from calmclip.models.bundle.manifest import Graph, ImagePreprocess, Manifest, TextPreprocess, VectorPreprocess
from calmclip.models.bundle.store import Sealed
from calmclip.models.classifier import Classifier
from calmclip.models.errors import BadRequest, BundleInvalid, BundleTooNew, TaskNotServed
from calmclip.models.flow import Array
from calmclip.models.labels import check_distinct, require_labels
from calmclip.models.ops import breakeven
from calmclip.models.ops.library import Library, Mode, find
from calmclip.models.outliers import Outliers, outliers
from calmclip.models.preprocess.image import MAX_PIXELS, ImagePreparer
from calmclip.models.preprocess.text import TextPreparer
from calmclip.models.preprocess.vectors import VectorPreparer
from calmclip.models.tasks import TASKS, embedding, missing_graphs, served


class Bundle:
    """Manifest, preprocessing and default classifier. ``max_pixels``: the largest picture that is decoded.

    ``ops``: whether the op library prepares pictures, see `models.ops.library.find`; the answers are the same.
    """

    def __init__(self, sealed: Sealed, *, max_pixels: int = MAX_PIXELS, ops: Mode = "auto") -> None:
        self.directory: Path = sealed.directory
        self.manifest: Manifest = sealed.manifest
        self.digest: str = sealed.digest
        self.max_pixels = max_pixels
        self.tasks: tuple[str, ...] = served(self.manifest)
        if not self.tasks:
            raise BundleTooNew(
                f"bundle {self.name!r} serves {', '.join(self.manifest.tasks)}; this calmclip knows none of these, "
                f"only {', '.join(TASKS.names())}. Install a newer calmclip, or the package that has the task"
            )
        library = find(ops)
        left = library and breakeven.PICTURES in breakeven.left(library, ops)
        self._library: Library | None = None if left else library  # of the preparation of pictures
        self._images: dict[str, ImagePreparer] = {}
        self._texts: dict[str, TextPreparer] = {}

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def family(self) -> str:
        """The same for the float and the INT8 bundle of one export; the digest if the manifest has no family."""
        return self.manifest.family or self.digest

    @cached_property
    def embedding_digest(self) -> str | None:
        """sha256 of what embeds: equal for bundles whose vectors can be compared; None if the bundle does not serve
        `embed`. See `calmclip.models.bundle.embedding`."""
        return embedding_digest(self.manifest)

    def graph(self, role: str) -> Graph:
        if role not in self.manifest.graphs:
            known = sorted(self.manifest.graphs)
            raise TaskNotServed(f"bundle {self.name!r} has no graph {role!r}; it has {', '.join(known)}", known=known)
        return self.manifest.graphs[role]

    def require(self, task: str) -> None:
        """Raises `TaskNotServed` unless the manifest lists ``task``, or one that it follows from."""
        if task not in self.tasks:
            known, lack = self.tasks, missing_graphs(task, self.manifest)
            raise TaskNotServed(
                f"bundle {self.name!r} does not serve {task!r}; it serves {', '.join(known)}{lack}", known=known
            )

    def warm(self) -> None:
        """Build everything that is otherwise built at first use, so a broken bundle fails before its first request."""
        for role, graph in self.manifest.graphs.items():
            if isinstance(graph.preprocess, ImagePreprocess):
                self.image(role)
            elif isinstance(graph.preprocess, TextPreprocess):
                self.text(role)
        if self.classifier.head:
            _ = self.classifier.bound
        _ = self.outliers

    def image(self, role: str = "image") -> ImagePreparer:
        if role not in self._images:
            spec = self.graph(role).preprocess
            if not isinstance(spec, ImagePreprocess):
                raise BundleInvalid(f"bundle {self.name!r}: graph {role!r} takes no pictures")
            self._images[role] = ImagePreparer(spec, self._library)
        return self._images[role]

    def text(self, role: str = "text") -> TextPreparer:
        """Raises `BadRequest` if the graph reads vectors in place of texts."""
        if role not in self._texts:
            spec = self.graph(role).preprocess
            if isinstance(spec, VectorPreprocess):
                raise BadRequest(
                    f"bundle {self.name!r} reads no texts, but {VectorPreparer(spec).wanted}: send a `vector` in place "
                    "of a text, and `label_vectors` in place of labels; or export the checkpoint with --text-encoder, "
                    "and the bundle holds the model that makes them"
                )
            if not isinstance(spec, TextPreprocess):
                raise BundleInvalid(f"bundle {self.name!r}: graph {role!r} takes no texts")
            self._texts[role] = TextPreparer(spec, self.directory)
        return self._texts[role]

    @property
    def reads_vectors(self) -> bool:
        """Whether the graph `text` reads vectors of another model in place of texts."""
        graph = self.manifest.graphs.get("text")
        return graph is not None and isinstance(graph.preprocess, VectorPreprocess)

    def vectors(self, role: str = "text") -> VectorPreparer:
        """Raises `BadRequest` if the graph does not read vectors in place of texts."""
        spec = self.graph(role).preprocess
        if not isinstance(spec, VectorPreprocess):
            raise BadRequest(
                f"bundle {self.name!r} reads texts, and no vectors of another model; send the text in place of the "
                "vector"
            )
        return VectorPreparer(spec)

    @property
    def dim(self) -> int:
        """Length of the embedding vectors."""
        role = next((role for role in ("image", "text") if role in self.manifest.graphs), None)
        if role is None:
            raise TaskNotServed(f"bundle {self.name!r} embeds nothing")
        return embedding(role, self.graph(role))[1]

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The lengths to which a request may shorten the vectors, ascending; the last is `dim`."""
        return (*self.manifest.dimensions, self.dim)

    @cached_property
    def classifier(self) -> Classifier:
        """The bundle's default; empty if the manifest has none. Raises `BundleInvalid` naming the wrong file."""
        spec = self.manifest.classifier
        if spec is None:
            return Classifier()
        head = spec.head
        try:
            classifier = Classifier(
                labels=self._labels(spec.labels) if spec.labels else (),
                templates=spec.templates,
                descriptions=self._descriptions(spec.descriptions) if spec.descriptions else {},
                head=head.name if head else None,
                params=head.params if head else {},
                assets={name: self._array(path) for name, path in head.assets.items()} if head else {},
                temperature=spec.temperature,
                none_below=spec.none_below,
            )
            check_distinct(classifier.labels)
            if head:
                classifier.bound.check(classifier.labels, self.dim)
        except BadRequest as error:
            raise BundleInvalid(f"bundle {self.name!r}: its classifier: {error}") from None
        return classifier

    def classifier_for(
        self,
        classifier: Classifier | None,
        labels: Sequence[str] = (),
        templates: Sequence[str] = (),
        descriptions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> Classifier:
        """The complete classifier of a request: its labels and texts, else ``classifier``'s, else the default's.

        Raises `TooManyLabels` if it has no labels; `BadRequest` as `vectors` if it has label vectors.
        """
        base = self.classifier if classifier is None else classifier.with_defaults(self.classifier)
        complete = base.for_request(labels, templates, descriptions)
        require_labels(complete.labels)
        if complete.label_vectors:
            self.vectors()
        return complete

    def _labels(self, name: str) -> tuple[str, ...]:
        labels = self._json(name)
        if not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
            raise BundleInvalid(f"{self.directory / name} is not a JSON list of strings")
        return tuple(labels)

    def _descriptions(self, name: str) -> dict[str, tuple[str, ...]]:
        content = self._json(name)
        fits = isinstance(content, dict) and all(
            isinstance(lines, list) and all(isinstance(line, str) for line in lines) for lines in content.values()
        )
        if not fits:
            raise BundleInvalid(f"{self.directory / name} is not a JSON object of lists of strings")
        return {label: tuple(lines) for label, lines in content.items()}

    def _json(self, name: str) -> Any:
        path = self.directory / name
        try:
            return json.loads(path.read_bytes().decode())
        except (OSError, ValueError, RecursionError) as error:
            raise BundleInvalid(f"{path} is not JSON in UTF-8: {error}") from None

    @cached_property
    def outliers(self) -> dict[str, Outliers]:
        """Graph -> outliers of the float graph, for graphs whose report has them."""
        return outliers(self.directory, self.manifest.graphs)

    def _array(self, name: str) -> Array:
        try:  # `np.load` also reads zip files and pickles
            with (self.directory / name).open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise BundleInvalid(f"{self.directory / name} is not a plain .npy array: {error}") from None
