"""Zero-shot top-1 and top-5: does the right class name win among all of them?

Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.
Data: labels.json, a list of {"file", "label" or "name"}; the pictures under images/.
"""

from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from calmclip.export.evals import EVALS, Eval
from calmclip.export.evals._data import first, read
from calmclip.models.errors import BadRequest
from calmclip.models.runner import Runner

DATA = 'labels.json (a list of {"file", "label"}) and images/'


def measure(runner: Runner, data: Path, limit: int | None) -> Mapping[str, float]:
    rows = first(read_labels(data), limit)
    labels = sorted({label for _, label in rows})
    top1 = top5 = 0
    for file, label in tqdm(rows, desc=f"zero-shot {runner.bundle.name}", unit="picture", disable=None):
        best = [ranked.label for ranked in runner.classify(data / "images" / file, labels, top_k=5)]
        top1 += best[0] == label
        top5 += label in best
    return {
        "top1": 100 * top1 / len(rows),
        "top5": 100 * top5 / len(rows),
        "pictures": len(rows),
        "labels": len(labels),
    }


def read_labels(data: Path) -> list[tuple[str, str]]:
    """-> file and label of each picture. Raises `BadRequest` naming the first entry that is none."""
    path = data / "labels.json"
    rows = read(path, DATA)
    if not (isinstance(rows, list) and rows):
        raise BadRequest(f"{path} holds no list of labels; the data directory must hold {DATA}")
    found = []
    for row in rows:
        match row:
            case {"file": str(file), "label": str(label)} | {"file": str(file), "name": str(label)} if label:
                found.append((file, label))
            case _:
                raise BadRequest(f"{path} names no file or no label in {row!r}; the data directory must hold {DATA}")
    return found


EVALS.register("zero_shot")(Eval(measure, read_labels, "classify", DATA))
