"""Fetch pictures by URL, from hosts that the operator lists. Without a list nothing is fetched.

A caller must not choose where a connection goes (server-side request forgery). A URL has exactly one spelling, its host
is on the list, every IP address of the host is public, and the connection goes to the checked IP address, with the
host's name for the certificate. One GET; no redirect, proxy, cookie or decompression; bytes and seconds are limited.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import cached_property
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any, TypeAlias

import h11

from calmclip.models.errors import ImageTooLarge, InputError
from calmclip.service.errors import NotFetched
from calmclip.service.settings import Limits

TIMEOUT_S = 5.0  # of one picture, within the request's deadline
MAX_URLS = 16  # in a request
CONCURRENT = 4
PORT = 443
# https, a name, a path; no port, no user, no fragment; printable ASCII only
_URL = re.compile(r"https://(?P<host>[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+)(?P<target>/[!\"$-\[\]-~]{0,2000})")
_ANY_URL = re.compile(r"https://\S+", re.IGNORECASE)  # the whole text, so a text that mentions a URL is not one
_NAT64 = IPv6Network("64:ff9b::/96")
_UNICAST = IPv6Network("2000::/3")
_TUNNELS = (IPv6Network("2002::/16"), IPv6Network("2001::/32"))  # 6to4 and Teredo embed another address

Wire: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Resolve: TypeAlias = Callable[[str], Awaitable[list[str]]]
Dial: TypeAlias = Callable[[str, str], Awaitable[Wire]]  # IP address, name for the certificate


def is_public(address: str) -> bool:
    """Whether every client can reach it directly, so that this service opens no new way to it."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped:
            return is_public(str(ip.ipv4_mapped))
        if ip in _NAT64:
            return is_public(".".join(map(str, ip.packed[-4:])))
        if ip not in _UNICAST or any(ip in tunnel for tunnel in _TUNNELS):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class Fetcher:
    """``hosts``: names in lower case. Tests replace the network by ``resolve`` and ``dial``."""

    def __init__(
        self, hosts: Iterable[str], limits: Limits, resolve: Resolve | None = None, dial: Dial | None = None
    ) -> None:
        self.hosts = frozenset(hosts)
        self.limits = limits
        self._resolve = resolve or _resolve
        self._dial = dial or self._dial_tls

    async def fill(self, body: Any, on_bytes: Callable[[int], None], *, apart: bool = False) -> None:
        """Replace in ``body``, in place, each picture ``{"url": …}`` and each text of ``input`` that is a URL by the
        picture's bytes.

        ``on_bytes`` is called with the size of each chunk. ``apart``: each of `images` has its own result, so that an
        `InputError` takes the place of one that is not fetched. Raises `NotFetched`, also for a picture if there are no
        hosts, and `ImageTooLarge`. Without hosts a text that is a URL stays a text.
        """
        urls = [*_pictures(body)]
        urls += _texts(body) if self.hosts else ()
        if len(urls) > MAX_URLS:
            raise NotFetched(f"{len(urls)} pictures are given by URL; at most {MAX_URLS} are fetched at once")
        slots = asyncio.Semaphore(CONCURRENT)
        total = _Counter(self.limits.body_bytes, "the pictures at these URLs have")

        def count(size: int) -> None:
            total.add(size)
            on_bytes(size)

        images = body.get("images") if isinstance(body, dict) else None

        async def fetch(holder: Any, key: str | int, url: str) -> None:
            async with slots:
                try:
                    holder[key] = await self.fetch(url, count)
                except InputError as error:
                    if not (apart and images is not None and holder is images):
                        raise
                    holder[key] = error

        tasks = [asyncio.ensure_future(fetch(*url)) for url in urls]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def fetch(self, url: str, on_bytes: Callable[[int], None] = lambda size: None) -> bytes:
        """Raises `NotFetched`, `ImageTooLarge`."""
        if not self.hosts:
            raise NotFetched(
                "this service fetches no pictures: send the picture itself, as a file or in base64. The operator "
                "switches it on by CALMCLIP_URL_HOSTS=images.example.org,…: the hosts from which pictures may come"
            )
        match = _URL.fullmatch(url)
        if not match:
            raise NotFetched("a picture's URL is https://NAME/PATH in ASCII, without user or port; this one is not")
        host = match["host"].lower()
        if host not in self.hosts:
            raise NotFetched(f"pictures of {host[:100]!r} are not fetched; the operator lists the hosts that are")
        try:
            async with asyncio.timeout(TIMEOUT_S):
                addresses = await self._resolve(host)
                if not addresses or not all(map(is_public, addresses)):
                    raise NotFetched(
                        f"{host!r} has no IP address, or one that is not public; nothing is fetched from it"
                    )
                return await self._get(addresses[0], host, match["target"], on_bytes)
        except TimeoutError:
            raise NotFetched(f"{host!r} did not give the whole picture within {TIMEOUT_S:g} s") from None
        except (OSError, EOFError, h11.ProtocolError):  # also of TLS; the reason is not the caller's business
            raise NotFetched(f"{host!r} did not give the picture") from None

    async def _get(self, address: str, host: str, target: str, on_bytes: Callable[[int], None]) -> bytes:
        reader, writer = await self._dial(address, host)
        try:
            wire = h11.Connection(h11.CLIENT)
            headers = [("Host", host), ("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close")]
            for sent in (h11.Request(method="GET", target=target, headers=headers), h11.EndOfMessage()):
                writer.write(wire.send(sent) or b"")
            chunks: list[bytes] = []
            size = _Counter(self.limits.image_bytes, f"the picture at {host!r} has")
            while True:
                event = wire.next_event()
                if event is h11.NEED_DATA:
                    wire.receive_data(await reader.read(1 << 16))
                elif isinstance(event, h11.Response):
                    size.check(_content_length(event, host))
                elif isinstance(event, h11.Data):
                    size.add(len(event.data))
                    on_bytes(len(event.data))
                    chunks.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    return b"".join(chunks)
        finally:
            writer.transport.abort()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    async def _dial_tls(self, address: str, host: str) -> Wire:
        return await asyncio.open_connection(address, PORT, ssl=self._tls, server_hostname=host)


