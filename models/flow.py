"""What a task yields, and how it is stepped.

A task is a *flow*: a generator that yields `Work` (pure, named, timed), `Recall` (is this known already?), `Keep` (it
is now) and `Call` (run this graph on these feeds) and returns its answer. It knows no thread, batch or metric. `Walk`
steps a flow up to its next call and times what lies between; `drive` runs a whole one synchronously. The service's
engine drives the same flows with batching (`service/engine.py`).
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from numpy.typing import NDArray

from calmclip.models.runtime.clock import Stopwatch

Array: TypeAlias = NDArray[Any]
Arrays: TypeAlias = Mapping[str, Array]
T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """Run ``graph`` on ``feeds``; the driver sends back its outputs by name.

    ``keys``, where given, has one entry per row of every feed and promises that a row of the answer depends
    on that row alone: a driver may remember rows by key and run only those it has not seen.
    """

    graph: str
    feeds: Arrays
    keys: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Recall:
    """The rows of a `Call` with these ``keys``, before its feeds are made, or what was given to `Keep` under them; the
    driver sends back the outputs by name where it remembers every row, else None.
    """

    graph: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Keep:
    """What was made of a graph's rows, for whoever recalls ``key`` of ``graph``, which here is a name that no graph
    has. The driver may forget it. ``outputs`` take as much place as so many rows, ``size``; they are handed out again
    and again, so nobody changes them.
    """

    graph: str
    key: str
    outputs: Arrays
    size: int


@dataclass(frozen=True)
class Work:
    """Do this, timed as ``stage``; the driver sends back what it returned, or throws what it raised."""

    stage: str
    do: Callable[[], Any]


@dataclass(frozen=True)
class Done(Generic[T]):
    value: T


Flow: TypeAlias = Generator[Call | Recall | Keep | Work, Any, T]


def nothing(asked: Recall | Keep) -> Arrays | None:
    """The memory of a driver without one."""
    return None


class Walk(Generic[T]):
    """One flow under way. A flow's own time counts as `preprocess` before its first call, `postprocess` after; so does
    that of ``memory``, the driver's.
    """

    def __init__(
        self, flow: Flow[T], clock: Stopwatch, memory: Callable[[Recall | Keep], Arrays | None] = nothing
    ) -> None:
        self.flow = flow
        self.clock = clock
        self.memory = memory
        self.stage = "preprocess"

    def step(self, value: Any = None) -> Call | Done[T]:
        """To the next call, or to the end. Blocking and CPU-bound: a service runs it in a worker thread.

        The end comes as a value because an asyncio future refuses to carry `StopIteration`.
        """
        try:
            with self.clock.stage(self.stage):
                state = self.flow.send(value)
            while not isinstance(state, Call):
                go_on = self.flow.send
                if isinstance(state, Work):
                    try:
                        with self.clock.stage(state.stage):
                            value = state.do()
                    except Exception as error:  # the flow may know more of it
                        go_on, value = self.flow.throw, error
                with self.clock.stage(self.stage):
                    state = go_on(value if isinstance(state, Work) else self.memory(state))
        except StopIteration as stop:
            return Done(stop.value)
        self.stage = "postprocess"
        return state


def drive(
    flow: Flow[T],
    run: Callable[[Call], Arrays],
    clock: Stopwatch | None = None,
    memory: Callable[[Recall | Keep], Arrays | None] = nothing,
) -> T:
    """Run a flow to its end in this thread; ``run`` answers its calls (timed as ``infer``)."""
    clock = clock or Stopwatch()
    walk = Walk(flow, clock, memory)
    state = walk.step()
    while isinstance(state, Call):
        with clock.stage("infer"):
            answer = run(state)
        state = walk.step(answer)
    return state.value
