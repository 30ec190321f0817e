"""A progress bar on a terminal."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], title: str, unit: str, total: int | None = None) -> Iterable[T]:
    """``items``, with a bar on standard error if it is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # optional
        return items
    shown: Iterable[T] = tqdm(items, desc=title, unit=unit, total=total, disable=None, leave=False)
    return shown