class _Counter:
    """Counts bytes. Raises `ImageTooLarge` above ``limit``."""

    def __init__(self, limit: int, subject: str) -> None:
        self.count = 0
        self.limit = limit
        self.subject = subject

    def add(self, size: int) -> None:
        self.count += size
        self.check(self.count)

    def check(self, size: int) -> None:
        if size > self.limit:
            raise ImageTooLarge(f"{self.subject} more than {self.limit} bytes, the most that are read")


def _content_length(head: h11.Response, host: str) -> int:
    """0 without the header. Raises `NotFetched` unless the answer is an unencoded 200."""
    headers = dict(head.headers)
    if head.status_code != 200 or headers.get(b"content-encoding", b"identity") != b"identity":
        raise NotFetched(f"{host!r} answered {head.status_code}; expected 200 and no content encoding")
    return int(headers.get(b"content-length", b"0"))


Place = tuple[Any, str | int, str]  # the container that holds a URL, its key or index there, and the URL


def _pictures(body: Any) -> Iterator[Place]:
    """The pictures ``{"url": …}`` of a request: `image` of the body, its query, inputs, items and examples, and the
    list `images`; not metadata."""
    if not isinstance(body, dict):
        return
    lists: list[Any] = [body.get(name) for name in ("query", "inputs", "items", "examples")]
    inner = [part for value in lists for part in (value if isinstance(value, list) else [value])]
    places: list[tuple[Any, str | int]] = [(part, "image") for part in (body, *inner) if isinstance(part, dict)]
    if isinstance(images := body.get("images"), list):
        places += ((images, index) for index in range(len(images)))
    for holder, key in places:
        picture = holder.get(key) if isinstance(holder, dict) else holder[key]
        if isinstance(picture, dict) and set(picture) == {"url"} and isinstance(picture["url"], str):
            yield holder, key, picture["url"]


def _texts(body: Any) -> Iterator[Place]:
    """The texts of /v1/embeddings that are only a URL."""
    if not isinstance(body, dict):
        return
    texts = body.get("input")
    places: list[tuple[Any, str | int, Any]] = [(body, "input", texts)]
    if isinstance(texts, list):
        places = [(texts, index, text) for index, text in enumerate(texts)]
    for container, key, text in places:
        if isinstance(text, str) and _ANY_URL.fullmatch(text):
            yield container, key, text


async def _resolve(host: str) -> list[str]:
    infos = await asyncio.get_running_loop().getaddrinfo(host, PORT, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in infos]
