"""A typed client of the service: `Client`, and `AsyncClient` with the same methods to be awaited.

It imports httpx and the standard library, nothing else of calmclip. A method is a line of `Calls`: a function from its
arguments to a `Call`, which says what to ask and how to read the answer. `_attempts` decides, as a generator, when to
send it and when to wait; each client drives that in its own world.

    ClientError
    ├── Unreachable            no answer came: nobody there, cut off, or too late
    ├── Unreadable             an answer that is not calmclip's
    └── Problem                the service said no, and why
        ├── Rejected           4xx: the request itself; the same again will be refused again
        │   ├── Unauthorized   401: no key, or none that the service knows
        │   ├── Forbidden      403: not with this key
        │   ├── NotFound       404: no such model, collection or classifier
        │   └── Conflict       409: not with this bundle
        └── Failed             5xx
            ├── Overloaded     503: try again after ``retry_after`` seconds
            └── DeadlineExceeded   504
"""

import asyncio
import base64
import inspect
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    BinaryIO,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)
from urllib.parse import quote

import httpx

T = TypeVar("T")
P = ParamSpec("P")
Picture: TypeAlias = str | PathLike[str] | bytes | BinaryIO  # a path, or a JPEG, PNG or WebP file's content
URL = "http://127.0.0.1:8080"


class ClientError(Exception): ...


class Unreachable(ClientError): ...


class Unreadable(ClientError): ...


class Problem(ClientError):
    """An RFC 9457 document. ``slug`` names the kind, see service/README.md; "" where the answer was no such document.

    ``known``: names that would have worked. ``errors``: where the request does not fit. ``retry_after``: seconds.
    """

    def __init__(self, status: int, document: Mapping[str, Any], retry_after: float | None = None) -> None:
        self.status = status
        self.slug = str(document.get("type", "")).rpartition("/")[2]
        self.title = str(document.get("title", ""))
        self.detail = str(document.get("detail", ""))
        self.request_id = str(document.get("request_id", ""))
        self.known: list[str] = document.get("known") or []
        self.errors: list[dict[str, str]] = document.get("errors") or []
        self.retry_after = retry_after
        super().__init__(f"{status} {self.detail or self.title}")


class Rejected(Problem): ...


class Unauthorized(Rejected): ...


class Forbidden(Rejected): ...


class NotFound(Rejected): ...


class Conflict(Rejected): ...


class Failed(Problem): ...


class Overloaded(Failed): ...


class DeadlineExceeded(Failed): ...


PROBLEMS: dict[int, type[Problem]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    503: Overloaded,
    504: DeadlineExceeded,
}


@dataclass(frozen=True)
class RankedLabel:
    label: str
    index: int
    score: float
    cosine: float


@dataclass(frozen=True)
class Ranking:
    """``labels``: best first. ``none_of_these``: whether no score reaches `none_below`; None where there is none.

    ``temperature``: the one that the scores were made with.
    """

    model: str
    temperature: float
    labels: list[RankedLabel]
    none_of_these: bool | None


@dataclass(frozen=True)
class Embeddings:
    """``embeddings``: unit vectors of ``dim`` numbers, texts first."""

    model: str
    dim: int
    embeddings: list[list[float]]


@dataclass(frozen=True)
class Example:
    """What to look for. ``box``: where in the picture, x0, y0, x1, y1 in pixels; ``label``: its name in the answer."""

    image: Picture
    box: Sequence[float] | None = None
    label: str | None = None


@dataclass(frozen=True)
class Box:
    """Pixels of the upright picture."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Detection:
    """``score`` after soft-NMS, ``raw_score`` before; ``index`` counts the labels, then the examples."""

    label: str
    index: int
    score: float
    raw_score: float
    box: Box


@dataclass(frozen=True)
class Size:
    width: int
    height: int


@dataclass(frozen=True)
class Suppression:
    """How overlapping boxes are thinned out."""

    method: str
    sigma: float
    iou_threshold: float
    min_score: float
    max_output: int
    per_class: bool


@dataclass(frozen=True)
class SuppressionUsed(Suppression):
    candidates: int
    kept: int


@dataclass(frozen=True)
class Detections:
    """``detections``: best first."""

    model: str
    image: Size
    detections: list[Detection]
    suppression: SuppressionUsed


@dataclass(frozen=True)
class Item:
    """What goes into a collection: a text or a picture, and any JSON object with it."""

    id: str
    text: str | None = None
    image: Picture | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredItem:
    id: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class Page:
    """``next``: what ``after`` is for the next page; None on the last."""

    items: list[StoredItem]
    next: str | None


@dataclass(frozen=True)
class Hit:
    id: str
    score: float
    meta: dict[str, Any]


@dataclass(frozen=True)
class Count:
    """``count`` items were written or removed; the collection now has ``items``."""

    count: int
    items: int


@dataclass(frozen=True)
class Collection:
    name: str
    model: str
    digest: str
    dim: int
    created: str
    items: int


@dataclass(frozen=True)
class Classifier:
    """``head`` None: the bundle's. ``family``: of the bundles that it was fitted or calibrated for; None: for any."""

    name: str
    version: int
    labels: list[str]
    templates: list[str]
    descriptions: dict[str, list[str]]
    head: str | None
    params: dict[str, Any]
    temperature: float
    none_below: float | None
    family: str | None
    fitted: bool


