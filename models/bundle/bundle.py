"""`Bundle`: an opened bundle as tasks see it, without its sessions."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np

from calmclip.models.bundle.manifest import Graph, ImagePreprocess, Manifest, TextPreprocess
from calmclip.models.bundle.store import Sealed
from calmclip.models.errors import BundleInvalid, TaskNotServed
from calmclip.models.flow import Array
from calmclip.models.heads import HEADS, BoundHead
from calmclip.models.ops.library import Library, Mode, find
from calmclip.models.outliers import Outliers, outliers
from calmclip.models.preprocess.image import MAX_PIXELS, ImagePreparer
from calmclip.models.preprocess.text import TextPreparer
from calmclip.models.prompts import PROMPTS


class Bundle:
    """Manifest, preprocessing, prompts, head and assets. ``max_pixels``: the largest picture it decodes.

    ``ops``: whether pictures are prepared by the op library, see `models.ops.library.find`; the answers are the same.
    """

    def __init__(self, sealed: Sealed, *, max_pixels: int = MAX_PIXELS, ops: Mode = "auto") -> None:
        self.directory: Path = sealed.directory
        self.manifest: Manifest = sealed.manifest
        self.digest: str = sealed.digest
        self.max_pixels = max_pixels
        self._library: Library | None = find(ops)
        self._images: dict[str, ImagePreparer] = {}
        self._texts: dict[str, TextPreparer] = {}

    @property
    def name(self) -> str:
        return self.manifest.name

    def graph(self, role: str) -> Graph:
        try:
            return self.manifest.graphs[role]
        except KeyError:
            known = sorted(self.manifest.graphs)
            raise TaskNotServed(
                f"bundle {self.name!r} has no graph {role!r}; it has {', '.join(known)}", known=known
            ) from None

    def require(self, task: str) -> None:
        """Raises `TaskNotServed` unless the manifest lists ``task``."""
        if task not in self.manifest.tasks:
            known = self.manifest.tasks
            raise TaskNotServed(
                f"bundle {self.name!r} does not serve {task!r}; it serves {', '.join(known)}", known=known
            )

    def warm(self) -> None:
        """Make now what is otherwise made at first use: a bundle that cannot serve says so before it is asked."""
        for role, graph in self.manifest.graphs.items():
            if isinstance(graph.preprocess, ImagePreprocess):
                self.image(role)
            elif graph.preprocess:
                self.text(role)
        if "classify" in self.manifest.tasks:
            _ = self.head
        if {"classify", "detect"} & {*self.manifest.tasks}:
            _ = self.prompts
        _ = self.labels
        _ = self.outliers

    def image(self, role: str = "image") -> ImagePreparer:
        if role not in self._images:
            spec = self.graph(role).preprocess
            if not isinstance(spec, ImagePreprocess):
                raise BundleInvalid(f"bundle {self.name!r}: graph {role!r} takes no pictures")
            self._images[role] = ImagePreparer(spec, self._library)
        return self._images[role]

    def text(self, role: str = "text") -> TextPreparer:
        if role not in self._texts:
            spec = self.graph(role).preprocess
            if not isinstance(spec, TextPreprocess):
                raise BundleInvalid(f"bundle {self.name!r}: graph {role!r} takes no texts")
            self._texts[role] = TextPreparer(spec, self.directory)
        return self._texts[role]

    @property
    def dim(self) -> int:
        """Length of the embedding vectors."""
        shapes = [
            t.shape
            for role in ("image", "text")
            if role in self.manifest.graphs
            for t in self.graph(role).outputs.values()
        ]
        if not shapes:
            raise TaskNotServed(f"bundle {self.name!r} embeds nothing")
        return cast(int, shapes[0][-1])

    @cached_property
    def head(self) -> BoundHead:
        plugin = self.manifest.head
        if plugin is None:
            raise TaskNotServed(f"bundle {self.name!r} has no head, so it scores no labels")
        return HEADS.get(plugin.name).bind(plugin.params, {k: self._array(v) for k, v in plugin.assets.items()})

    @cached_property
    def prompts(self) -> Callable[[str], Sequence[str]]:
        """A label -> the sentences that describe it, as the manifest chose."""
        plugin = self.manifest.prompts
        if plugin is None:
            raise TaskNotServed(f"bundle {self.name!r} has no prompts, so it reads no labels")
        return PROMPTS.get(plugin.name).bind(plugin.params)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The bundle's own label set; empty when it has none."""
        if not self.manifest.labels:
            return ()
        path = self.directory / self.manifest.labels
        try:
            labels = json.loads(path.read_bytes().decode())
        except (OSError, ValueError, RecursionError) as error:
            raise BundleInvalid(f"{path} is not JSON in UTF-8: {error}") from None
        if not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
            raise BundleInvalid(f"{path} is not a JSON list of strings")
        return tuple(labels)

    @cached_property
    def outliers(self) -> dict[str, Outliers]:
        """Graph -> what its report says of outliers in float; without those of whom it says nothing."""
        return outliers(self.directory, self.manifest.graphs)

    def _array(self, name: str) -> Array:
        try:  # `np.load` would also read zip files and, asked to, pickles
            with (self.directory / name).open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise BundleInvalid(f"{self.directory / name} is no plain .npy array: {error}") from None
