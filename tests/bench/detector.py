"""The built-in detector, measured over HTTP: accuracy, calibration, INT8 beside float, time and memory.

    python -m tests.bench.detector --new mini-int8 --float mini-float --old old-mini-int8 --coco DIR DIR \
        --boxed flickr8k/images --imagenet imagenet-samples --synonyms synonyms.json [--parts coco boxed …]

Bundles are folders. NanoDet, the box network of the new bundle, was trained on COCO train2017, so AP50 on photographs
of that set claims nothing; the hand-boxed photographs and those of ImageNet trained no part of the detector.

coco: AP50 with all 80 names, with the names present and with synonyms; by size of the object (pycocotools). The row
"exact class name" is NanoDet alone, by its own chances of its names. boxed: the hand-boxed photographs, recall of the
proposals and AP50 of three wordings. novel: ImageNet photographs named among all their names by the best region.
examples: AP50 of what example pictures find. int8: AP50 of INT8 less that of float. scores: how often a detection of a
score is right, and the threshold of best F1 for 1 to 80 names. ops: boxes with the op library beside those without it.
time: `regions` and whole requests, one thread, in turns, and the server's memory.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from calmclip import Client, open_bundle
from calmclip.models.datasets import read_json
from calmclip.models.evals import NoParams, detection
from calmclip.models.evals.average_precision import THRESHOLDS, Boxes, Matches, covered, match, overlaps
from calmclip.models.evals.bootstrap import Resampling, intervals
from calmclip.models.flow import Array
from calmclip.models.measure import feeds
from calmclip.models.ops.library import Mode
from calmclip.models.runner import Runner
from calmclip.service.client import Example
from tests.bench import flickr_boxes
from tests.bench.alternate import alternate, machine
from tests.process import serving

AT = THRESHOLDS[:1]  # IoU .5
FLOOR = 0.001
BANDS = np.array([0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 1.01])
PROMPTS = (1, 5, 20, 80)
NONE = Boxes.detected(np.empty((0, 4)), np.empty(0, int), np.empty(0))

Find = Callable[[Path, Sequence[str]], Boxes]


@contextmanager
def service(bundle: Path, **environment: Any) -> Iterator[tuple[Client, int]]:
    """A client of a new server with ``bundle`` alone, and its process id."""
    flags = ("--load", bundle.name, "--threads", "1")
    with (
        tempfile.TemporaryDirectory() as scratch,
        serving(bundle.parent, Path(scratch), *flags, **environment) as (process, http, _),
        Client(str(http.base_url)) as client,
    ):
        yield client, process.pid


def finder(client: Client, **settings: Any) -> Find:
    """Detections of labels in a picture, as many as COCO counts, down to `FLOOR`; a class is a label's index."""

    def find(picture: Path, labels: Sequence[str]) -> Boxes:
        asked = {"min_score": FLOOR, "max_output": 100, **settings}
        detections = client.detect(picture.read_bytes(), labels, **asked).detections
        boxes = np.array([[d.box.x0, d.box.y0, d.box.x1, d.box.y1] for d in detections]).reshape(-1, 4)
        classes = np.array([d.index for d in detections], int)
        return Boxes.detected(boxes, classes, np.array([d.score for d in detections]))

    return find


def proposals(client: Client, picture: Path) -> Array:
    """All boxes of the `regions` graph [P, 4]: no score is too low, and no box suppresses another."""
    asked = {"min_score": 0.0, "max_output": 1000, "method": "hard", "iou_threshold": 1.0}
    return finder(client, **asked)(picture, ["a thing"]).boxes


def ap50(truth: Sequence[Boxes], detected: Sequence[Boxes]) -> float:
    return 100 * float(Matches(truth, detected, AT).average_precision(np.ones(len(truth), int))[0])


def coco_sets(folders: Sequence[Path]) -> detection.Instances:
    sets = [detection.read(folder, NoParams()) for folder in folders]
    names = sets[0].names
    assert all(each.names == names for each in sets), "the folders have other names"
    return detection.Instances(
        names, [Path(str(p)) for each in sets for p in each.pictures], [t for each in sets for t in each.truth]
    )


def named(find: Find, data: detection.Instances, words: Sequence[str], present: bool = False) -> list[Boxes]:
    """Detections of each picture, classes as in ``data``; ``words``: a wording of each name."""
    rows = []
    for picture, true in zip(data.pictures, data.truth, strict=True):
        classes = np.unique(true.classes) if present else np.arange(len(words))
        detected = find(Path(str(picture)), [words[i] for i in classes]) if len(classes) else NONE
        rows.append(Boxes.detected(detected.boxes, classes[detected.classes.astype(int)], detected.scores))
    return rows