@dataclass(frozen=True)
class Model:
    """``suppression``: of a detect request that says nothing; None where the bundle does not detect."""

    name: str
    digest: str
    family: str
    tasks: list[str]
    precision: str
    dim: int | None
    labels: int
    suppression: Suppression | None
    examples: int


@dataclass(frozen=True)
class ModelFiles:
    """A bundle's manifest and report, as they are on disk."""

    name: str
    digest: str
    manifest: dict[str, Any]
    report: dict[str, Any] | None


@dataclass(frozen=True)
class Ready:
    """``failed``: bundle or collection -> why it did not load."""

    ready: bool
    loaded: list[str]
    failed: dict[str, str]


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and how its answer is read. ``fine``: statuses that are answers besides 2xx."""

    method: str
    path: str
    read: Callable[[Any], T]
    json: object = None
    params: Mapping[str, str | int] = field(default_factory=dict)
    fine: tuple[int, ...] = ()


class Calls:
    """Every method of the clients: arguments -> `Call`."""

    @staticmethod
    def classify(
        image: Picture,
        labels: Sequence[str] = (),
        *,
        classifier: str | None = None,
        templates: Sequence[str] = (),
        top_k: int | None = None,
        temperature: float | None = None,
        none_below: float | None = None,
        model: str | None = None,
    ) -> Call[Ranking]:
        """Which labels fit a picture. Without labels or a classifier: the bundle's own."""
        asked = _said(
            labels=_texts(labels),
            classifier=classifier,
            templates=_texts(templates),
            top_k=top_k,
            temperature=temperature,
            none_below=none_below,
            model=model,
        )
        return Call("POST", "/v1/classify", _reader(Ranking), {"image": _picture(image), **asked})

    @staticmethod
    def embed(
        *, texts: Sequence[str] = (), images: Sequence[Picture] = (), model: str | None = None
    ) -> Call[Embeddings]:
        """Texts and pictures -> unit vectors in one space, texts first."""
        inputs = [*({"text": one} for one in _texts(texts)), *({"image": _picture(one)} for one in images)]
        return Call("POST", "/v1/embed", _reader(Embeddings), {"inputs": inputs, **_said(model=model)})

    @staticmethod
    def detect(
        image: Picture,
        labels: Sequence[str] = (),
        *,
        examples: Sequence[Example | Picture] = (),
        classifier: str | None = None,
        templates: Sequence[str] = (),
        method: Literal["hard", "linear", "gaussian"] | None = None,
        sigma: float | None = None,
        iou_threshold: float | None = None,
        min_score: float | None = None,
        max_output: int | None = None,
        per_class: bool | None = None,
        model: str | None = None,
    ) -> Call[Detections]:
        """Where labels, or what examples show, are in a picture. What is None is the bundle's own default."""
        shown = [one if isinstance(one, Example) else Example(one) for one in examples]
        asked = _said(
            labels=_texts(labels),
            examples=[{"image": _picture(one.image), **_said(box=one.box, label=one.label)} for one in shown],
            classifier=classifier,
            templates=_texts(templates),
            method=method,
            sigma=sigma,
            iou_threshold=iou_threshold,
            min_score=min_score,
            max_output=max_output,
            per_class=per_class,
            model=model,
        )
        return Call("POST", "/v1/detect", _reader(Detections), {"image": _picture(image), **asked})

    @staticmethod
    def collections() -> Call[list[Collection]]:
        """All of them."""
        return Call("GET", "/v1/collections", _reader(list[Collection], "collections"))

    @staticmethod
    def create_collection(collection: str, *, model: str | None = None) -> Call[Collection]:
        """For the vectors of one bundle; the same again changes nothing."""
        return Call("PUT", _collection(collection), _reader(Collection), _said(model=model))

    @staticmethod
    def collection(collection: str) -> Call[Collection]:
        """Its bundle and size."""
        return Call("GET", _collection(collection), _reader(Collection))

    @staticmethod
    def delete_collection(collection: str) -> Call[None]:
        """The collection and all in it."""
        return Call("DELETE", _collection(collection), _nothing)

    @staticmethod
    def upsert(collection: str, items: Sequence[Item]) -> Call[Count]:
        """Add or replace items, all or none; on disk when answered."""
        sent = [{"id": one.id, **_query(one.text, one.image), "meta": dict(one.meta)} for one in items]
        return Call("POST", _collection(collection, "/items"), _reader(Count), {"items": sent})

    @staticmethod
    def page(collection: str, *, after: str | None = None, limit: int = 100) -> Call[Page]:
        """Items by id, those behind ``after``."""
        return Call("GET", _collection(collection, "/items"), _reader(Page), params=_said(after=after, limit=limit))

    @staticmethod
    def delete_items(collection: str, ids: Sequence[str]) -> Call[Count]:
        """Ids that are not there are passed over."""
        return Call("DELETE", _collection(collection, "/items"), _reader(Count), {"ids": _texts(ids)})

    @staticmethod
    def search(
        collection: str,
        text: str | None = None,
        *,
        image: Picture | None = None,
        top_k: int = 10,
        filter: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> Call[list[Hit]]:
        """Nearest items to a text or a picture. ``filter``: field of the metadata -> value, or such as {"gte": 1}."""
        body = {"query": _query(text, image), "top_k": top_k, **_said(filter=filter, model=model)}
        return Call("POST", _collection(collection, "/search"), _reader(list[Hit], "hits"), body)

    @staticmethod
    def classifiers() -> Call[list[Classifier]]:
        """All that are registered."""
        return Call("GET", "/v1/classifiers", _reader(list[Classifier], "classifiers"))

    @staticmethod
    def put_classifier(
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] = (),
        *,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        head: str | None = None,
        params: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        none_below: float | None = None,
    ) -> Call[Classifier]:
        """Register a classifier under a name; a change counts its version up. What is None is the bundle's own."""
        said = {label: _texts(lines) for label, lines in (descriptions or {}).items()}
        chosen = {"name": head, "params": dict(params or {})} if head else None
        more = _said(descriptions=said or None, head=chosen, temperature=temperature, none_below=none_below)
        body = {"labels": _texts(labels), "templates": _texts(templates), **more}
        return Call("PUT", _classifier(name), _reader(Classifier), body)

    @staticmethod
    def calibrate_classifier(
        name: str, items: Sequence[tuple[Picture, str]], *, model: str | None = None
    ) -> Call[Classifier]:
        """Set its temperature by pictures whose labels are known."""
        body = {"items": _items(items), **_said(model=model)}
        return Call("POST", _classifier(name, "/calibrate"), _reader(Classifier), body)

    @staticmethod
    def fit_classifier(
        name: str,
        items: Sequence[tuple[Picture, str]],
        head: str,
        params: Mapping[str, Any] | None = None,
        *,
        model: str | None = None,
    ) -> Call[Classifier]:
        """Fit a head to pictures whose labels are known; the classifier then belongs to the bundle's family."""
        body = {"head": head, "params": dict(params or {}), "items": _items(items), **_said(model=model)}
        return Call("POST", _classifier(name, "/fit"), _reader(Classifier), body)

    @staticmethod
    def classifier(name: str) -> Call[Classifier]:
        """One of them."""
        return Call("GET", _classifier(name), _reader(Classifier))

    @staticmethod
    def delete_classifier(name: str) -> Call[None]:
        """Forget it."""
        return Call("DELETE", _classifier(name), _nothing)

    @staticmethod
    def models() -> Call[list[Model]]:
        """Loaded bundles; the first that serves a task is its default."""
        return Call("GET", "/v1/models", _reader(list[Model], "models"))

    @staticmethod
    def model(name: str) -> Call[ModelFiles]:
        """A bundle's manifest and report."""
        return Call("GET", f"/v1/models/{quote(name, safe='')}", _reader(ModelFiles))

    @staticmethod
    def ready() -> Call[Ready]:
        """Whether all bundles and collections are open, and if not, why."""
        return Call("GET", "/readyz", _reader(Ready), fine=(503,))


