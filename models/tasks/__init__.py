"""FAMILY tasks: what a caller wants, each as one value. The flows are pure: no I/O, no threads, no clock.

A task names the graphs it needs by role, says what its manifest must hold, and has one flow from a request to an
answer. Manifest checks, the warm-up of a service, its metrics and the verb `run` read this table; endpoints of the
service name a task of it. A bundle may list a task that this version does not know: its other tasks are served.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from calmclip.models.bundle.manifest import Graph, ImagePreprocess, Manifest, Tensor, TextPreprocess
from calmclip.models.flow import Flow
from calmclip.models.registry import Registry

if TYPE_CHECKING:
    from calmclip.models.bundle.bundle import Bundle
    from calmclip.models.runner import Runner

R = TypeVar("R")
A = TypeVar("A")
Fed = type[ImagePreprocess] | type[TextPreprocess] | None  # what makes the inputs of a graph; None: other graphs


@dataclass(frozen=True)
class Command:
    """What ``calmclip run BUNDLE TASK`` does.

    ``options(parser)`` adds the task's own flags. ``answers(runner, given)`` yields one JSON-like dict for each picture
    or text. ``line(answer)`` is that answer for a person.
    """

    options: Callable[[ArgumentParser], None]
    answers: Callable[["Runner", Namespace], Iterable[dict[str, Any]]]
    line: Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Task(Generic[R, A]):
    """``flow(bundle, request) -> Flow[answer]``; ``request`` is the type of its request.

    ``roles``: role -> what feeds its graph; every one of them is needed, or with ``any_role`` at least one.
    ``check(manifest)`` raises `ValueError` for what the roles alone do not say. ``example(bundle, picture)``: a small
    request that uses every graph of the task, for the warm-up of a service; ``picture`` is the bytes of a file, and
    None instead of a request means that there is nothing to warm up.
    """

    name: str
    summary: str
    request: type[R]
    flow: Callable[["Bundle", R], Flow[A]]
    example: Callable[["Bundle", bytes], R | None]
    roles: Mapping[str, Fed] = field(default_factory=dict)
    any_role: bool = False
    check: Callable[[Manifest], None] = lambda manifest: None
    command: Command | None = None

    def require(self, manifest: Manifest) -> None:
        """Raises `ValueError` for the first thing that ``manifest`` lacks to serve this task."""
        there = [role for role in self.roles if role in manifest.graphs]
        needed = there if self.any_role and there else list(self.roles)
        for role in needed:
            if role not in manifest.graphs:
                raise ValueError(f"task {self.name!r} needs a graph {role!r}; there is {sorted(manifest.graphs)}")
            kind = self.roles[role]
            if kind and not isinstance(manifest.graphs[role].preprocess, kind):
                raise ValueError(f"task {self.name!r} needs `graphs.{role}.preprocess` to be an {kind.__name__}")
        self.check(manifest)


TASKS: Registry[Task[Any, Any]] = Registry("tasks", "calmclip.models.tasks")


def embedding(role: str, graph: Graph) -> tuple[str, int]:
    """Which output of a graph is its embedding, and how long the vectors are: the one called ``ROLE_embeds``, or the
    only one. It is float32 [B, D], D a number; a graph may answer more beside it. Raises `ValueError` for another.
    """
    name = f"{role}_embeds" if len(graph.outputs) > 1 else next(iter(graph.outputs))
    tensor = graph.outputs.get(name)
    length = tensor.shape[1] if tensor and len(tensor.shape) == 2 else None
    if tensor and tensor.dtype == "float32" and isinstance(length, int):
        return name, length
    raise ValueError(
        f"graph {role!r} embeds, so it has one output, float32 [B, D] with D a number, or that and others, and then it "
        f"is called '{role}_embeds'; there is {sorted(graph.outputs)}"
    )


def one_space(manifest: Manifest) -> None:
    """Raises `ValueError` where the vectors of pictures and of texts differ in length."""
    graphs = {role: manifest.graphs[role] for role in ("image", "text") if role in manifest.graphs}
    lengths = {role: embedding(role, graph)[1] for role, graph in graphs.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"image and text embeddings differ in length: {lengths}")


def exactly(
    role: str, side: str, found: Mapping[str, Tensor], names: tuple[str, ...], also: Iterable[str] = ()
) -> None:
    """Raises `ValueError` unless the tensors are ``names``, and besides only some of ``also``."""
    if not set(names) <= set(found) <= {*names, *also}:
        besides = f", and besides only some of {sorted(also)}" if also else ""
        raise ValueError(f"`graphs.{role}.{side}` are {sorted(found)}; expected {sorted(names)}{besides}")
