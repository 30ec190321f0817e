"""Top-1 of a picture classifier whose classes are its own: does the right logit win?

Source: Deng et al. 2009, whose ImageNet is measured so.
Data: a folder for each class, named as the bundle's labels are, the pictures in it.
"""

from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from calmclip.export.evals import EVALS, Eval
from calmclip.export.evals._data import first
from calmclip.models.errors import BadRequest
from calmclip.models.preprocess.image import decode
from calmclip.models.runner import Runner

DATA = "a folder for each class, named like the bundle's labels, its pictures in it"
ROLE = "logits"


def measure(runner: Runner, data: Path, limit: int | None) -> Mapping[str, float]:
    bundle = runner.bundle
    rows = first(read(data), limit)
    if ROLE not in bundle.manifest.graphs or not bundle.labels:
        raise BadRequest(
            f"{bundle.name} has no graph {ROLE!r} with labels; top1 is of classifiers with classes of their own"
        )
    if unknown := sorted({name for _, name in rows} - {*bundle.labels}):
        raise BadRequest(
            f"{data} has a folder {unknown[0]!r}, which is none of the bundle's {len(bundle.labels)} labels"
        )
    preparer = bundle.image(ROLE)
    right = 0
    for file, name in tqdm(rows, desc=f"top-1 {bundle.name}", unit="picture", disable=None):
        pixels = preparer.prepare(decode(file.read_bytes(), max_pixels=bundle.max_pixels))[0]
        (logits,) = runner.raw(ROLE, {preparer.spec.input: pixels}).values()
        right += bundle.labels[int(logits[0].argmax())] == name
    return {"top1": 100 * right / len(rows), "pictures": len(rows)}


def read(data: Path) -> list[tuple[Path, str]]:
    """-> picture and class of each, the first of every class before the second. Raises `BadRequest`: there are none."""
    folders = sorted(p for p in data.iterdir() if p.is_dir()) if data.is_dir() else []
    each = [sorted(file for file in folder.iterdir() if file.is_file()) for folder in folders]
    ranked = sorted((place, file) for files in each for place, file in enumerate(files))
    files = [(file, file.parent.name) for _, file in ranked]
    if not files:
        raise BadRequest(f"{data} holds no pictures; the data directory must hold {DATA}")
    return files


EVALS.register("top1")(Eval(measure, read, "raw", DATA))
