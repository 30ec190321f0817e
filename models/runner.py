"""`Runner`: the synchronous driver and the Python API. Composes bundle, sessions and tasks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.store import read
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays, Call, Flow, drive
from calmclip.models.ops.library import Mode
from calmclip.models.preprocess.image import MAX_PIXELS
from calmclip.models.runtime.clock import Stopwatch
from calmclip.models.runtime.session import Session, SessionOptions
from calmclip.models.tasks.classify import ClassifyRequest, Ranking, classify
from calmclip.models.tasks.detect import Detections, DetectRequest, Example, Suppression, detect
from calmclip.models.tasks.embed import EmbedRequest, embed
from calmclip.models.tasks.raw import RawRequest, raw

T = TypeVar("T")
Picture = str | Path | bytes


class Runner:
    """One bundle, loaded; answers in the calling thread.

    Graphs load when first used. Pictures are paths or the bytes of a file.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions | None = None) -> None:
        self.bundle = bundle
        self.options = options or SessionOptions()
        self._sessions: dict[str, Session] = {}
        self._clock: Stopwatch | None = None

    def session(self, role: str) -> Session:
        if role not in self._sessions:
            graph = self.bundle.graph(role)
            self._sessions[role] = Session(self.bundle.directory / graph.file, graph, self.options)
        return self._sessions[role]

    def run(self, flow: Flow[T]) -> T:
        """Drive any flow over this bundle."""
        return drive(flow, self._call, self._clock)

    def classify(
        self, image: Picture, labels: Sequence[str] = (), *, templates: Sequence[str] = (), top_k: int | None = None
    ) -> Ranking:
        return self.run(classify(self.bundle, ClassifyRequest(_bytes(image), labels, templates, top_k)))

    def embed(self, *, texts: Sequence[str] = (), images: Sequence[Picture] = ()) -> Array:
        """float32 [len(texts) + len(images), D], unit rows, texts first."""
        return self.run(embed(self.bundle, EmbedRequest([*texts, *map(_bytes, images)]))).vectors

    def detect(
        self,
        image: Picture,
        labels: Sequence[str] = (),
        *,
        templates: Sequence[str] = (),
        suppression: Suppression | None = None,
        examples: Sequence[Example | Picture] = (),
    ) -> Detections:
        """``suppression`` None: the bundle's own. ``examples``: pictures of what is wanted, with or without labels; the
        picture of an `Example` may be a path too."""
        if isinstance(examples, (str, Path, bytes, Example)):
            raise BadRequest("examples is one picture; expected a list of them")
        shown = [one if isinstance(one, Example) else Example(one) for one in examples]
        shown = [replace(one, image=_bytes(one.image)) for one in shown]
        return self.run(detect(self.bundle, DetectRequest(_bytes(image), labels, templates, suppression, shown)))

    def raw(self, graph: str, feeds: Arrays) -> Arrays:
        return self.run(raw(self.bundle, RawRequest(graph, feeds)))

    @contextmanager
    def clock(self) -> Iterator[Stopwatch]:
        """Times what is run inside the block: ``with runner.clock() as clock: …; clock.stages``."""
        self._clock = Stopwatch()
        try:
            yield self._clock
        finally:
            self._clock = None

    def _call(self, call: Call) -> Arrays:
        return self.session(call.graph).run(call.feeds)


def open_bundle(
    directory: str | Path,
    *,
    threads: int = 0,
    verify: bool = True,
    max_pixels: int = MAX_PIXELS,
    ops: Mode = "auto",
) -> Runner:
    """Verify and open the bundle in ``directory``. Raises `BundleNotFound`, `BundleInvalid`, `BundleTooNew`.

    ``ops``: whether graphs and pictures use the op library, see `models.ops.library.find`; `OpsLibraryMissing` where it
    is required and absent.
    """
    bundle = Bundle(read(Path(directory), verify=verify), max_pixels=max_pixels, ops=ops)
    return Runner(bundle, SessionOptions(threads=threads, ops=ops))


def _bytes(picture: Picture) -> bytes:
    if isinstance(picture, bytes):
        return picture
    try:
        return Path(picture).read_bytes()
    except (OSError, ValueError) as error:
        raise BadRequest(f"the picture {str(picture)!r} cannot be read: {error}") from None
