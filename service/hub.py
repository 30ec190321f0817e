"""`Hub`: which bundles are loaded, under which names, ready or not; renewed when they change, at rest when unused."""

import asyncio
import ctypes
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from PIL import Image

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import Sealed, digest_of, find, names, read
from calmclip.models.errors import BundleInvalid, BundleNotFound, CalmclipError, Overloaded, TaskNotServed, suggestion
from calmclip.models.flow import Arrays, Call, drive
from calmclip.models.ops.library import find as find_library
from calmclip.models.ops.library import why_not
from calmclip.models.runtime.session import Session, SessionOptions
from calmclip.models.tasks import TASKS
from calmclip.service.batching import Batcher
from calmclip.service.resting import Resting
from calmclip.service.settings import Settings

if TYPE_CHECKING:
    from calmclip.service.metrics import Metrics

log = logging.getLogger("calmclip")
RETIRE_POLL_S = 0.05
REST_LOOKS = 4  # looks at what is idle, in the time after which it rests


class Loaded:
    """A bundle with one batcher per graph. Whoever drives a flow over it holds a `lease`."""

    def __init__(self, bundle: Bundle, graphs: dict[str, Resting], batchers: dict[str, Batcher]) -> None:
        self.bundle = bundle
        self.graphs = graphs
        self.batchers = batchers
        self._users = 0

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def digest(self) -> str:
        return self.bundle.digest

    @property
    def rests(self) -> bool:
        """Whether a graph of it is at rest, and needs its file to come back."""
        return any(graph.rests for graph in self.graphs.values())

    @contextmanager
    def lease(self) -> Iterator[None]:
        """While one is held, its batchers stay open, also when another bundle has taken its name."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1

    async def retire(self) -> None:
        """Once nobody holds a lease, close it."""
        while self._users:
            await asyncio.sleep(RETIRE_POLL_S)
        for batcher in self.batchers.values():
            await batcher.close()


class Hub:
    """Loads the bundles that the settings name; ``company()``: whether more calls may come soon."""

    def __init__(self, settings: Settings, metrics: "Metrics", company: Callable[[], bool]) -> None:
        self.settings = settings
        self.metrics = metrics
        self.company = company
        self.failed: dict[str, str] = {}
        self._tried: dict[str, str | None] = {}  # as they were asked for -> digest on disk at the last try
        self._loaded: dict[str, Loaded] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._complete = False

    @property
    def ready(self) -> bool:
        """Everything that was asked for is loaded, and that is not nothing."""
        return self._complete and bool(self._loaded) and not self.failed

    @property
    def loading(self) -> bool:
        return not self._complete

    def all(self) -> list[Loaded]:
        """In load order."""
        return list(self._loaded.values())

    def get(self, name: str | None, task: str) -> Loaded:
        """The bundle called ``name``, or the first in load order that serves ``task``.

        Raises `BundleNotFound`, `TaskNotServed`; `Overloaded` while bundles are still loading.
        """
        if name is not None and name in self._loaded:
            loaded = self._loaded[name]
            loaded.bundle.require(task)
            return loaded
        if self.loading:
            raise Overloaded("the bundles are still loading; try again in a second", reason="loading")
        known = sorted(self._loaded)
        if name is not None:
            raise BundleNotFound(f"no bundle named {name!r} is loaded; {suggestion(name, known)}", known=known)
        for loaded in self._loaded.values():
            if task in loaded.bundle.tasks:
                return loaded
        raise TaskNotServed(f"no loaded bundle serves {task!r}; loaded: {', '.join(known) or 'none'}", known=known)

    def by_digest(self, digest: str) -> Loaded | None:
        return next((one for one in self._loaded.values() if one.digest == digest), None)

    async def load(self) -> None:
        """Every bundle once. One that does not load is logged and remembered in `failed`; the others serve."""
        bundles = self.settings.bundles_dir
        try:
            await self._load(self.settings.load or names(bundles))
        except Exception as error:
            log.exception("no bundle of %s loads", bundles)
            self.failed["bundles"] = f"{bundles}: {error!r}"
        finally:
            self._complete = True

    async def tend(self) -> None:
        """For as long as the service lives: bundles that changed are renewed, graphs nobody uses are put to rest."""
        every = {self.renew: self.settings.reload_s, self.rest: self.settings.idle_unload_s / REST_LOOKS}
        await asyncio.gather(*(_repeat(do, seconds) for do, seconds in every.items() if seconds))

    async def renew(self) -> None:
        """Look for bundles whose digest on disk is another than at the last try, and load those.

        The new one takes the name once it is warm; what is under way ends on the old one. One that does not load is
        logged, and the old one goes on, but for graphs at rest: their files are gone, which is told in `failed`.
        """
        for wanted, tried in list(self._tried.items()):
            found = await asyncio.to_thread(self._digest, wanted)
            if found == tried:
                continue
            if found is None:
                if self._is_stranded(wanted):
                    self._tried[wanted] = None
                    self.failed[wanted] = f"there is no bundle at {wanted} any more"
                    log.error("%s, and a graph of it is at rest: put it back", self.failed[wanted])
                continue
            log.info("bundle %s has changed: digest %s…", wanted, found[:12])
            new = await self._try(wanted)
            if new is None:
                self.metrics.renewed(wanted, "failed")
                continue
            old = self._loaded.get(new.name)
            self._publish([*(one for one in self.all() if one is not old), new])
            self.metrics.renewed(new.name, "ok")
            if old:
                self._retire(old)

    async def rest(self) -> None:
        """Close the sessions that no request used for as long as the settings say.

        Not of a bundle that was replaced: there would be no file to open them from.
        """
        there = [one for one in self.all() if await asyncio.to_thread(digest_of, one.bundle.directory) == one.digest]
        graphs = [(f"{one.name}.{role}", graph) for one in there for role, graph in one.graphs.items()]
        rested = [name for name, graph in graphs if await asyncio.to_thread(graph.rest, self.settings.idle_unload_s)]
        if rested:
            await asyncio.to_thread(_give_back)
            log.info("at rest: %s", ", ".join(rested))

    def drain(self) -> None:
        """Nothing waits for company any more: the service is leaving."""
        for loaded in self.all():
            for batcher in loaded.batchers.values():
                batcher.drain()

    async def close(self) -> None:
        """What is queued is run first."""
        for loaded in self.all():
            self._retire(loaded)
        await asyncio.gather(*self._retiring)

    async def _load(self, wanted: Sequence[str]) -> None:
        if library := find_library(self.settings.ops):
            log.info("op library %s, %s", library.sha256[:12], ", ".join(sorted({*library.isas.values()})))
        else:
            why = "CALMCLIP_OPS=off" if self.settings.ops == "off" else why_not()
            log.info("%s: bundles run their own functions", why)
        self.metrics.ops(library)
        opened = [await self._try(name) for name in wanted]
        self._publish([one for one in opened if one])
        if not self._loaded:
            log.error("no bundle in %s was loaded; 'calmclip export mini' makes one", self.settings.bundles_dir)

    async def _try(self, wanted: str) -> Loaded | None:
        """The bundle asked for as ``wanted``, opened and warm; None where that fails, which is then in `failed`.

        Not in `failed` while an older one of that name serves, whole.
        """
        start = perf_counter()
        self._tried[wanted] = await asyncio.to_thread(self._digest, wanted)
        try:
            bundle, graphs = await asyncio.to_thread(self._open, wanted)
        except Exception as error:
            ours = isinstance(error, CalmclipError)  # says enough; of others the log wants to know where
            log.error("bundle %s does not load: %s", wanted, error, exc_info=not ours)
            if Path(wanted).name not in self._loaded or self._is_stranded(wanted):
                self.failed[wanted] = str(error) if ours else repr(error)
            return None
        self.failed.pop(wanted, None)
        log.info("loaded %s (%s)", bundle.name, ", ".join(bundle.tasks))
        self.metrics.load_time(bundle.name, perf_counter() - start)
        return Loaded(bundle, graphs, {role: self._batcher(bundle, role, graph.run) for role, graph in graphs.items()})

    def _publish(self, opened: list[Loaded]) -> None:
        """Make these the loaded ones. Without an order of the caller's, INT8 is what is served by default."""
        order = [Path(name).name for name in self.settings.load]

        def place(one: Loaded) -> tuple[int, bool, str]:
            at = order.index(one.name) if one.name in order else len(order)
            return at, one.bundle.manifest.precision == "float32", one.name

        opened.sort(key=place)
        self._loaded = {one.name: one for one in opened}
        self.metrics.loaded([one.bundle for one in opened])
        for loaded in opened:
            for role, batcher in loaded.batchers.items():
                self.metrics.watch_queue(
                    loaded.name, role, partial(getattr, batcher, "depth"), self.settings.queue.max_pending
                )

    def _retire(self, loaded: Loaded) -> None:
        task = asyncio.create_task(loaded.retire(), name=f"retire-{loaded.name}")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _is_stranded(self, wanted: str) -> bool:
        """Whether what serves under this name has graphs at rest that only its own files could wake."""
        old = self._loaded.get(Path(wanted).name)
        return old is not None and old.rests

    def _digest(self, wanted: str) -> str | None:
        try:
            return digest_of(find(wanted, self.settings.bundles_dir))
        except BundleNotFound:
            return None

    def _open(self, wanted: str) -> tuple[Bundle, dict[str, Resting]]:
        sealed = read(find(wanted, self.settings.bundles_dir))
        bundle = Bundle(sealed, max_pixels=self.settings.limits.image_pixels, ops=self.settings.ops)
        bundle.warm()
        graphs = {
            role: Resting(
                partial(self._session, sealed, role),
                partial(self.metrics.graph_opened, bundle.name, role),
                partial(self.metrics.graph_closed, bundle.name, role),
            )
            for role in bundle.manifest.graphs
        }
        _warm_up(bundle, graphs)
        return bundle, graphs

    def _session(self, sealed: Sealed, role: str) -> Session:
        """Where the directory holds another bundle by now: raises `Overloaded` as long as that one is on its way,
        `BundleInvalid` where it does not load.
        """
        graph = sealed.manifest.graphs[role]
        options = SessionOptions(threads=self.settings.cores, ops=self.settings.ops)
        try:
            session = Session(sealed.directory / graph.file, graph, options)
        except BundleInvalid:
            if digest_of(sealed.directory) == sealed.digest:
                raise
            raise self._replaced(sealed, role) from None
        if digest_of(sealed.directory) != sealed.digest:
            raise self._replaced(sealed, role)
        return session

    def _replaced(self, sealed: Sealed, role: str) -> CalmclipError:
        name = sealed.manifest.name
        why = next((why for wanted, why in self.failed.items() if Path(wanted).name == name), None)
        if why is None and self.settings.reload_s:
            return Overloaded(f"{name} is being replaced; try again in a second", reason="replaced")
        return BundleInvalid(
            f"{name} was replaced while its graph {role!r} was at rest, and the new one is not loaded "
            f"({why or 'CALMCLIP_RELOAD_S is 0'}); put a whole one in {sealed.directory}, or restart the service"
        )

    def _batcher(self, bundle: Bundle, role: str, run: Callable[[Arrays], Any]) -> Batcher:
        settings = self.settings
        return Batcher(
            run,
            batch=bundle.graph(role).batch,
            max_size=settings.batch.max_size,
            max_bytes=settings.batch.max_bytes,
            max_wait_s=settings.batch.max_wait_ms / 1000,
            max_pending=settings.queue.max_pending,
            company=self.company,
            observe=self.metrics.batch(bundle.name, role),
            name=f"{bundle.name}.{role}",
        )


def _give_back() -> None:
    """Memory that is free goes back to the system; glibc keeps it otherwise. Elsewhere this does nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


async def _repeat(do: Callable[[], Any], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await do()
        except Exception:  # the next turn tries again
            log.exception("%s failed", do.__name__)


def _warm_up(bundle: Bundle, graphs: dict[str, Resting]) -> None:
    """One request of each task, as a caller would send it: what it needs is made now, and what breaks breaks now."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(file, "PNG")

    def run(call: Call) -> Arrays:
        return graphs[call.graph].run(call.feeds)

    for name in bundle.tasks:
        task = TASKS.get(name)
        request = task.example(bundle, file.getvalue())
        if request is not None:
            drive(task.flow(bundle, request), run)
