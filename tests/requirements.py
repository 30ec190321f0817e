"""Reads files of pinned requirements."""

import re
from pathlib import Path

from packaging.utils import canonicalize_name


def pinned(path: Path) -> dict[str, str]:
    """Canonical package name -> version. Asserts that every line has a version and hashes."""
    blocks = re.findall(
        r"^(\S+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", path.read_text(), re.MULTILINE
    )
    versions: dict[str, str] = {canonicalize_name(name): version for name, version, _ in blocks}
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in " #"]
    assert len(lines) == len(versions), f"{path.name} has a line without a version or hashes"
    return versions
