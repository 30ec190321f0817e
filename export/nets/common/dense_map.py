"""How two runs of a graph `dense` are compared: by vectors of regions, for which the map is made."""

import numpy as np

from calmclip.models.flow import Arrays

PART = 3  # a region is this part of the map's sides


def summary(outputs: Arrays) -> Arrays:
    """patches [B, h, w, D] -> ``regions`` [B, n, D]: the means over windows of a third of the rows and columns; any
    other output [B, h, w] or [B, h, w, C] as a row for each picture or cell.

    Rounding moves a cell more than the mean of some cells, and callers read means. A bias of all cells moves both.
    """
    patches = outputs["patches"]
    rows, columns = (-(-side // PART) for side in patches.shape[1:3])
    windows = np.lib.stride_tricks.sliding_window_view(patches, (rows, columns), axis=(1, 2))
    means = windows.mean(axis=(-2, -1))
    others = {name: rows.reshape(len(rows), -1, *rows.shape[3:]) for name, rows in outputs.items() if name != "patches"}
    return {"regions": means.reshape(len(patches), -1, patches.shape[-1]), **others}
