"""`Hub`: the loaded bundles by name. It reloads changed bundles and unloads idle graphs."""

import asyncio
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from PIL import Image

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import Sealed, State, digest_of, find, names, read, state_of
from calmclip.models.errors import BundleInvalid, BundleNotFound, CalmclipError, Overloaded, TaskNotServed, suggestion
from calmclip.models.flow import Arrays, drive
from calmclip.models.ops import breakeven, library
from calmclip.models.outliers import STATISTICS
from calmclip.models.runtime.heap import trim
from calmclip.models.runtime.session import Session, SessionOptions
from calmclip.models.tasks import TASKS
from calmclip.service.batching import RELEASES, Batcher
from calmclip.service.idle_unload import UnloadableSession
from calmclip.service.metrics import Metrics
from calmclip.service.settings import Settings

log = logging.getLogger("calmclip")
RETIRE_POLL_S = 0.05
IDLE_CHECKS = 4  # per `Settings.idle_unload_s`
TRIM_S = (
    10.0  # between looks whether graphs ran; what runs have freed then returns to the system, in a few milliseconds
)


class Tried(NamedTuple):
    """A bundle on disk when it was tried. ``digest``: of bundle.json, None without one. ``files``: their state if the
    bundle did not load, because its repair need not change bundle.json; None if it loaded."""

    digest: str | None
    files: State | None = None

    def differs(self, now: "Tried") -> bool:
        """Whether ``now`` is worth another try."""
        return now.digest != self.digest or (self.files is not None and now.files != self.files)


