"""Vectors of texts and of labels in numpy's files, as another program's model made them."""

from pathlib import Path
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np

from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array

TEXT_VECTORS = "vectors.npz"  # what a language model made of the texts of a data set


def read_vectors(file: Path) -> Array:
    """The array [N, d] of a .npy file, or of a .npz file: its array ``vectors``, or its only one. A row [d] is [1, d].

    Raises `BadRequest` for another file, and for an array that holds no rows of numbers.
    """
    arrays = _arrays(file)
    if "vectors" not in arrays and len(arrays) != 1:
        raise BadRequest(f"{file} holds the arrays {sorted(arrays)}; expected 'vectors', or one array alone")
    return _rows(arrays.get("vectors", next(iter(arrays.values()))), str(file))


def read_text_vectors(folder: Path) -> dict[str, Array]:
    """text -> its vector, from `TEXT_VECTORS` in ``folder``: the arrays ``texts`` [N] of strings and ``vectors``
    [N, d]. Empty without the file. Raises `BadRequest`."""
    file = folder / TEXT_VECTORS
    if not file.is_file():
        return {}
    arrays = _arrays(file)
    if not {"texts", "vectors"} <= arrays.keys() or arrays["texts"].dtype.kind != "U":
        raise BadRequest(f"{file} holds the arrays {sorted(arrays)}; expected texts [N] of strings and vectors [N, d]")
    texts, rows = arrays["texts"], _rows(arrays["vectors"], f"{file}: vectors")
    if texts.shape != rows.shape[:1]:
        raise BadRequest(f"{file} has texts {list(texts.shape)} and vectors {list(rows.shape)}; expected as many")
    return dict(zip(texts.tolist(), rows, strict=True))


def read_label_vectors(file: Path) -> dict[str, Array]:
    """label -> float32 [N, d], from the arrays [N, d] or [d] of a .npz file, whose names are the labels.

    Raises `BadRequest` as `read_vectors`.
    """
    if file.suffix != ".npz":
        raise BadRequest(f"{file} is no .npz file; expected one with an array for each label")
    return {label: _rows(array, f"{file}: {label!r}").astype(np.float32) for label, array in _arrays(file).items()}


def _arrays(file: Path) -> dict[str, Array]:
    try:
        with file.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            return {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, MemoryError, BadZipFile, ZlibError) as error:
        raise BadRequest(f"{file} cannot be read as arrays of numpy: {error}") from None


def _rows(array: Array, name: str) -> Array:
    rows = np.atleast_2d(array)
    if rows.ndim != 2 or not rows.size or rows.dtype.kind not in "fiu":
        raise BadRequest(f"{name} is {array.dtype} {list(array.shape)}; expected rows of numbers [N, d]")
    return rows