def _classifier(name: str, rest: str = "") -> str:
    return f"/v1/classifiers/{quote(name, safe='')}{rest}"


def _items(items: Sequence[tuple[Picture, str]]) -> list[dict[str, Any]]:
    return [{"image": _picture(picture), "label": label} for picture, label in items]


def _collection(name: str, tail: str = "") -> str:
    return f"/v1/collections/{quote(name, safe='')}{tail}"


def _said(**values: Any) -> dict[str, Any]:
    """What was given."""
    return {name: value for name, value in values.items() if value is not None and value != []}


def _texts(values: Sequence[str]) -> list[str]:
    if isinstance(values, str):
        raise TypeError(f"{values[:40]!r} is one text; expected a list of texts")
    return list(values)


def _picture(picture: Picture) -> dict[str, str]:
    """Raises `OSError` where a path cannot be read."""
    if isinstance(picture, (str, PathLike)):
        data = Path(picture).read_bytes()
    else:
        data = picture if isinstance(picture, bytes) else picture.read()
    return {"b64": base64.b64encode(data).decode()}


def _query(text: str | None, image: Picture | None) -> dict[str, Any]:
    if (text is None) == (image is None):
        raise TypeError("expected a text or a picture, one of them")
    return {"text": text} if image is None else {"image": _picture(image)}


