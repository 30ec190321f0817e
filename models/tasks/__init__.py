"""FAMILY tasks: what a caller wants, from classify to raw. Flows are pure: no I/O, no threads, no clock.

A task names the graphs it needs by role, checks the manifest, and has one flow from a request to an answer. Manifest
checks, the service's warm-up, metrics and endpoints, and the verb `run` read this table. A bundle may list a task that
this version does not know; its other tasks are served.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Generic, Protocol, TypeVar, get_args

from calmclip.models.bundle.manifest import (
    ImagePreprocess,
    Manifest,
    Tensor,
    TextPreprocess,
    VectorPreprocess,
)
from calmclip.models.flow import Flow
from calmclip.models.registry import Registry

R = TypeVar("R")
A = TypeVar("A")
# the producer of a graph's inputs, or a union of producers; None: other graphs
Fed = type[ImagePreprocess] | type[TextPreprocess] | type[VectorPreprocess] | UnionType | None


@dataclass(frozen=True)
class Command:
    """The task in ``calmclip run BUNDLE TASK``.

    ``options(parser)`` adds the task's flags. ``answers(driver, options)`` yields one JSON-like dict for each picture
    or text; see `features.Driver`. ``line(answer)`` formats this dict as text.
    """

    options: Callable[[ArgumentParser], None]
    answers: Callable[[Any, Namespace], Iterable[dict[str, Any]]]
    line: Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Task(Generic[R, A]):
    """``flow(bundle, request) -> Flow[answer]``, with an open `Bundle`; ``request`` is the type of its request.

    ``follows``: another task; a bundle that lists it and has the graphs of this one serves this one too.
    ``roles``: role -> the preprocessing of its graph, or a union of kinds; all roles are needed, with ``any_role`` at
    least one.
    ``check(manifest)`` raises `ValueError` for other faults. ``example(bundle, picture)``: a small request that uses
    every graph of the task, for the service's warm-up, or None; ``picture`` is the bytes of a file.
    """

    name: str
    summary: str
    request: type[R]
    flow: Callable[[Any, R], Flow[A]]
    example: Callable[[Any, bytes], R | None]
    roles: Mapping[str, Fed] = field(default_factory=dict)
    any_role: bool = False
    follows: str = ""
    check: Callable[[Manifest], None] = lambda manifest: None
    command: Command | None = None

    def require(self, manifest: Manifest) -> None:
        """Raises `ValueError` for the first thing that ``manifest`` lacks to serve this task."""
        needed = self._present(manifest) if self.any_role and self._present(manifest) else list(self.roles)
        for role in needed:
            if role not in manifest.graphs:
                raise ValueError(f"task {self.name!r} needs a graph {role!r}; the graphs are {sorted(manifest.graphs)}")
            if not self._fed(role, manifest):
                kind = self.roles[role]
                names = " or ".join(each.__name__ for each in get_args(kind) or (kind,))
                raise ValueError(f"task {self.name!r} needs `graphs.{role}.preprocess` to be a {names}")
        self.check(manifest)

    def follows_in(self, manifest: Manifest) -> bool:
        """Whether the manifest lists the task that this one follows, and has the graphs of this one, so fed."""
        present = [role for role in self._present(manifest) if self._fed(role, manifest)]
        return self.follows in manifest.tasks and len(present) >= (1 if self.any_role else len(self.roles))

    def _present(self, manifest: Manifest) -> list[str]:
        return [role for role in self.roles if role in manifest.graphs]

    def _fed(self, role: str, manifest: Manifest) -> bool:
        kind = self.roles[role]
        return kind is None or isinstance(manifest.graphs[role].preprocess, kind)


TASKS: Registry[Task[Any, Any]] = Registry("tasks", "calmclip.models.tasks")


def served(manifest: Manifest) -> tuple[str, ...]:
    """The tasks that the manifest lists and this version knows, then those that follow from them."""
    known = TASKS.names()
    followers = (name for name in known if TASKS.get(name).follows_in(manifest))
    return tuple(dict.fromkeys((*(task for task in manifest.tasks if task in known), *followers)))


def missing_graphs(name: str, manifest: Manifest) -> str:
    """The end of a message: the graphs with which the bundle would serve a task that follows one of its tasks."""
    task = TASKS.get(name) if name in TASKS.names() else None
    if task is None or task.follows not in manifest.tasks or task.follows_in(manifest):
        return ""
    graphs = (" or " if task.any_role else " and ").join(map(repr, task.roles))
    return f". It has no graph {graphs}; export the checkpoint with an adapter that adds it"


def require(manifest: Manifest) -> None:
    """Raises `ValueError` for the first thing that the manifest's tasks lack. An unknown task is not checked."""
    for task in served(manifest):
        TASKS.get(task).require(manifest)


class HasOutputs(Protocol):
    """A graph of a manifest, or a tower that becomes one."""

    @property
    def outputs(self) -> Mapping[str, Tensor]: ...


def embedding(role: str, graph: HasOutputs) -> tuple[str, int]:
    """The name of a graph's embedding output, and the length of its vectors. The output is the only one, or is called
    ``ROLE_embeds``. Raises `ValueError` unless it is float32 [B, D] with a fixed D.
    """
    name = f"{role}_embeds" if len(graph.outputs) > 1 else next(iter(graph.outputs))
    tensor = graph.outputs.get(name)
    length = tensor.shape[1] if tensor and len(tensor.shape) == 2 else None
    if tensor and tensor.dtype == "float32" and isinstance(length, int):
        return name, length
    raise ValueError(
        f"graph {role!r} has the outputs {sorted(graph.outputs)}; expected one output, float32 [B, D] with a fixed D, "
        f"or several, with such an output called '{role}_embeds'"
    )


def one_space(manifest: Manifest) -> None:
    """Raises `ValueError` if the vectors of pictures and of texts differ in length."""
    lengths = {role: embedding(role, manifest.graphs[role])[1] for role in ("image", "text") if role in manifest.graphs}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"image and text embeddings differ in length: {lengths}")


def exactly(
    role: str, side: str, tensors: Mapping[str, Tensor], names: tuple[str, ...], also: Iterable[str] = ()
) -> None:
    """Raises `ValueError` unless the tensors are all of ``names``, and any of ``also``."""
    if not set(names) <= set(tensors) <= {*names, *also}:
        optional = f", and any of {sorted(also)}" if also else ""
        raise ValueError(f"`graphs.{role}.{side}` are {sorted(tensors)}; expected {sorted(names)}{optional}")
