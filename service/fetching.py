"""A picture by its address, from hosts that the operator named; with none, nothing is fetched.

What a caller writes must not decide where a connection goes: an address has one spelling, its host is on the list, all
that the name resolves to is public, and it is the checked address that is dialled, under the name that its certificate
must have. One GET, no redirect, no proxy, no cookie, nothing unpacked; bytes and seconds are counted.
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
from calmclip.service.settings import Limits

SECONDS = 5.0  # for one picture, of the request's own time
MOST = 16  # addresses in a request
AT_ONCE = 4
PORT = 443
# https, a name, a path; no port, no user, no fragment, nothing but printable ASCII
_URL = re.compile(r"https://(?P<host>[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+)(?P<target>/[!\"$-\[\]-~]{0,2000})")
_ADDRESS = re.compile(r"https://\S+", re.IGNORECASE)  # not a text that mentions one
_NAT64 = IPv6Network("64:ff9b::/96")
_UNICAST = IPv6Network("2000::/3")
_TUNNELS = (IPv6Network("2002::/16"), IPv6Network("2001::/32"))  # 6to4 and Teredo lead to whatever they hold

Wire: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Resolve: TypeAlias = Callable[[str], Awaitable[list[str]]]
Dial: TypeAlias = Callable[[str, str], Awaitable[Wire]]  # address, the name its certificate must have


class NotFetched(InputError):
    """An address that is not asked, or that gave no picture."""


def is_public(address: str) -> bool:
    """Whether everybody reaches it, and so nobody reaches more through us."""
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
    """``hosts``: names in lower case. ``resolve`` and ``dial`` are the network, for tests to replace."""

    def __init__(
        self, hosts: Iterable[str], limits: Limits, resolve: Resolve | None = None, dial: Dial | None = None
    ) -> None:
        self.hosts = frozenset(hosts)
        self.limits = limits
        self._resolve = resolve or _resolve
        self._dial = dial or self._dial_tls

    async def fill(self, body: Any, counted: Callable[[int], None]) -> None:
        """Pictures ``{"url": …}`` where a body may hold pictures, and texts of ``input`` that are nothing but an
        address -> their bytes, in place.

        ``counted`` is told the bytes as they come. Raises `NotFetched`, `ImageTooLarge`. Without hosts nothing changes:
        the schema refuses what it does not know.
        """
        asked = [*_addresses(body)] if self.hosts else []
        if len(asked) > MOST:
            raise NotFetched(f"{len(asked)} pictures are given by their addresses; at most {MOST} are fetched at once")
        places = asyncio.Semaphore(AT_ONCE)
        together = _Counter(self.limits.body_bytes, "the pictures at these addresses have")

        def count(size: int) -> None:
            together.add(size)
            counted(size)

        async def fetch(holder: Any, at: str | int, url: str) -> None:
            async with places:
                holder[at] = await self.fetch(url, count)

        tasks = [asyncio.ensure_future(fetch(*one)) for one in asked]
        try:
            await asyncio.gather(*tasks)
        finally:
            for one in tasks:
                one.cancel()

    async def fetch(self, url: str, counted: Callable[[int], None] = lambda count: None) -> bytes:
        """Raises `NotFetched`, `ImageTooLarge`."""
        match = _URL.fullmatch(url)
        if not match:
            raise NotFetched(
                "a picture's address is https://NAME/PATH in plain ASCII, without user or port; send one like it"
            )
        host = match["host"].lower()
        if host not in self.hosts:
            raise NotFetched(f"pictures of {host[:100]!r} are not fetched; the operator names the hosts that are")
        try:
            async with asyncio.timeout(SECONDS):
                addresses = await self._resolve(host)
                if not addresses or not all(map(is_public, addresses)):
                    raise NotFetched(f"{host!r} has an address that is not public, or none; nothing is fetched from it")
                return await self._get(addresses[0], host, match["target"], counted)
        except TimeoutError:
            raise NotFetched(f"{host!r} did not give the whole picture within {SECONDS:g} s") from None
        except (OSError, EOFError, h11.ProtocolError):  # of TLS too; what went wrong inside is not the caller's
            raise NotFetched(f"{host!r} did not give the picture") from None

    async def _get(self, address: str, host: str, target: str, counted: Callable[[int], None]) -> bytes:
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
                    size.check(_announced(event, host))
                elif isinstance(event, h11.Data):
                    size.add(len(event.data))
                    counted(len(event.data))
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
    """Bytes, and no more than ``limit``. Raises `ImageTooLarge`."""

    def __init__(self, limit: int, what: str) -> None:
        self.count = 0
        self.limit = limit
        self.what = what

    def add(self, size: int) -> None:
        self.count += size
        self.check(self.count)

    def check(self, size: int) -> None:
        if size > self.limit:
            raise ImageTooLarge(f"{self.what} more than {self.limit} bytes, the most that are read")


def _announced(head: h11.Response, host: str) -> int:
    """The length that an answer gives itself, 0 without one. Raises `NotFetched` for any but a plain 200."""
    named = dict(head.headers)
    if head.status_code != 200 or named.get(b"content-encoding", b"identity") != b"identity":
        raise NotFetched(f"{host!r} answered {head.status_code}; expected 200 and the picture as it is, not packed")
    return int(named.get(b"content-length", b"0"))


def _addresses(body: Any) -> Iterator[tuple[Any, str | int, str]]:
    """What holds a picture's address, where, and the address."""
    if not isinstance(body, dict):
        return
    for one in _holders(body):
        picture = one.get("image")
        if isinstance(picture, dict) and set(picture) == {"url"} and isinstance(picture["url"], str):
            yield one, "image", picture["url"]
    texts = body.get("input")  # of /v1/embeddings
    places: list[tuple[Any, str | int, Any]] = [(body, "input", texts)]
    if isinstance(texts, list):
        places = [(texts, at, text) for at, text in enumerate(texts)]
    for holder, at, text in places:
        if isinstance(text, str) and _ADDRESS.fullmatch(text):
            yield holder, at, text


def _holders(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Where `image` is a picture: the body, its query, its inputs, items and examples. Metadata is not looked into."""
    lists = [body.get(name) for name in ("inputs", "items", "examples")]
    inner = [body.get("query"), *(one for many in lists if isinstance(many, list) for one in many)]
    return [body, *(one for one in inner if isinstance(one, dict))]


async def _resolve(host: str) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, PORT, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