def _nothing(answer: Any) -> None:
    return None


def _reader(kind: type[T], key: str | None = None) -> Callable[[Any], T]:
    """JSON -> ``kind``, a dataclass or a list of them; of an answer's ``key``, where one is given."""

    def read(answer: Any) -> T:
        found: T = _read(kind, answer if key is None else answer[key])
        return found

    return read


def _read(kind: Any, value: Any) -> Any:
    """By the types of the dataclass's fields; what a newer service says beyond them is passed over."""
    if types := _types(kind):
        return kind(**{name: _read(inner, value[name]) for name, inner in types.items()})
    if get_origin(kind) is list and _types(get_args(kind)[0]):
        return [_read(get_args(kind)[0], one) for one in value]
    if get_origin(kind) is UnionType and value is not None:
        return _read(get_args(kind)[0], value)
    return value


@cache
def _types(kind: Any) -> dict[str, Any]:
    """Fields of a dataclass; of anything else none."""
    return get_type_hints(kind) if is_dataclass(kind) else {}


def _attempts(call: Call[T], retries: int, longest_wait: float) -> Generator[float, httpx.Response, T]:
    """Yields how many seconds to wait before the request is sent, is sent its answer, and returns what that says."""
    wait = 0.0
    while True:
        answer = yield wait
        if answer.is_success or answer.status_code in call.fine:
            try:
                return call.read(answer.json() if answer.content else None)
            except (ValueError, LookupError, TypeError) as error:
                raise Unreadable(f"{answer.url} gave an answer that is not calmclip's: {error!r}") from None
        problem = _problem(answer)
        after = problem.retry_after if isinstance(problem, Overloaded) and retries else None
        if after is None or after > longest_wait:
            raise problem
        retries, wait = retries - 1, after


def _problem(answer: httpx.Response) -> Problem:
    try:
        document = answer.json()
    except ValueError:
        document = None
    after = answer.headers.get("retry-after", "")
    kind = PROBLEMS.get(answer.status_code, Failed if answer.status_code >= 500 else Rejected)
    return kind(
        answer.status_code,
        document if isinstance(document, dict) else {"title": answer.reason_phrase},
        float(after) if after.isascii() and after.isdigit() else None,
    )


@contextmanager
def _reaching(url: httpx.URL) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise Unreachable(f"{url} does not answer: {error or type(error).__name__}") from error


def _named(method: Any, make: Callable[..., Call[Any]]) -> None:
    """What `help` shows of a method: the name, the words and the arguments of the call it makes."""
    method.__name__, method.__doc__ = make.__name__, make.__doc__
    signature = inspect.signature(make)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    (answer,) = get_args(signature.return_annotation)
    method.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()], return_annotation=answer)


def _sync(make: Callable[P, Call[T]]) -> "Callable[Concatenate[Client, P], T]":
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run(make(*args, **kwargs))

    _named(method, make)
    return method


