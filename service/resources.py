"""What the machine grants the service: memory of its control group, free bytes of a folder's file system."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # version 1 writes the largest multiple of a page below 2^63 for "no limit"


@dataclass(frozen=True)
class _Files:
    """Where a version of Linux' control groups keeps its numbers, all in bytes."""

    limit: str
    used: str
    statistics: str
    droppable: str  # the line of ``statistics`` with the pages of files that were not used for a while


# A container sees its own group at the root. Kernel documentation: cgroup-v2.rst, cgroup-v1/memory.rst.
_VERSIONS = (
    _Files("memory.max", "memory.current", "memory.stat", "inactive_file"),
    _Files("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


@dataclass(frozen=True)
class Memory:
    """Readers of a limited control group; each raises `OSError` if the group has gone."""

    used: Callable[[], float]
    limit: Callable[[], float]


def memory(folder: Path) -> Memory | None:
    """The control group's memory; None without a control group, or if it has no limit.

    What is used is counted as Kubernetes counts it: without the cached files that the kernel drops first.
    """
    for files in _VERSIONS:
        if (folder / files.limit).is_file() and _limit(folder, files):
            return Memory(partial(_used, folder, files), partial(_limit, folder, files))
    return None


def _limit(folder: Path, files: _Files) -> float:
    """0: there is none."""
    text = (folder / files.limit).read_text().strip()
    return 0.0 if text == "max" or int(text) >= UNLIMITED else float(text)


def _used(folder: Path, files: _Files) -> float:
    statistics = dict(line.split() for line in (folder / files.statistics).read_text().splitlines())
    return max(0.0, float((folder / files.used).read_text()) - float(statistics[files.droppable]))


def disk(folder: Path) -> tuple[float, float]:
    """-> free bytes, and all bytes, of the file system of ``folder`` or of the folder in which it will be made."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    facts = os.statvfs(existing)
    return float(facts.f_bavail * facts.f_frsize), float(facts.f_blocks * facts.f_frsize)
