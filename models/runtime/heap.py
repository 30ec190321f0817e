"""The heap of the C library."""

import ctypes
import sys
from contextlib import suppress


def trim() -> None:
    """Return freed memory to the system, which glibc does not do by itself. No effect with other C libraries."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
