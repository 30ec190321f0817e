"""What a file of pinned requirements holds."""

import re
from pathlib import Path

from packaging.utils import canonicalize_name


def pinned(path: Path) -> dict[str, str]:
    """name -> version, every line with hashes; names as the index writes them."""
    blocks = re.findall(
        r"^(\S+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", path.read_text(), re.MULTILINE
    )
    found = {canonicalize_name(name): version for name, version, _ in blocks}
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in " #"]
    assert len(lines) == len(found), f"{path.name} has a line without a version or hashes"
    return found