class Loaded:
    """A bundle with one session and one batcher per graph. The driver of a flow over it holds a `lease`."""

    def __init__(self, bundle: Bundle, graphs: dict[str, UnloadableSession], batchers: dict[str, Batcher]) -> None:
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
    def embedding_digest(self) -> str | None:
        return self.bundle.embedding_digest

    @property
    def unloaded(self) -> bool:
        """Whether a graph is unloaded, so that the bundle still needs its files."""
        return any(graph.unloaded for graph in self.graphs.values())

    @contextmanager
    def lease(self) -> Iterator[None]:
        """While a lease is held, the batchers stay open, even if another bundle has taken the name."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1

    async def retire(self) -> None:
        """Close the batchers once no lease is held."""
        while self._users:
            await asyncio.sleep(RETIRE_POLL_S)
        for batcher in self.batchers.values():
            await batcher.close()


class Hub:
    """Loads the bundles that the settings name. ``concurrent()``: whether other requests are in flight."""

    def __init__(self, settings: Settings, metrics: Metrics, concurrent: Callable[[], bool]) -> None:
        self.settings = settings
        self.metrics = metrics
        self.concurrent = concurrent
        self.failed: dict[str, str] = {}
        self._tried: dict[str, Tried] = {}  # by the name as requested
        self._loaded: dict[str, Loaded] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._complete = False
        self._trimmed_at = 0  # the number of runs then

    @property
    def ready(self) -> bool:
        """Whether every requested bundle is loaded, and at least one is."""
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

    def by_embedding(self, digest: str) -> Loaded | None:
        """The first loaded bundle, in load order, whose vectors have this embedding digest."""
        return next((loaded for loaded in self._loaded.values() if loaded.embedding_digest == digest), None)

    async def load(self) -> None:
        """Load every requested bundle. One that does not load is logged and noted in `failed`; the others serve."""
        bundles = self.settings.bundles_dir
        try:
            await self._load(self.settings.load or names(bundles))
        except Exception as error:
            log.exception("no bundle of %s loads", bundles)
            self.failed["bundles"] = f"{bundles}: {error!r}"
        finally:
            self._complete = True

    async def tend(self) -> None:
        """Until it is cancelled: reload changed bundles, unload idle graphs, return freed memory."""
        periods = {
            self.reload: self.settings.reload_s,
            self.unload_idle: self.settings.idle_unload_s / IDLE_CHECKS,
            self.trim: TRIM_S,
        }
        await asyncio.gather(*(_repeat(do, seconds) for do, seconds in periods.items() if seconds))

    async def reload(self) -> None:
        """Load the bundles that have changed on disk since the last try: in bundle.json or, if they did not load, in
        any file. Each change is tried, logged and counted once. A bundle that was absent is loaded when it appears.

        The new bundle takes the name once it is warm; requests in flight end on the old one. If the new bundle does not
        load, that is logged and the old one goes on. Its unloaded graphs have lost their files, which `failed` says.
        """
        for wanted, tried in list(self._tried.items()):
            now = await asyncio.to_thread(self._on_disk, wanted)
            if not tried.differs(now):
                continue
            if now.digest is None:
                if self._is_stranded(wanted):
                    self._tried[wanted] = Tried(None)
                    self.failed[wanted] = f"there is no bundle at {wanted} any more"
                    log.error("%s, and a graph of it is unloaded; put the bundle back", self.failed[wanted])
                continue
            what = "files of bundle" if now.digest == tried.digest else "bundle"
            log.info("%s %s changed: digest %s…", what, wanted, now.digest[:12])
            new = await self._try(wanted)
            if new is None:
                self.metrics.reloaded(wanted, "failed")
                continue
            old = self._loaded.get(new.name)
            self._publish([*(loaded for loaded in self.all() if loaded is not old), new])
            self.metrics.reloaded(new.name, "ok")
            if old:
                self._retire(old)

    async def unload_idle(self) -> None:
        """Close the sessions that were idle for `Settings.idle_unload_s`.

        Sessions of a bundle that was replaced on disk stay: there is no file to open them from.
        """
        current = [b for b in self.all() if await asyncio.to_thread(digest_of, b.bundle.directory) == b.digest]
        graphs = [(f"{loaded.name}.{role}", graph) for loaded in current for role, graph in loaded.graphs.items()]
        closed = [name for name, graph in graphs if await asyncio.to_thread(graph.unload, self.settings.idle_unload_s)]
        if closed:
            await asyncio.to_thread(trim)
            log.info("unloaded: %s", ", ".join(closed))

    async def trim(self) -> None:
        """Return what runs have freed to the system, if a graph ran since the last time."""
        runs = sum(graph.runs for loaded in self.all() for graph in loaded.graphs.values())
        if runs != self._trimmed_at:
            await asyncio.to_thread(trim)
            self._trimmed_at = runs

    def drain(self) -> None:
        """No call waits for concurrent calls any more: the service shuts down."""
        for loaded in self.all():
            for batcher in loaded.batchers.values():
                batcher.drain()

    async def close(self) -> None:
        """Run the queued calls, then close the batchers."""
        for loaded in self.all():
            self._retire(loaded)
        await asyncio.gather(*self._retiring)

    async def _load(self, wanted: Sequence[str]) -> None:
        if self.settings.ops_without:
            library.mask(self.settings.ops_without)
        if ops := library.find(self.settings.ops):
            isas, left = sorted({*ops.isas.values()}), breakeven.left(ops, self.settings.ops)
            log.info("op library %s, %s", ops.sha256[:12], ", ".join(isas))
            if left:
                log.info("operators left to ONNX Runtime, which is faster here: %s", ", ".join(left))
            self.metrics.ops(ops.sha256, ",".join(isas), left)
        else:
            why = "CALMCLIP_OPS=off" if self.settings.ops == "off" else library.why_not()
            log.info("%s: bundles run their own functions", why)
            self.metrics.ops("", "none")
        self._publish([loaded for name in wanted if (loaded := await self._try(name))])
        if not self._loaded:
            log.error("no bundle in %s was loaded; 'calmclip export mini' makes one", self.settings.bundles_dir)

    async def _try(self, wanted: str) -> Loaded | None:
        """Open and warm up the bundle ``wanted``. If that fails: None, and an entry in `failed` unless an older bundle
        of that name serves with all its graphs."""
        start = perf_counter()
        before = self._tried[wanted] = await asyncio.to_thread(self._on_disk, wanted)
        try:
            bundle, graphs = await asyncio.to_thread(self._open, wanted)
        except Exception as error:
            ours = isinstance(error, CalmclipError)  # its message says enough; others need a traceback
            log.error("bundle %s does not load: %s", wanted, error, exc_info=not ours)
            if Path(wanted).name not in self._loaded or self._is_stranded(wanted):
                self.failed[wanted] = str(error) if ours else repr(error)
            return None
        self._tried[wanted] = Tried(before.digest)
        self.failed.pop(wanted, None)
        log.info("loaded %s (%s)", bundle.name, ", ".join(bundle.tasks))
        self.metrics.load_time(bundle.name, perf_counter() - start)
        return Loaded(bundle, graphs, {role: self._batcher(bundle, role, graph.run) for role, graph in graphs.items()})

    def _publish(self, opened: list[Loaded]) -> None:
        """Serve these bundles and no others. Outside `Settings.load`, INT8 comes before float."""
        order = [Path(name).name for name in self.settings.load]

        def rank(loaded: Loaded) -> tuple[int, bool, str]:
            at = order.index(loaded.name) if loaded.name in order else len(order)
            return at, loaded.bundle.manifest.precision == "float", loaded.name

        opened.sort(key=rank)
        self._loaded = {loaded.name: loaded for loaded in opened}
        self.metrics.clear_bundles()
        for name, loaded in self._loaded.items():
            manifest = loaded.bundle.manifest
            outliers = {r: {s: getattr(o, s) for s in STATISTICS} for r, o in loaded.bundle.outliers.items()}
            self.metrics.loaded(name, loaded.digest, manifest.precision, ",".join(manifest.ops.used), outliers)
            for role, batcher in loaded.batchers.items():
                depth = partial(getattr, batcher, "depth")
                self.metrics.watch_queue(name, role, depth, self.settings.queue.max_pending)

    def _retire(self, loaded: Loaded) -> None:
        task = asyncio.create_task(loaded.retire(), name=f"retire-{loaded.name}")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _is_stranded(self, wanted: str) -> bool:
        """Whether the bundle that serves under this name has an unloaded graph, which only its own files can open."""
        old = self._loaded.get(Path(wanted).name)
        return old is not None and old.unloaded

    def _on_disk(self, wanted: str) -> Tried:
        try:
            directory = find(wanted, self.settings.bundles_dir)
        except BundleNotFound:
            return Tried(None, frozenset())
        files = state_of(directory)  # first: a change between the two is then seen at the next look
        return Tried(digest_of(directory), files)

    def _open(self, wanted: str) -> tuple[Bundle, dict[str, UnloadableSession]]:
        sealed = read(find(wanted, self.settings.bundles_dir))
        bundle = Bundle(sealed, max_pixels=self.settings.limits.image_pixels, ops=self.settings.ops)
        bundle.warm()
        graphs = {
            role: UnloadableSession(
                partial(self._session, sealed, role),
                partial(self.metrics.graph_opened, bundle.name, role),
                partial(self.metrics.graph_closed, bundle.name, role),
            )
            for role in bundle.manifest.graphs
        }
        _warm_up(bundle, graphs)
        trim()
        return bundle, graphs

    def _session(self, sealed: Sealed, role: str) -> Session:
        """Open a graph. If the directory holds another bundle by now: raises `Overloaded` while that bundle is being
        loaded, `BundleInvalid` if it does not load."""
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
            f"{name} was replaced while its graph {role!r} was unloaded, and the new bundle is not loaded "
            f"({why or 'CALMCLIP_RELOAD_S is 0'}); put a complete bundle in {sealed.directory}, or restart the service"
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
            concurrent=self.concurrent,
            observe=self.metrics.batch(bundle.name, role, RELEASES),
            name=f"{bundle.name}.{role}",
        )


async def _repeat(do: Callable[[], Any], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await do()
        except Exception:  # the next round tries again
            log.exception("%s failed", do.__name__)


def _warm_up(bundle: Bundle, graphs: dict[str, UnloadableSession]) -> None:
    """Run one request of each task, so that lazy parts are built now and errors appear now."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(file, "PNG")

    for name in bundle.tasks:
        task = TASKS.get(name)
        request = task.example(bundle, file.getvalue())
        if request is not None:
            drive(task.flow(bundle, request), lambda call: graphs[call.graph].run(call.feeds))
