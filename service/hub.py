"""`Hub`: which bundles are loaded, under which names, ready or not."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.bundle.bundle import Bundle
from models.bundle.store import find, names, read
from models.errors import BundleNotFound, CalmclipError, Overloaded, TaskNotServed, suggestion
from models.ops.library import find as find_library
from models.ops.library import why_not
from models.runtime.session import Session, SessionOptions
from service.batching import Batcher
from service.settings import Settings

if TYPE_CHECKING:
    from service.metrics import Metrics

log = logging.getLogger("calmclip")


@dataclass(frozen=True)
class Loaded:
    """A bundle with one batcher per graph."""

    bundle: Bundle
    batchers: dict[str, Batcher]

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def digest(self) -> str:
        return self.bundle.digest


class Hub:
    """Loads the bundles that the settings name; ``company()``: whether more calls may come soon."""

    def __init__(self, settings: Settings, metrics: "Metrics", company: Callable[[], bool]) -> None:
        self.settings = settings
        self.metrics = metrics
        self.company = company
        self.failed: dict[str, str] = {}
        self._loaded: dict[str, Loaded] = {}
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
            raise Overloaded("the bundles are still loading; try again in a second", retry_after=1.0)
        known = sorted(self._loaded)
        if name is not None:
            raise BundleNotFound(f"no bundle named {name!r} is loaded; {suggestion(name, known)}", known=known)
        for loaded in self._loaded.values():
            if task in loaded.bundle.manifest.tasks:
                return loaded
        raise TaskNotServed(f"no loaded bundle serves {task!r}; loaded: {', '.join(known) or 'none'}", known=known)

    def by_digest(self, digest: str) -> Loaded | None:
        return next((one for one in self._loaded.values() if one.digest == digest), None)

    async def load(self) -> None:
        """Every bundle once. One that does not load is logged and remembered in `failed`; the others serve."""
        bundles = self.settings.bundles_dir
        try:
            await self._load(self.settings.load or names(bundles), bundles)
        except Exception as error:
            log.exception("no bundle of %s loads", bundles)
            self.failed["bundles"] = f"{bundles}: {error!r}"
        finally:
            self._complete = True

    async def _load(self, wanted: Sequence[str], bundles: Path) -> None:
        if library := find_library(self.settings.ops):
            log.info("op library %s, %s", library.sha256[:12], ", ".join(sorted({*library.isas.values()})))
        else:
            why = "CALMCLIP_OPS=off" if self.settings.ops == "off" else why_not()
            log.info("%s: bundles run their own functions", why)
        self.metrics.ops(library)
        opened: list[Loaded] = []
        for name in wanted:
            try:
                bundle, sessions = await asyncio.to_thread(self._open, name, bundles)
            except Exception as error:
                ours = isinstance(error, CalmclipError)  # says enough; of others the log wants to know where
                log.error("bundle %s does not load: %s", name, error, exc_info=not ours)
                self.failed[name] = str(error) if ours else repr(error)
                continue
            opened.append(Loaded(bundle, {role: self._batcher(bundle, role, s) for role, s in sessions.items()}))
            log.info("loaded %s (%s)", bundle.name, ", ".join(bundle.manifest.tasks))
        if not self.settings.load:  # without an order of the caller's, INT8 is what is served by default
            opened.sort(key=lambda one: (one.bundle.manifest.precision == "float32", one.name))
        for loaded in opened:
            self._loaded[loaded.name] = loaded
            self.metrics.loaded(loaded.bundle)
        if not opened:
            log.error("no bundle in %s was loaded; 'calmclip export mini' makes one", bundles)

    async def close(self) -> None:
        for loaded in self._loaded.values():
            for batcher in loaded.batchers.values():
                await batcher.close()

    def _open(self, name: str, bundles: Path) -> tuple[Bundle, dict[str, Session]]:
        bundle = Bundle(read(find(name, bundles)), max_pixels=self.settings.limits.image_pixels, ops=self.settings.ops)
        bundle.warm()
        options = SessionOptions(threads=self.settings.cores, ops=self.settings.ops)
        graphs = bundle.manifest.graphs
        return bundle, {role: Session(bundle.directory / g.file, g, options) for role, g in graphs.items()}

    def _batcher(self, bundle: Bundle, role: str, session: Session) -> Batcher:
        settings = self.settings
        batcher = Batcher(
            session.run,
            batch=bundle.graph(role).batch,
            max_size=settings.batch.max_size,
            max_bytes=settings.batch.max_bytes,
            max_wait_s=settings.batch.max_wait_ms / 1000,
            max_pending=settings.queue.max_pending,
            company=self.company,
            observe=self.metrics.batch(bundle.name, role),
            name=f"{bundle.name}.{role}",
        )
        self.metrics.watch_queue(bundle.name, role, lambda: batcher.depth, settings.queue.max_pending)
        return batcher
