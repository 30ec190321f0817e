"""The vocabulary: everyday words for the things, qualities and activities that a picture shows.

`make` makes `words.txt` from WordNet 3.0, whose licence is LICENSE.WordNet.txt. It says how the words are chosen.
"""

from functools import cache
from pathlib import Path


@cache
def words() -> tuple[str, ...]:
    """A few thousand distinct words, sorted; some have two parts ("tennis ball"); activities end in -ing."""
    return tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").splitlines())
