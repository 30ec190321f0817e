"""A data set for `calmclip eval BUNDLE subgroups` from COCO's instances: findings are names of things in a photograph,
groups are facts of it.

    python tests/bench/subgroups.py --data COCO --out DIR --shortcut cup "dining table"
    calmclip eval mini-int8 subgroups --data DIR --params DIR/params.json --save DIR
    python tests/bench/subgroups.py --random DIR/mini-int8.subgroups.npz

COCO: one or more directories with instances.json and images/. DIR receives groups.csv, params.json and links to the
photographs. The findings are the names on most photographs. The groups are none of people: ``shape`` (wide or tall),
``objects`` (number of outlined things), ``brightness`` (mean of grey, 0 to 255), ``largest`` (the largest thing's
percentage of the photograph). The mark of a shortcut is another name: does a table help to find a cup?

``--random`` reads groups of a coin from the vectors of samples, 100 times: chance, and how far a probe strays.
``--cost`` prints the processor time of 1,000 resamples of one bundle, of random numbers.
"""

import argparse
import csv
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from calmclip.models.datasets import read_json
from calmclip.models.evals.areas import Areas, Subset
from calmclip.models.evals.predictability import probed
from calmclip.models.evals.samples import Samples
from calmclip.models.evals.subgroups import Params, score
from calmclip.models.flow import Arrays

SIZES = ((1000, 1, 2), (1000, 6, 2), (1000, 6, 10), (10_000, 6, 2), (10_000, 6, 10))
BINS = {"objects": [1, 4, 10], "brightness": [0, 100, 130], "largest": [0, 20, 50]}


def rows(data: Path) -> Iterator[tuple[Path, set[str], dict[str, object]]]:
    """For each photograph with instances: its file, the names of its things, its groups."""
    content = read_json(data / "instances.json", "instances.json (COCO form) and images/")
    names = {category["id"]: category["name"] for category in content["categories"]}
    for image in content["images"]:
        things = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        file = data / "images" / image["file_name"]
        if not things:
            continue
        with Image.open(file) as picture:
            grey = float(np.asarray(picture.convert("L")).mean())
            width, height = picture.size
        area = max(each["bbox"][2] * each["bbox"][3] for each in things) / (width * height)
        yield (
            file,
            {names[each["category_id"]] for each in things},
            {
                "shape": "wide" if width > height else "tall",
                "objects": len(things),
                "brightness": round(grey, 1),
                "largest": round(100 * area, 1),
            },
        )


def chance(file: Path, times: int = 100) -> str:
    vectors = Samples.load(file, "subgroups").arrays["vectors"]
    aurocs = []
    for seed in range(times):
        group = np.random.default_rng(seed).integers(0, 2, len(vectors))
        answers = probed(vectors, np.arange(len(vectors)), group, seed)
        subset = Subset(answers.places, answers.logits[:, 1], group == 1)
        aurocs.append(Areas([subset])(np.ones(len(vectors))).auroc[0])
    mean, deviation = np.mean(aurocs), np.std(aurocs, ddof=1)
    return f"{len(vectors)} pictures, {times} random groups: probe AUROC {mean:.3f}, standard deviation {deviation:.3f}"


def cost(pictures: int, labels: int, groups: int) -> str:
    """Two columns of ``groups`` each."""
    draw = np.random.default_rng(0)
    arrays: Arrays = {
        "margins": draw.normal(size=(pictures, labels)).astype(np.float32),
        "truth": draw.integers(0, 2, (pictures, labels)).astype(np.int8),
        "members": draw.integers(0, groups, (pictures, 2)).astype(np.int16),
        "vectors": np.zeros((pictures, 1), np.float32),
    }
    names = tuple(map(str, range(groups)))
    words = {
        "labels": tuple(map(str, range(labels))),
        "columns": ("a", "b"),
        "groups of a": names,
        "groups of b": names,
    }
    statistic = score(Samples({"pictures": pictures}, arrays, words), Params(group_by=("a", "b"), probe=0))
    begin = time.process_time()
    for _ in range(50):
        statistic(draw.integers(0, pictures, pictures))
    seconds = (time.process_time() - begin) * 1000 / 50
    return f"{pictures:6} pictures, {labels:2} labels, 2 x {groups:2} groups: {seconds:6.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--top", type=int, default=6, help="findings")
    parser.add_argument("--shortcut", nargs=2, metavar=("FINDING", "NAME"), help="of --top names")
    parser.add_argument("--random", type=Path, metavar="FILE", help="samples of the eval")
    parser.add_argument("--cost", action="store_true")
    options = parser.parse_args()
    if options.cost:
        return print(*(cost(*sizes) for sizes in SIZES), sep="\n")
    if options.random:
        return print(chance(options.random))
    if not (options.data and options.out):
        parser.error("expected --data and --out, or --random")
    photographs = [row for data in options.data for row in rows(data)]
    findings = [name for name, _ in Counter(n for _, names, _ in photographs for n in names).most_common(options.top)]
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    groups = [*photographs[0][2]]
    with (options.out / "groups.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file", *findings, *groups])
        for file, names, facts in photographs:
            link = options.out / "images" / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())
            table.writerow([file.name, *(int(name in names) for name in findings), *facts.values()])
    params = {"labels": findings, "group_by": groups, "bins": BINS}
    if options.shortcut:
        params["shortcut"] = options.shortcut
    (options.out / "params.json").write_text(json.dumps(params, indent=2) + "\n")
    print(f"{len(photographs)} photographs, findings {', '.join(findings)}, groups {', '.join(groups)}")


if __name__ == "__main__":
    main()
