"""Whether tags hold the labels of photographs, and what a correction for near-to-everything words would change.

    python -m tests.bench.tag BUNDLE COCO [COCO…] [--folders DIR]

COCO: a folder with `instances.json` and its pictures, in `images/` or beside it. ``--folders``: a folder of pictures
for each label. Recall of labels among ten words of the vocabulary, the label's own word alone (dog, not spaniel): of
the ten with the highest cosine, after each correction, with near-synonyms left out, and of the task `tag`.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from calmclip.export import samples
from calmclip.models import vocabulary
from calmclip.models.flow import Array
from calmclip.models.runner import open_bundle
from calmclip.models.tasks.features import unit

TOP = 10
SUFFIXES = {".jpg", ".jpeg", ".png"}
NAMES = {  # a label -> the vocabulary's word for it
    "tv": "television", "cell phone": "cellular telephone", "potted plant": "houseplant", "wine glass": "wineglass",
    "skis": "ski", "sports ball": "ball", "remote": "remote control", "motorbike": "motorcycle",
}  # fmt: skip
Labelled = tuple[Path, set[str]]


def of_coco(folder: Path) -> Iterator[Labelled]:
    data = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in data["categories"]}
    labels: dict[int, set[str]] = {}
    for annotation in data["annotations"]:
        labels.setdefault(annotation["image_id"], set()).add(names[annotation["category_id"]])
    paths = {path.name: path for path in folder.rglob("*") if path.suffix in SUFFIXES}
    for image in data["images"]:
        if image["id"] in labels:
            yield paths[image["file_name"]], labels[image["id"]]


def of_folders(folder: Path) -> Iterator[Labelled]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES:
            yield path, {path.parent.name}


def recall(scores: Array, truth: list[list[int]]) -> float:
    """``scores`` [N, W], ``truth``: indices of words for each picture -> the part that is among the `TOP`, %."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP].tolist()
    hits = sum(len({*row} & {*words}) for row, words in zip(best, truth, strict=True))
    return 100 * hits / sum(map(len, truth))


def distinct(scores: Array, words: Array, threshold: float) -> Array:
    """The same scores, with 0 for a word that is within ``threshold`` of a better word of the picture."""
    centred = unit(words - words.mean(axis=0))
    left = np.zeros_like(scores)
    for row, out in zip(scores, left, strict=True):
        kept: list[int] = []
        for word in np.argsort(-row, kind="stable")[: 10 * TOP].tolist():
            if len(kept) < TOP and (not kept or (centred[kept] @ centred[word]).max() < threshold):
                kept.append(word)
                out[word] = row[word]
    return left


def corrections(cosines: Array, words: Array, photographs: Array, texts: Array) -> dict[str, Array]:
    """``photographs``, ``texts``: vectors of the samples that ship with calmclip."""
    seen, mean = photographs @ words.T, unit(words.mean(axis=0))
    return {
        "none": cosines,
        "less the word's mean over photographs": cosines - seen.mean(axis=0),
        "less half of it": cosines - 0.5 * seen.mean(axis=0),
        "the same in standard deviations": (cosines - seen.mean(axis=0)) / seen.std(axis=0),
        "less half its cosine with the mean word": cosines - 0.5 * words @ mean,
        "less half its mean over texts": cosines - 0.5 * (texts @ words.T).mean(axis=0),
        "less its mean over these very pictures": cosines - cosines.mean(axis=0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="recall of labels among tags")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("coco", type=Path, nargs="*")
    parser.add_argument("--folders", type=Path)
    options = parser.parse_args()
    runner = open_bundle(options.bundle)
    names = vocabulary.words()
    index = {name: number for number, name in enumerate(names)}
    words = runner.embed(texts=names)
    photographs = runner.embed(images=[*samples.pictures(), *samples.calibration_pictures()])
    texts = runner.embed(texts=samples.calibration_texts())
    sets: dict[str, Iterable[Labelled]] = {folder.name: of_coco(folder) for folder in options.coco}
    if options.folders:
        sets[options.folders.name] = of_folders(options.folders)
    for name, pairs in sets.items():
        pictures = [(path, {NAMES.get(label, label) for label in labels}) for path, labels in pairs]
        absent = sorted({label for _, labels in pictures for label in labels if label not in index})
        truth = [[index[label] for label in labels if label in index] for _, labels in pictures]
        cosines = runner.embed(images=[path for path, _ in pictures]) @ words.T
        print(f"{name}: {len(pictures)} pictures, {sum(map(len, truth))} labels; not in the vocabulary: {absent}")
        for title, scores in corrections(cosines, words, photographs, texts).items():
            print(f"  {recall(scores, truth):5.1f} %  {title}")
        for threshold in (0.6, 0.7, 0.8):
            print(f"  {recall(distinct(cosines, words, threshold), truth):5.1f} %  near-synonyms out, {threshold}")
        answers = [runner.tag(path) for path, _ in pictures]
        of_picture = [{tag.index for tag in tags.picture} for tags in answers]
        of_all = [hits | {tag.index for tag in tags.regions} for hits, tags in zip(of_picture, answers, strict=True)]
        for title, tagged in (("tags of the picture", of_picture), ("tags of the picture and its regions", of_all)):
            hits = sum(len(indices & {*labels}) for indices, labels in zip(tagged, truth, strict=True))
            print(f"  {100 * hits / sum(map(len, truth)):5.1f} %  {title}, by the task")


if __name__ == "__main__":
    main()