def by_size(truth: Sequence[Boxes], detected: Sequence[Boxes]) -> dict[str, float]:
    """AP50 of small, medium and large objects (32 and 96 pixels), as pycocotools computes it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rows(boxes: Boxes, image: int) -> list[dict[str, Any]]:
        sides = np.concatenate((boxes.boxes[:, :2], boxes.boxes[:, 2:] - boxes.boxes[:, :2]), 1).astype(float)
        return [
            {
                "image_id": image, "category_id": int(c), "bbox": b.tolist(), "score": float(s),
                "area": float(b[2] * b[3]), "iscrowd": int(k),
            }
            for b, c, s, k in zip(sides, boxes.classes, boxes.scores, boxes.crowd, strict=True)
        ]  # fmt: skip

    true, answers = COCO(), [r for i, b in enumerate(detected) for r in rows(b, i)]
    annotations = [r for i, b in enumerate(truth) for r in rows(b, i)]
    true.dataset = {
        "images": [{"id": i} for i in range(len(truth))],
        "categories": [{"id": c} for c in sorted({r["category_id"] for r in annotations + answers})],
        "annotations": [{**r, "id": i + 1} for i, r in enumerate(annotations)],
    }
    with redirect_stdout(sys.stderr):  # its progress
        true.createIndex()
        score = COCOeval(true, true.loadRes(answers), "bbox")
        score.evaluate()
        score.accumulate()
    precision = score.eval["precision"][0, :, :, :, 2]  # IoU .5: recall, class, size
    sizes = ("all", "small", "medium", "large")
    return {
        size: 100 * float(np.mean(rows[rows > -1]))
        for size, rows in zip(sizes, precision.transpose(2, 0, 1), strict=True)
    }


def exact_names(data: detection.Instances) -> list[Boxes]:
    """NanoDet alone: its own chances of its 80 names, on the same proposals; names are compared letter by letter."""
    import torch

    from calmclip.export.nets.mini import DETECTOR, MASKS, SHIPPED, facts
    from calmclip.export.nets.mini.modules import load
    from calmclip.models.ops.reference import soft_nms
    from calmclip.models.preprocess.image import ImagePreparer, decode

    module, preparer = load(SHIPPED, DETECTOR, MASKS).regions, ImagePreparer(facts.REGION_PIXELS)
    column = [facts.NAMES.index(name) for name in data.names]
    results = []
    for picture in data.pictures:
        array, frame = preparer.prepare(decode(Path(str(picture)).read_bytes()))
        with torch.inference_mode():
            chances, boxes, _, _ = module.propose(torch.from_numpy(array))
        scores = chances[0].numpy()[:, column]
        box, name = np.nonzero(scores >= FLOOR)
        order = np.argsort(-scores[box, name], kind="stable")[:2000]
        box, name = box[order], name[order]
        placed = frame.to_original(boxes[0].numpy())
        kept, values = soft_nms(
            placed[box], scores[box, name], name, method="hard", per_class=True, iou_threshold=0.6, sigma=0.5,
            min_score=FLOOR, max_output=100,
        )[:2]  # fmt: skip
        results.append(Boxes.detected(placed[box][kept], name[kept], np.asarray(values)))
    return results


def coco(data: detection.Instances, synonyms: Mapping[str, str], bundles: Mapping[str, Path]) -> dict[str, Any]:
    words = [synonyms[name] for name in data.names]
    rows: dict[str, Any] = {"exact class name": by_size(data.truth, exact_names(data))}
    for side, bundle in bundles.items():
        with service(bundle) as (client, _):
            find = finder(client)
            rows[side] = {
                **by_size(data.truth, named(find, data, data.names)),
                "present": ap50(data.truth, named(find, data, data.names, present=True)),
                "synonyms": ap50(data.truth, named(find, data, words)),
            }
    return rows


def boxed(photographs: Path, bundles: Mapping[str, Path]) -> dict[str, Any]:
    """Recall of 100 proposals, and AP50 with all names of the set or those of the picture, in three wordings."""
    rows = flickr_boxes.read(photographs)
    names = sorted({thing.name for row in rows for thing in row.objects})
    result = {}
    for side, bundle in bundles.items():
        with service(bundle) as (client, _):
            find = finder(client)
            places = [proposals(client, row.path) for row in rows]
            figures: dict[str, Any] = {}
            for kind, wanted in (("COCO's", True), ("others", False)):
                truth = [
                    Boxes.true(
                        np.array([t.box for t in row.objects if not t.crowd and (t.coco is not None) == wanted]),
                        np.zeros(sum(not t.crowd and (t.coco is not None) == wanted for t in row.objects), int),
                    )
                    for row in rows
                ]
                hits, total = covered(truth, places)
                figures[f"recall, {kind}"] = 100 * hits.sum() / total.sum()
            for wording in ("name", "other", "free"):
                figures[f"present, {wording}"] = ap50(*wordings(rows, find, wording, names))
            others = {t.name for row in rows for t in row.objects if t.coco is None}
            truth, boxes = wordings(rows, find, "name", names)
            chosen = [names.index(name) for name in sorted(others)]
            figures["present, name, others alone"] = ap50([_of(b, chosen) for b in truth], boxes)
            figures["all names"] = ap50(*everything(rows, find, names))
            result[side] = figures
    return result


def _of(boxes: Boxes, classes: Sequence[int]) -> Boxes:
    rows = np.isin(boxes.classes, classes)
    return Boxes(boxes.boxes[rows], boxes.classes[rows], boxes.scores[rows], boxes.crowd[rows])


def boxed_instances(photographs: Path) -> detection.Instances:
    rows = flickr_boxes.read(photographs)
    names = sorted({thing.name for row in rows for thing in row.objects})
    return detection.Instances(names, [row.path for row in rows], [_truth(row, names) for row in rows])


def wordings(
    rows: Sequence[flickr_boxes.Photograph], find: Find, wording: str, names: Sequence[str]
) -> tuple[list[Boxes], list[Boxes]]:
    """Truth and detections: each picture is asked for its own things in one wording. A class is a name."""
    truth, detected = [], []
    for row in rows:
        texts = {getattr(t, wording) or t.name: names.index(t.name) for t in row.objects}
        truth.append(_truth(row, names))
        boxes = find(row.path, list(texts))
        classes = np.array(list(texts.values()))[boxes.classes.astype(int)]
        detected.append(Boxes.detected(boxes.boxes, classes, boxes.scores))
    return truth, detected


def everything(
    rows: Sequence[flickr_boxes.Photograph], find: Find, names: Sequence[str]
) -> tuple[list[Boxes], list[Boxes]]:
    return [_truth(row, names) for row in rows], [find(row.path, names) for row in rows]


def _truth(row: flickr_boxes.Photograph, names: Sequence[str]) -> Boxes:
    return Boxes.true(
        np.array([t.box for t in row.objects]),
        np.array([names.index(t.name) for t in row.objects], int),
        np.array([t.crowd for t in row.objects], bool),
    )


def novel(folder: Path, bundles: Mapping[str, Path]) -> dict[str, Any]:
    """Top-1 and top-5 of the picture's name: the names in the order of their best regions."""
    rows = read_json(folder / "labels.json", "a list of objects with file and name")
    names = [row["name"] for row in rows]
    result = {}
    for side, bundle in bundles.items():
        with service(bundle, CALMCLIP_LIMITS__LABELS=str(len(names))) as (client, _):
            find = finder(client, max_output=1000, method="hard", iou_threshold=1.0, min_score=0.0)
            ranks = []
            for place, row in enumerate(rows):
                detected = find(next(folder.rglob(row["file"])), names)
                order = list(dict.fromkeys(detected.classes.astype(int).tolist()))
                ranks.append(order.index(place) if place in order else len(names))
            result[side] = {f"top-{k}": 100 * float(np.mean(np.array(ranks) < k)) for k in (1, 5)}
    return result


