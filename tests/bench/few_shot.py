"""Heads that are fitted to a few pictures of each label, beside zero-shot and a linear probe: accuracy and time.

    OPENBLAS_NUM_THREADS=2 python -m tests.bench.few_shot BUNDLE --data DIR [--draws 20] [--augment 10] [--only NAME …]

DIR has folders ``images`` with a ``labels.json`` (a list of file and label): `cifar10` (10 pictures of each label are
shown), `natural-images` (6); and `coco-masks` with an ``instances.json`` (4): the objects of at least 32 x 32 pixels,
cut out, of the names that have 8 or more. A draw shows so many pictures of each label and measures on all others. Every
param is chosen by the pictures that are shown. These data sets have no captions for their pictures, so `caps` takes
the texts of the labels. A line has the mean accuracy, the mean difference to zero-shot and to the linear probe over
draws, each with the half width of its 95 % interval (Student's t; the draws share pictures, so it is a little narrow),
the mean accuracy that the fits reported, and the median of their seconds.

Then times: a fit of 10 labels with 16 pictures each from vectors, in seconds of the processor, which other load on the
machine changes little; and a classify request with each head beside zero-shot, in turn: the median of the differences,
and the milliseconds of the processor that head and scores take more, from the same vector.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import numpy as np
from PIL import Image
from scipy.stats import t

from calmclip.models.classifier import Classifier
from calmclip.models.flow import Array
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.tasks.classify import scored
from calmclip.models.tasks.features import labels as label_vectors
from calmclip.models.tasks.fit import FitRequest, Fitted, fit_vectors, picture_flows

SHOTS = {"cifar10": 10, "natural-images": 6, "coco-masks": 4}
HEADS = ("linear_probe", "prototype", "softmax_regression", "tip", "caps", "gda")
LEAST_SIDE, LEAST_OBJECTS = 32, 8


def listed(folder: Path) -> tuple[list[Path], list[str]]:
    entries = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    return [folder / "images" / entry["file"] for entry in entries], [entry["label"] for entry in entries]


def objects(folder: Path) -> tuple[list[Array], list[str]]:
    """Cut-outs of a COCO file, uint8 [height, width, 3], and their names."""
    file = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in file["categories"]}
    pictures = {image["id"]: image["file_name"] for image in file["images"]}
    parts, labels = [], []
    for entry in file["annotations"]:
        x, y, width, height = entry["bbox"]
        if min(width, height) >= LEAST_SIDE and not entry.get("iscrowd"):
            whole = Image.open(folder / "images" / pictures[entry["image_id"]]).convert("RGB")
            parts.append(np.asarray(whole.crop((round(x), round(y), round(x + width), round(y + height)))))
            labels.append(names[entry["category_id"]])
    kept = [i for i, label in enumerate(labels) if labels.count(label) >= LEAST_OBJECTS]
    return [parts[i] for i in kept], [labels[i] for i in kept]


def draws(truth: Array, shots: int, count: int) -> Iterator[tuple[Array, Array]]:
    """Indices of the shown and of the other pictures."""
    for seed in range(count):
        order = np.random.default_rng(seed).permutation(len(truth))
        shown = np.concatenate([order[truth[order] == label][:shots] for label in np.unique(truth)])
        yield shown, np.setdiff1d(np.arange(len(truth)), shown)


def half_width(differences: Sequence[float]) -> float:
    """Of the 95 % interval of the mean."""
    spread = np.std(differences, ddof=1) / len(differences) ** 0.5
    return float(spread * t.ppf(0.975, len(differences) - 1))


def accuracy(runner: Runner, data: Path, name: str, count: int, augment: int, heads: Sequence[str]) -> None:
    images, names = objects(data / name) if name == "coco-masks" else listed(data / name)
    known = list(dict.fromkeys(names))
    truth = np.array([known.index(label) for label in names])
    classifier = runner.bundle.classifier_for(None, known)
    request = FitRequest(images, [0] * len(images), classifier, "gda", augment=augment)
    rows = np.stack([*runner.map(picture_flows(runner.bundle, request))])  # [N, 1 + augment, D]
    text = runner.run(label_vectors(runner.bundle, classifier))
    right: dict[str, list[float]] = {}
    reported: dict[str, list[float]] = {head: [] for head in heads}
    seconds: dict[str, list[float]] = {head: [] for head in heads}
    for shown, others in draws(truth, SHOTS[name], count):
        views = rows[shown, 1:] if augment else None
        image, answer = rows[others, 0], truth[others]
        right.setdefault("zero-shot", []).append(float(((image @ text.T).argmax(axis=1) == answer).mean()))
        for head in heads:
            fitted: Fitted = runner.run(
                fit_vectors(runner.bundle, classifier, head, {}, rows[shown, 0], truth[shown].tolist(), views=views)
            )
            hits = scored(fitted.classifier, image, text).argmax(axis=1) == answer
            right.setdefault(head, []).append(float(hits.mean()))
            reported[head].append(fitted.report.after or 0)
            seconds[head].append(fitted.report.seconds)
    print(f"\n{name}: {len(images)} pictures, {len(known)} labels, {SHOTS[name]} shown of each, {count} draws"
          f"{f', {augment} crops of each' if augment else ''}")  # fmt: skip
    for head, values in right.items():
        line = f"  {head:19s} {100 * np.mean(values):5.1f} %"
        for other in ("zero-shot", "linear_probe"):
            if other != head and other in right:
                gaps = 100 * (np.array(values) - right[other])
                line += f"   {gaps.mean():+5.1f} +- {half_width(gaps.tolist()):.1f} to {other}"
        if head in reported:
            line += f"   reported {100 * np.mean(reported[head]):.1f} %, {median(seconds[head]):.3f} s"
        print(line, flush=True)


def fit_times(runner: Runner, heads: Sequence[str], rounds: int = 15) -> dict[str, Classifier]:
    draw = np.random.default_rng(0)
    names = ("cat", "dog", "car", "ship", "horse", "bird", "truck", "frog", "deer", "plane")
    truth = [i % 10 for i in range(160)]
    text = runner.run(label_vectors(runner.bundle, runner.bundle.classifier_for(None, names)))
    image = text[truth] + draw.standard_normal((160, runner.bundle.dim)) / runner.bundle.dim**0.5
    image = (image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float32)
    classifiers: dict[str, Classifier] = {}
    seconds: dict[str, list[float]] = {head: [] for head in heads}
    for _ in range(rounds):
        for head in heads:
            start = process_time()
            fitted = runner.run(fit_vectors(runner.bundle, Classifier(names), head, {}, image, truth))
            seconds[head].append(process_time() - start)
            classifiers[head] = fitted.classifier
    print("\na fit of 10 labels x 16 pictures from vectors, with the choice of params; seconds of the processor")
    for head, values in seconds.items():
        print(f"  {head:19s} median {median(values):.3f} s, least {min(values):.3f} s")
    return classifiers


def request_times(runner: Runner, picture: Path, classifiers: dict[str, Classifier], rounds: int = 100) -> None:
    zero = Classifier(next(iter(classifiers.values())).labels)

    def once(classifier: Classifier) -> float:
        start = perf_counter()
        runner.classify(content, classifier=classifier)
        return 1000 * (perf_counter() - start)

    content = picture.read_bytes()
    for _ in range(5):
        once(zero)
    print(f"\nclassify with each head beside zero-shot ({picture.name}), {rounds} pairs in turn")
    for head, classifier in classifiers.items():
        pairs = [(once(zero), once(classifier)) for _ in range(rounds)]
        before, after = zip(*pairs, strict=True)
        gap = median(b - a for a, b in pairs)
        alone = median(head_alone(runner, classifier) - head_alone(runner, zero) for _ in range(5))
        times = f"{median(before):.2f} -> {median(after):.2f} ms, difference {gap:+.3f} ms"
        print(f"  {head:19s} {times}; head and scores alone {alone:+.4f} ms", flush=True)


def head_alone(runner: Runner, classifier: Classifier, rounds: int = 300) -> float:
    """Milliseconds of the processor for the logits and scores of a vector."""
    complete = runner.bundle.classifier_for(classifier)
    text = runner.run(label_vectors(runner.bundle, complete))
    start = process_time()
    for _ in range(rounds):
        complete.bound.scores(scored(complete, text[:1], text))
    return 1000 * (process_time() - start) / rounds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--draws", type=int, default=20)
    options.add_argument("--augment", type=int, default=0)
    options.add_argument("--only", nargs="*", default=[*SHOTS], choices=[*SHOTS, "times"])
    args = options.parse_args()
    runner = open_bundle(args.bundle)
    print(f"{runner.bundle.name}, {os.environ.get('OPENBLAS_NUM_THREADS', 'all')} threads of BLAS")
    for name in args.only:
        if name != "times":
            accuracy(runner, args.data, name, args.draws, args.augment, HEADS)
    if "times" in args.only or args.only == [*SHOTS]:
        picture = next((args.data / "natural-images/images").rglob("*.jpg"))
        request_times(runner, picture, fit_times(runner, HEADS))


if __name__ == "__main__":
    main()
