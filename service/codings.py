"""Content codings, gzip and deflate: compressed bodies of requests, and of the answers that are asked for so.

Deflate packs at most 1 : 1032, so a body of 64 KiB may stand for 66 MB. `Inflater` hands out small pieces, so that the
reader stops at its limit, and no piece holds the event loop for long: about a millisecond.

Source: RFC 9110, sections 8.4 and 12.5.3; RFC 1950; RFC 1952.
"""

import zlib
from collections.abc import Iterator, Mapping

from calmclip.models.errors import BadRequest
from calmclip.service.errors import WrongCoding

WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # coding -> zlib's `wbits`; HTTP's deflate is the zlib format
NAMES = ("gzip", "deflate")
PIECE = 1 << 18  # bytes
LEVEL = 1  # tensors shrink hardly more at higher ones, which take up to ten times as long


class Inflater:
    """Unpacks a body as it arrives. ``coding``: a key of `WINDOWS`."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._stream = zlib.decompressobj(WINDOWS[coding])

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bytes that ``data`` stands for, in pieces of at most `PIECE`. Raises `BadRequest`."""
        piece = b""
        while data or len(piece) == PIECE:
            if self._stream.eof:
                if not data:
                    return
                if self._coding == "deflate":
                    raise self._broken(f"{len(data)} bytes or more follow its end")
                self._stream = zlib.decompressobj(WINDOWS[self._coding])  # a gzip file may have several members
            try:
                piece = self._stream.decompress(data, PIECE)
            except zlib.error as error:
                raise self._broken(str(error)) from None
            data = self._stream.unconsumed_tail or self._stream.unused_data
            if piece:
                yield piece

    def end(self) -> None:
        """Raises `BadRequest` if the body was cut off."""
        if not self._stream.eof:
            raise self._broken("it ends too early")

    def _broken(self, why: str) -> BadRequest:
        return BadRequest(
            f"the header Content-Encoding says {self._coding}, and the body is not: {why}. Compress the whole body, or "
            "leave the header out"
        )


def coding_of(headers: Mapping[str, str]) -> str:
    """The coding of a request's body, "" for none. Raises `WrongCoding`."""
    name = headers.get("content-encoding", "").strip().lower()
    if name in ("", "identity"):
        return ""
    if name not in WINDOWS:
        raise WrongCoding(
            f"the body's Content-Encoding is {name[:40]!r}; expected one of {', '.join(NAMES)}, or no compression"
        )
    return name


def wanted(headers: Mapping[str, str]) -> str:
    """The coding of an answer that may be compressed, "" for none: the only one that Accept-Encoding names.

    A list of several is what libraries and browsers send by themselves, and compressing costs more time than sending
    does in most networks.
    """
    name, _, weight = headers.get("accept-encoding", "").replace(" ", "").lower().partition(";")
    zero = weight.removeprefix("q=").strip("0.") == "" and weight.startswith("q=0")
    return name if name in NAMES and not zero else ""


def pack(data: bytes, coding: str) -> bytes:
    stream = zlib.compressobj(LEVEL, wbits=WINDOWS[coding])
    return stream.compress(data) + stream.flush()