def examples(data: detection.Instances, bundles: Mapping[str, Path]) -> dict[str, Any]:
    """AP50 without words: the largest object of each name, by its box, is looked for in up to eight other pictures that
    hold the name, and in as many that do not."""
    draw = np.random.default_rng(0)
    result = {}
    for side, bundle in bundles.items():
        truth, detected = [], []
        with service(bundle) as (client, _):
            for name in range(len(data.names)):
                of = [boxes.of(name) for boxes in data.truth]
                areas = [float(_areas(b)[~b.crowd].max(initial=0.0)) for b in of]
                holders = [i for i, area in enumerate(areas) if area > 0]
                if len(holders) < 2:
                    continue
                shown = int(np.argmax(areas))
                box = of[shown].boxes[int(np.argmax(np.where(of[shown].crowd, 0, _areas(of[shown]))))]
                example = Example(Path(str(data.pictures[shown])).read_bytes(), [float(x) for x in box])
                others = [i for i in range(len(of)) if areas[i] == 0 and not len(of[i].boxes)]
                chosen = [i for i in holders if i != shown][:8]
                for i in [*chosen, *draw.permutation(others)[: len(chosen)]]:
                    boxes = finder(client, examples=[example])(Path(str(data.pictures[i])), [])
                    detected.append(Boxes.detected(boxes.boxes, np.full(len(boxes.scores), name), boxes.scores))
                    truth.append(of[i])
        result[side] = ap50(truth, detected)
    return result


