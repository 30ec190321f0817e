"""How far a measurement is, on a terminal."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterable[T]:
    """``items`` as they are; where standard error is a terminal and tqdm is installed, with a bar that counts them."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # nothing is wrong without it
        return items
    shown: Iterable[T] = tqdm(items, desc=what, unit=unit, total=total, disable=None, leave=False)
    return shown
