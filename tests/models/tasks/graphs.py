"""Graphs whose rows are drawn by name, so that a test can work out every cosine."""

from zlib import crc32

import numpy as np

from calmclip.models.flow import Array, Arrays, Call


def row(name: str) -> Array:
    """A unit row float32 [3] that ``name`` alone decides."""
    drawn = np.random.default_rng(crc32(name.encode())).standard_normal(3)
    unit: Array = (drawn / np.linalg.norm(drawn)).astype(np.float32)
    return unit


class Graphs:
    """Answers `image` with the row of "picture", `text` with the rows of its sentences, `regions` or `dense` with
    ``regions``; records the calls."""

    def __init__(self, regions: Arrays | None = None) -> None:
        self.regions = regions or {}
        self.calls: list[Call] = []

    def __call__(self, call: Call) -> Arrays:
        self.calls.append(call)
        if call.graph in ("regions", "dense"):
            return self.regions
        names = ("picture",) if call.graph == "image" else call.keys or ()
        return {f"{call.graph}_embeds": np.stack([row(name) for name in names])}