def _areas(boxes: Boxes) -> Array:
    areas: Array = (boxes.boxes[:, 2] - boxes.boxes[:, 0]) * (boxes.boxes[:, 3] - boxes.boxes[:, 1])
    return areas


def int8(data: detection.Instances, new: Path, exact: Path) -> dict[str, float]:
    sides = []
    for bundle in (new, exact):
        with service(bundle) as (client, _):
            sides.append(Matches(data.truth, named(finder(client), data, data.names), AT))

    def difference(rows: Array) -> Array:
        weights = np.bincount(rows, minlength=len(data.truth))
        quantized, plain = (100 * float(side.average_precision(weights)[0]) for side in sides)
        return np.array([quantized - plain])

    low, high = intervals(difference, len(data.truth), Resampling())
    at = difference(np.arange(len(data.truth)))
    return {"INT8 - float": float(at[0]), "low": float(low[0]), "high": float(high[0])}


def scores(data: detection.Instances, new: Path, seed: int = 0) -> dict[str, Any]:
    """Every picture is asked for 1, 5, 20 and 80 names, drawn at random; half of them are in the picture if it has so
    many. A detection is right if it matches a box of its name at IoU .5, the best first."""
    draw = np.random.default_rng(seed)
    result: dict[str, Any] = {}
    pooled: list[tuple[Array, Array]] = []
    totals: list[int] = []
    with service(new) as (client, _):
        find = finder(client)
        for count in (count for count in PROMPTS if count <= len(data.names)):
            verdicts, values, total = [], [], 0
            for picture, true in zip(data.pictures, data.truth, strict=True):
                present = draw.permutation(np.unique(true.classes))[: max(1, count // 2)]
                absent = draw.permutation(np.setdiff1d(np.arange(len(data.names)), np.unique(true.classes)))
                if count == 1 and draw.random() < 0.5:
                    present = present[:0]
                classes = np.concatenate((present, absent))[:count]
                detected = find(Path(str(picture)), [data.names[int(i)] for i in classes])
                for label, name in enumerate(classes):
                    rows, wanted = detected.of(label), true.of(name)
                    verdict = match(overlaps(rows.boxes, wanted.boxes, wanted.crowd), wanted.crowd, 0.5)
                    verdicts.append(verdict)
                    values.append(rows.scores)
                    total += int((~wanted.crowd).sum())
            verdict, value = np.concatenate(verdicts), np.concatenate(values)
            pooled.append((value[verdict >= 0], verdict[verdict >= 0] == 1))
            totals.append(total)
            result[f"{count} names"] = best_f1(*pooled[-1], total)
    steps = np.arange(0.05, 0.8, 0.01)
    mean = [np.mean([f1(*sides, total, step) for sides, total in zip(pooled, totals, strict=True)]) for step in steps]
    result["best mean F1"] = {"F1": 100 * float(max(mean)), "threshold": float(steps[int(np.argmax(mean))])}
    value, right = (np.concatenate(parts) for parts in zip(*pooled, strict=True))
    sure = (value > 0.01) & (value < 1)
    result["beta"] = beta(value[sure].astype(np.float64), right[sure])
    result["reliability"] = {
        f"{low:.2f} to {min(high, 1):.2f}": {
            "score": float(value[inside].mean()), "right": float(right[inside].mean()), "detections": int(inside.sum())
        }
        for low, high in pairwise(BANDS)
        if (inside := (value >= low) & (value < high)).any()
    }  # fmt: skip
    return result


def beta(value: Array, right: Array) -> dict[str, float]:
    """Beta calibration by Newton's method (Kull et al. 2017): all three are 1 where the scores are calibrated. With
    ``LOW = HIGH = FACTOR = 1`` in `detection` it gives what belongs there."""
    x = np.stack((np.log(value), -np.log(1 - value), np.ones(len(value))), 1)
    w = np.array([1.0, 1.0, 0.0])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        w += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x, x.T @ (right - p))
    return {"low": float(w[0]), "high": float(w[1]), "factor": float(np.exp(w[2]))}


def f1(value: Array, right: Array, total: int, threshold: float) -> float:
    kept = value >= threshold
    return float(2 * right[kept].sum() / max(kept.sum() + total, 1))


def best_f1(value: Array, right: Array, total: int) -> dict[str, float]:
    order = np.argsort(-value)
    hits = np.cumsum(right[order])
    figures = 2 * hits / (np.arange(1, len(hits) + 1) + total)
    best = int(np.argmax(figures))
    return {"F1": 100 * float(figures[best]), "threshold": float(value[order][best])}


def ops(data: detection.Instances, new: Path) -> dict[str, Any]:
    """AP50 with the op library and without it; and of the detections above .25 with it, those that have no partner
    without it: of the same name, with an IoU over .9 and a score within .05."""
    sides = []
    for mode in ("required", "off"):
        with service(new, CALMCLIP_OPS=mode) as (client, _):
            sides.append(named(finder(client), data, data.names))
    alone = total = 0
    for ours, theirs in zip(*sides, strict=True):
        for box, name, score in zip(ours.boxes, ours.classes, ours.scores, strict=True):
            if score < 0.25:
                continue
            same = (theirs.classes == name) & (np.abs(theirs.scores - score) < 0.05)
            near = overlaps(box[None], theirs.boxes[same], np.zeros(same.sum(), bool))
            alone += not (near.size and near.max() > 0.9)
            total += 1
    figures = {"AP50": ap50(data.truth, sides[0]), "without the library": ap50(data.truth, sides[1])}
    return {**figures, "detections": total, "without a partner": alone}


def times(picture: Path, labels: Sequence[str], bundles: Mapping[str, Path]) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": machine(1)}
    modes: tuple[Mode, ...] = ("required", "off")
    for mode in modes:
        calls = {
            side: regions_call(open_bundle(bundle, threads=1, ops=mode), picture) for side, bundle in bundles.items()
        }
        spent = alternate(calls, seconds=20, clock=time.process_time)
        result[f"regions, ops {mode}"] = {side: 1e3 * timing.p50 for side, timing in spent.items()}
    for side, bundle in bundles.items():
        with service(bundle) as (client, process):
            asked = [_timed(client, picture, labels) for _ in range(60)]
            peak = Path(f"/proc/{process}/status").read_text().split("VmHWM:")[1].split()[0]
            result[f"request, {side}"] = {"p50 ms": 1e3 * float(np.median(asked[10:])), "peak MB": int(peak) / 1024}
            size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
            result[f"request, {side}"]["bundle MB"] = size / 1e6
    return result


def regions_call(runner: Runner, picture: Path) -> Callable[[], object]:
    rows, session = feeds(runner, picture)["regions"], runner.session("regions")
    return lambda: session.run(rows)


def _timed(client: Client, picture: Path, labels: Sequence[str]) -> float:
    start = time.perf_counter()
    client.detect(picture.read_bytes(), labels)
    return time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--new", type=Path, required=True)
    options.add_argument("--old", type=Path)
    options.add_argument("--float", type=Path, dest="exact")
    options.add_argument("--coco", type=Path, nargs="+", required=True)
    options.add_argument("--boxed", type=Path, help="the folder of the Flickr8k dev photographs")
    options.add_argument("--imagenet", type=Path)
    options.add_argument("--synonyms", type=Path, help="JSON {COCO name: another wording}")
    options.add_argument(
        "--parts", nargs="+", default=["coco", "boxed", "novel", "examples", "int8", "scores", "ops", "time"]
    )
    arguments = options.parse_args()
    data = coco_sets(arguments.coco)
    sides = {"new": arguments.new, **({"old": arguments.old} if arguments.old else {})}
    parts: dict[str, Callable[[], Any]] = {
        "coco": lambda: coco(data, read_json(arguments.synonyms, "an object"), sides),
        "boxed": lambda: boxed(arguments.boxed, sides),
        "novel": lambda: novel(arguments.imagenet, sides),
        "examples": lambda: examples(data, sides),
        "int8": lambda: int8(data, arguments.new, arguments.exact),
        "scores": lambda: {
            "COCO": scores(data, arguments.new),
            "boxed": scores(boxed_instances(arguments.boxed), arguments.new),
        },
        "ops": lambda: ops(data, arguments.new),
        "time": lambda: times(Path(str(data.pictures[0])), data.names, sides),
    }  # fmt: skip
    for part in arguments.parts:
        print(json.dumps({part: parts[part]()}, indent=1), flush=True)


if __name__ == "__main__":
    main()