def _async(make: Callable[P, Call[T]]) -> "Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]":
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run(await asyncio.to_thread(make, *args, **kwargs))  # pictures are read and encoded

    _named(method, make)
    return method


def _headers(given: Mapping[str, str] | None, key: str | None) -> dict[str, str]:
    return {**(given or {}), **({"Authorization": f"Bearer {key}"} if key is not None else {})}


class Client:
    """Synchronous; may be shared between threads. Methods raise `ClientError`, and `OSError` for a path.

    ``retries``: how often a request is sent again that was answered 503, after as many seconds as the service asked
    for; not where it asked for more than ``longest_wait``. ``headers`` go with every request, and so does
    ``key``, where the service has keys.
    """

    def __init__(
        self,
        url: str = URL,
        *,
        timeout: float = 60.0,
        retries: int = 2,
        longest_wait: float = 30.0,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> None:
        self._patience = (retries, longest_wait)
        self._http = httpx.Client(base_url=url, timeout=timeout, headers=_headers(headers, key))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def run(self, call: Call[T]) -> T:
        attempts = _attempts(call, *self._patience)
        try:
            wait = next(attempts)
            while True:
                time.sleep(wait)
                with _reaching(self._http.base_url):
                    answer = self._http.request(call.method, call.path, json=call.json, params=call.params)
                wait = attempts.send(answer)
        except StopIteration as done:
            found: T = done.value
            return found

    classify = _sync(Calls.classify)
    embed = _sync(Calls.embed)
    detect = _sync(Calls.detect)
    collections = _sync(Calls.collections)
    create_collection = _sync(Calls.create_collection)
    collection = _sync(Calls.collection)
    delete_collection = _sync(Calls.delete_collection)
    upsert = _sync(Calls.upsert)
    page = _sync(Calls.page)
    delete_items = _sync(Calls.delete_items)
    search = _sync(Calls.search)
    classifiers = _sync(Calls.classifiers)
    put_classifier = _sync(Calls.put_classifier)
    calibrate_classifier = _sync(Calls.calibrate_classifier)
    fit_classifier = _sync(Calls.fit_classifier)
    classifier = _sync(Calls.classifier)
    delete_classifier = _sync(Calls.delete_classifier)
    models = _sync(Calls.models)
    model = _sync(Calls.model)
    ready = _sync(Calls.ready)

    def items(self, collection: str, *, at_once: int = 100) -> Iterator[StoredItem]:
        """All items by id, page by page."""
        after: str | None = None
        while True:
            page = self.page(collection, after=after, limit=at_once)
            yield from page.items
            if (after := page.next) is None:
                return


class AsyncClient:
    """`Client` under asyncio."""

    def __init__(
        self,
        url: str = URL,
        *,
        timeout: float = 60.0,
        retries: int = 2,
        longest_wait: float = 30.0,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> None:
        self._patience = (retries, longest_wait)
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout, headers=_headers(headers, key))

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def run(self, call: Call[T]) -> T:
        attempts = _attempts(call, *self._patience)
        try:
            wait = next(attempts)
            while True:
                await asyncio.sleep(wait)
                with _reaching(self._http.base_url):
                    answer = await self._http.request(call.method, call.path, json=call.json, params=call.params)
                wait = attempts.send(answer)
        except StopIteration as done:
            found: T = done.value
            return found

    classify = _async(Calls.classify)
    embed = _async(Calls.embed)
    detect = _async(Calls.detect)
    collections = _async(Calls.collections)
    create_collection = _async(Calls.create_collection)
    collection = _async(Calls.collection)
    delete_collection = _async(Calls.delete_collection)
    upsert = _async(Calls.upsert)
    page = _async(Calls.page)
    delete_items = _async(Calls.delete_items)
    search = _async(Calls.search)
    classifiers = _async(Calls.classifiers)
    put_classifier = _async(Calls.put_classifier)
    calibrate_classifier = _async(Calls.calibrate_classifier)
    fit_classifier = _async(Calls.fit_classifier)
    classifier = _async(Calls.classifier)
    delete_classifier = _async(Calls.delete_classifier)
    models = _async(Calls.models)
    model = _async(Calls.model)
    ready = _async(Calls.ready)

    async def items(self, collection: str, *, at_once: int = 100) -> AsyncIterator[StoredItem]:
        """All items by id, page by page."""
        after: str | None = None
        while True:
            page = await self.page(collection, after=after, limit=at_once)
            for one in page.items:
                yield one
            if (after := page.next) is None:
                return
