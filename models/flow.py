"""What a task yields, and how it is stepped.

A task is a *flow*: a generator that yields requests to its driver and returns its answer. It yields five things:
`Work` (run this pure function and time it), `CacheGet` (which of these rows are cached?), `CachePut` (keep this in the
cache), `Call` (run this graph on these feeds) and `Together` (run these flows). A flow knows no thread, no batch and no
metric. `Walk` steps a flow to its next call and times the code between calls; `drive` runs a whole flow synchronously.
The service's engine drives the same flows with batching (`service/engine.py`).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
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

    ``keys`` is optional. It has one entry per row of every feed, and it promises that a row of the answer depends on
    that row alone. The driver may then cache rows by key and run only the rows that the cache does not hold.
    """

    graph: str
    feeds: Arrays
    keys: tuple[str, ...] | None = None


@dataclass(frozen=True)
class CacheGet:
    """Ask the cache for the rows of a `Call` with these ``keys``, before the feeds exist, or for a `CachePut`.

    The driver sends back the outputs of each row that its cache holds, by key.
    """

    graph: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class CachePut:
    """Keep in the cache a value that was computed from rows; `CacheGet` finds it by ``graph`` and ``key``.

    ``graph`` is here a name that no graph has. ``outputs`` count as ``size`` rows of the cache. The driver may drop
    them at any time, and it hands out the same arrays again, so the receiver must not change them.
    """

    graph: str
    key: str
    outputs: Arrays
    size: int


@dataclass(frozen=True)
class Work:
    """Run ``do``, timed as ``stage``. The driver sends back the result, or throws the exception into the flow."""

    stage: str
    do: Callable[[], Any]


@dataclass(frozen=True)
class Together:
    """Run ``flows``, which do not depend on each other; the driver sends back their answers, in their order.

    A driver may run them at once and merge their calls, as it does with flows of several requests. If one of them
    raises, the others need not end.
    """

    flows: Sequence["Flow[Any]"]


@dataclass(frozen=True)
class Done(Generic[T]):
    value: T


Flow: TypeAlias = Generator[Call | CacheGet | CachePut | Work | Together, Any, T]
State: TypeAlias = Call | Together | Done[T]  # where a walk stops
Cached: TypeAlias = Mapping[str, Arrays]  # key -> outputs of its row
Cache: TypeAlias = Callable[[CacheGet | CachePut], Cached]  # of a put the answer is empty


def no_cache(asked: CacheGet | CachePut) -> Cached:
    """The cache of a driver that has none."""
    return {}


class Walk(Generic[T]):
    """One flow that runs. The flow's own time, with that of the driver's ``cache``, counts as `preprocess` before its
    first call and as `postprocess` after it. ``splits``: the driver runs the flows of a `Together` itself; otherwise
    the walk goes through them one after another.
    """

    def __init__(self, flow: Flow[T], clock: Stopwatch, cache: Cache = no_cache, *, splits: bool = False) -> None:
        self.flow = flow if splits else _in_turn(flow)
        self.clock = clock
        self.cache = cache
        self.stage = "preprocess"

    def step(self, value: Any = None) -> State[T]:
        """Run to the next call or to the end. This blocks and needs the CPU: a service runs it in a worker thread.
        A `Together` comes only to a driver that splits.

        The end is a value, because an asyncio future cannot carry `StopIteration`.
        """
        try:
            with self.clock.stage(self.stage):
                state = self.flow.send(value)
            while not isinstance(state, Call | Together):
                go_on = self.flow.send
                if isinstance(state, Work):
                    try:
                        with self.clock.stage(state.stage):
                            value = state.do()
                    except Exception as error:  # the flow may add what it knows
                        go_on, value = self.flow.throw, error
                with self.clock.stage(self.stage):
                    state = go_on(value if isinstance(state, Work) else self.cache(state))
        except StopIteration as stop:
            return Done(stop.value)
        self.stage = "postprocess"
        return state


def _in_turn(flow: Flow[T]) -> Flow[T]:
    """``flow``, with the flows of each `Together` run one after another."""
    go_on: Callable[[Any], Any] = flow.send
    value: Any = None
    try:
        while True:
            try:
                state = go_on(value)
            except StopIteration as stop:
                answer: T = stop.value
                return answer
            go_on = flow.send
            if isinstance(state, Together):
                value = []
                try:
                    for part in state.flows:
                        value.append((yield from _in_turn(part)))
                except Exception as error:  # the flow may go on without the others
                    go_on, value = flow.throw, error
                continue
            try:
                value = yield state
            except Exception as error:
                go_on, value = flow.throw, error
    finally:
        flow.close()


def drive(
    flow: Flow[T],
    run: Callable[[Call], Arrays],
    clock: Stopwatch | None = None,
    cache: Cache = no_cache,
) -> T:
    """Run a flow to its end in this thread; ``run`` answers its calls (timed as ``infer``)."""
    clock = clock or Stopwatch()
    walk = Walk(flow, clock, cache)
    state = walk.step()
    while isinstance(state, Call):
        with clock.stage("infer"):
            answer = run(state)
        state = walk.step(answer)
    assert isinstance(state, Done)  # this walk does not split
    return state.value
