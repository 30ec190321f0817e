"""The names that a pickle imports, read without running it."""

import pickletools
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

_PLAIN = ("torch.", "__torch__.", "collections.OrderedDict", "argparse.Namespace")
_MOST = 1 << 26  # bytes of a pickle that are read: names precede numbers


def foreign_name(file: Path) -> str | None:
    """The first name that is neither torch's nor a container's. None if there is no such name, or no pickle."""
    return next((name for name in names(file) if not name.startswith(_PLAIN)), None)


def names(file: Path) -> list[str]:
    """All names, each once; of a damaged file those before the damage, of another file none."""
    imported: dict[str, None] = {}
    try:
        for stream in _streams(file):
            for name in _globals(stream):
                imported[name] = None
    except Exception:  # a damaged file may cause any error
        pass
    return [*imported]


def _streams(file: Path) -> Iterator[BinaryIO]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for part in archive.infolist():
                if part.filename.endswith("data.pkl") and part.file_size < _MOST:
                    yield BytesIO(archive.read(part))
    else:
        with file.open("rb") as stream:
            yield stream


def _globals(stream: BinaryIO) -> Iterator[str]:
    """``module.name`` of GLOBAL, INST and STACK_GLOBAL, whose two strings may come from the memo."""
    strings: list[str] = []
    memo: list[str] = []
    while stream.tell() < _MOST:
        for opcode, value, _ in pickletools.genops(stream):
            match opcode.name:
                case "GLOBAL" | "INST":
                    yield str(value).replace(" ", ".")
                case "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                case "MEMOIZE":
                    memo.append(strings[-1] if strings else "")
                case "BINGET" | "LONG_BINGET" if isinstance(value, int) and value < len(memo):
                    strings.append(memo[value])
                case _ if isinstance(value, str):
                    strings.append(value)
