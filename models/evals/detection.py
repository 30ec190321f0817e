"""Detection: boxes and class names on photographs with COCO instances, as COCO scores them (`average_precision`).

Source: Lin et al. 2014 (arXiv 1405.0312). Each picture is searched twice: with all names of the file as labels, and
with only the names that the picture holds, as a user would ask.

Data: instances.json (COCO's form), images/.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.datasets import first
from calmclip.models.errors import BadRequest
from calmclip.models.evals import EVALS, Eval, Figure, Line, NoParams, Plot, Samples, Statistic
from calmclip.models.evals.average_precision import MOST, RECALLS, THRESHOLDS, Boxes, Matches, covered
from calmclip.models.evals.progress import progress
from calmclip.models.flow import Array, Flow
from calmclip.models.runner import Picture, Runner
from calmclip.models.suppression import Suppression
from calmclip.models.tasks.detect import Detection, default_suppression, find, propose

_KEYS = ("boxes", "classes", "scores", "crowd")
FLOOR = 0.001  # lower scores change no figure; the metric needs nearly all detections


@dataclass(frozen=True)
class Instances:
    """A data set. ``truth``: the boxes of each picture; a class is an index into ``names``."""

    names: Sequence[str]
    pictures: Sequence[Picture]
    truth: Sequence[Boxes]


def read(data: Path, params: NoParams, limit: int | None = None) -> Instances:
    """``data``/instances.json and ``data``/images/. Raises `BadRequest` naming what is missing or wrong."""
    path = data / "instances.json"
    if not path.is_file():
        raise BadRequest(f"{path} is not there; the data directory must hold COCO's instances.json, and images/")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        index = {category["id"]: i for i, category in enumerate(content["categories"])}
        rows: dict[int, list[tuple[list[float], int, bool]]] = {image["id"]: [] for image in content["images"]}
        for number, annotation in enumerate(content["annotations"]):
            if annotation["category_id"] not in index:
                raise ValueError(
                    f"annotation {number} has the category {annotation['category_id']}, none of {[*index]}"
                )
            x, y, w, h = annotation["bbox"]
            entry = ([x, y, x + w, y + h], index[annotation["category_id"]], bool(annotation.get("iscrowd", 0)))
            rows[annotation["image_id"]].append(entry)
        truth = [
            Boxes.true(
                np.array([b for b, _, _ in r]), np.array([c for _, c, _ in r], int), np.array([k for *_, k in r], bool)
            )
            for r in rows.values()
        ]
        names = tuple(category["name"] for category in content["categories"])
        pictures = [data / "images" / image["file_name"] for image in content["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"{path} is not in COCO's instances form: {error!r}") from None
    return Instances(names, first(pictures, limit), first(truth, limit))


def predict(runner: Runner, data: Instances, params: NoParams) -> Samples:
    """Samples: `found` (with all names as labels), `present` (with the names of each picture), `proposals` and `truth`,
    each as NAME_boxes float [K, 4], NAME_classes, NAME_scores, NAME_crowd [K], and NAME_counts int64 [N] per picture.
    """
    bundle = runner.bundle
    settings = replace(default_suppression(bundle), min_score=FLOOR, max_output=MOST)
    pictures = progress(data.pictures, f"detection {bundle.name}", "picture", len(data.pictures))
    flows = (
        _search(bundle, picture, data.names, np.unique(true.classes), settings)
        for picture, true in zip(pictures, data.truth, strict=True)
    )
    all_names, present, proposals = zip(*runner.map(flows), strict=True)
    sets = {"found": all_names, "present": present, "proposals": proposals, "truth": data.truth}
    arrays = {f"{name}_{key}": array for name, rows in sets.items() for key, array in _packed(rows).items()}
    return Samples({"pictures": len(data.pictures), "names": len(data.names)}, arrays, {"names": tuple(data.names)})


def _search(
    bundle: Bundle, picture: Picture, names: Sequence[str], present: Array, settings: Suppression
) -> Flow[tuple[Boxes, Boxes, Boxes]]:
    """-> detections of all names, of the names present, and the proposals. The regions are computed once."""
    regions = yield from propose(bundle, Path(picture) if isinstance(picture, str) else picture)
    results = []
    for classes in (np.arange(len(names)), present):
        labels = [names[i] for i in classes.tolist()]
        detections = (yield from find(bundle, regions, labels, (), settings)) if labels else ()
        results.append(_boxes(detections, classes))
    count = len(regions.boxes)
    proposals = Boxes.detected(regions.boxes, np.zeros(count, np.int64), np.ones(count, np.float32))
    return results[0], results[1], proposals


def _boxes(detections: Iterable[Detection], classes: Array) -> Boxes:
    rows = [*detections]
    return Boxes.detected(
        np.array([d.box for d in rows], np.float32).reshape(-1, 4),
        np.array([classes[d.index] for d in rows], np.int64),
        np.array([d.score for d in rows], np.float64),
    )


def _packed(rows: Iterable[Boxes]) -> Mapping[str, Array]:
    rows = [*rows]
    arrays = {key: np.concatenate([getattr(row, key) for row in rows]) for key in _KEYS}
    return {**arrays, "counts": np.array([len(row.classes) for row in rows], np.int64)}


def _unpacked(samples: Samples, name: str) -> list[Boxes]:
    ends = np.cumsum(samples.arrays[f"{name}_counts"])[:-1]
    parts = [np.split(samples.arrays[f"{name}_{key}"], ends) for key in _KEYS]
    return [Boxes(*each) for each in zip(*parts, strict=True)]


def score(samples: Samples, params: NoParams) -> Statistic:
    truth = _unpacked(samples, "truth")
    all_names = Matches(truth, _unpacked(samples, "found"), THRESHOLDS)
    present = Matches(truth, _unpacked(samples, "present"), THRESHOLDS[:1])
    hits, total = covered(truth, [row.boxes for row in _unpacked(samples, "proposals")])

    def of(rows: Array) -> Sequence[Figure]:
        weights = np.bincount(rows, minlength=samples.count)
        precision = all_names.average_precision(weights)
        count = total[rows].sum()
        return (
            Figure("AP50", 100 * float(precision[0]), "%"),
            Figure("AP50:95", 100 * float(precision.mean()), "%"),
            Figure("AP50 present names", 100 * float(present.average_precision(weights)[0]), "%"),
            Figure("recall@100 boxes", 100 * float(hits[rows].sum() / count) if count else np.nan, "%"),
        )

    return of


def plots(sides: Mapping[str, Samples], params: NoParams) -> Sequence[Plot]:
    lines = []
    for name, samples in sides.items():
        truth = _unpacked(samples, "truth")
        for key, title in (("found", "all names"), ("present", "names present")):
            lines.append(Line(f"{name}, {title}", RECALLS, Matches(truth, _unpacked(samples, key), (0.5,)).curve()))
    says = "Precision at each recall, at IoU 0.5, the mean over names: the area under a line is its AP50."
    return [Plot("Precision and recall", "recall", "precision", lines, says)]


EVALS.register("detection")(
    Eval("detect", "instances.json (COCO form), images/", NoParams, read, predict, score, plots=plots)
)
