"""Detection of the built-in model on photographs outside its training set: cross-validation over boxed photographs.

Each fold trains a box head and the alignment heads without any view or crop of the fold's photographs, exports the
bundle, and measures it, float and INT8, on the fold alone by the code of `calmclip eval`. Finished steps are kept in
--work and are not repeated.

    python -m tests.bench.detection_cv --data coco128 --captions captions.jsonl --pictures images \\
        --names texts.json --name-views imagenet_sample_views.npz --work cv

Prints a line per fold, then means and deviations, and writes them to figures.json in --work.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmclip.export import align, boxes, pipeline
from calmclip.export.nets.mini import features
from calmclip.export.nets.mini.backbone import frozen
from calmclip.export.nets.mini.regions import average
from calmclip.export.nets.mini.towers import SHIPPED
from calmclip.export.nets.mini.weights import backbone_state
from calmclip.export.recipe import Calibration, Recipe
from calmclip.models.datasets import read_captions
from calmclip.models.evals import measure
from calmclip.models.runner import open_bundle

SMALLEST = 40 * 40  # area of a box worth a crop, in pixels of the 640-pixel letterbox


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="instances.json and images/")
    options.add_argument("--captions", type=Path, required=True, help="as `calmclip align` takes them")
    options.add_argument("--pictures", type=Path, required=True, help="the captioned pictures")
    options.add_argument("--names", type=Path, required=True, help="as `calmclip align --names`")
    options.add_argument("--name-views", type=Path, required=True, help="as `calmclip align --name-views`")
    options.add_argument("--work", type=Path, required=True, help="folder for all results")
    options.add_argument("--views", type=int, default=20)
    options.add_argument("--epochs", type=int, default=boxes.EPOCHS)
    options.add_argument("--threads", type=int, default=1)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    photos = boxes.read_photos(arguments.data / "instances.json", arguments.data / "images")
    parts = [_views(arguments, photos, part) for part in range(boxes.PARTS)]
    sources = _once(arguments.work / "sources.pt", lambda: _sources(arguments))
    figures: dict[int, dict[str, dict[str, float]]] = {}
    for fold in range(boxes.PARTS):
        folder = arguments.work / f"fold{fold}"
        others = [part for number, part in enumerate(parts) if number != fold]
        figures[fold] = _figures(arguments, folder, fold, others, sources)
        for precision, numbers in figures[fold].items():
            print(f"fold {fold}  {precision:5s}  " + "  ".join(f"{k} {v:.1f}" for k, v in numbers.items()), flush=True)
    summary: dict[str, dict[str, list[float]]] = {
        precision: {
            name: [float(np.mean(values)), float(np.std(values, ddof=1))]
            for name in figures[0][precision]
            for values in [[figures[fold][precision][name] for fold in figures]]
        }
        for precision in figures[0]
    }
    for precision, pairs in summary.items():
        line = "  ".join(f"{name} {mean:.1f} ± {deviation:.1f}" for name, (mean, deviation) in pairs.items())
        print(f"mean    {precision:5s}  {line}")
    (arguments.work / "figures.json").write_text(json.dumps({"folds": figures, "mean": summary}, indent=2) + "\n")


def _once(file: Path, make: Callable[[], Any]) -> Any:
    if not file.is_file():
        torch.save(make(), file)
    return torch.load(file, weights_only=False)


def _views(arguments: argparse.Namespace, photos: list[boxes.Photo], part: int) -> Any:
    return _once(
        arguments.work / f"views{part}.pt",
        lambda: boxes.see(frozen(backbone_state()), photos[part :: boxes.PARTS], arguments.views, part),
    )


def _sources(arguments: argparse.Namespace) -> dict[str, Any]:
    """The data that the alignments of all folds share: captioned pictures, class names, and the words for crops."""
    captions = read_captions(arguments.captions)
    files = sorted(captions)
    pictures = features.of_pictures([arguments.pictures / name for name in files], arguments.work)
    texts = features.of_texts([text for name in files for text in captions[name]])
    names = json.loads(arguments.names.read_text(encoding="utf-8"))
    with np.load(arguments.name_views) as data:
        shown, numbers = torch.from_numpy(data["q"] * data["scale"]), data["class_index"].tolist()

    def worded(labels: list[str]) -> Tensor:
        return torch.stack([features.of_texts([t.format(x) for x in labels]) for t in names["templates_train"]], 1)

    return {
        "sources": [
            align.captioned(pictures, texts, [len(captions[name]) for name in files]),
            align.named(shown, numbers, names, worded(names["bag_text"])),
        ],
        "start": align.fresh(pictures, texts, features.of_texts(names["class_names"])),
        "words": worded([*names["coco_names"], *align.PEOPLE]),
        "means": [*range(len(names["coco_names"])), *[names["coco_names"].index("person")] * len(align.PEOPLE)],
    }


def _crops(arguments: argparse.Namespace, others: list[boxes.Views], fold: int) -> tuple[Tensor, list[int]]:
    """Region features [n, 2, 1280] (as served, mirrored) and classes of the true boxes outside the fold."""
    truth = measure.read("detection", arguments.data).truth
    numbers_of = [list(range(len(truth)))[part :: boxes.PARTS] for part in range(boxes.PARTS) if part != fold]
    crops, classes = [], []
    for part, numbers in zip(others, numbers_of, strict=True):
        for place, number in enumerate(numbers):
            rows = [place * arguments.views + view for view in (0, 1)]
            both = [average(part.map32[r][None].float() * (6 / 255), part.boxes[r][None])[0] for r in rows]
            for index, box in enumerate(part.boxes[rows[0]]):
                if (box[2:] - box[:2]).prod() >= SMALLEST:
                    crops.append(torch.stack([views[index] for views in both]))
                    classes.append(int(truth[number].classes[index]))
    return torch.stack(crops), classes


def _figures(
    arguments: argparse.Namespace, folder: Path, fold: int, others: list[boxes.Views], shared: dict[str, Any]
) -> Any:
    folder.mkdir(exist_ok=True)
    figures = folder / "figures.json"
    if figures.is_file():
        return json.loads(figures.read_text())
    head = folder / "boxhead.safetensors"
    if not head.is_file():
        boxes.save(boxes.train(boxes.Views.join(others), arguments.epochs, 0), head, f"all but fold {fold}")
    if not (folder / SHIPPED.name).is_file():
        pictures, classes = _crops(arguments, others, fold)
        crops = align.cropped(pictures, classes, shared["means"], shared["words"])
        heads, _ = align.align([*shared["sources"], crops], shared["start"], align.Training())
        heads.save(folder / SHIPPED.name, {"net": "mini"})
    inputs = Calibration(images=arguments.pictures, count=64)  # the shipped ranges belong to other heads
    recipe = Recipe(checkpoint=str(folder), net="mini", name="cv", keep_float=True, replace=True, calibration=inputs)
    quantized, floats = pipeline.build(recipe, folder, say=lambda line: print(f"fold {fold}  {line}", flush=True))
    data = measure.read("detection", _alone(arguments.data, folder / "data", fold))
    sealed = {"float": floats, "int8": quantized}  # the latter may be called mixed
    runners = {side: open_bundle(bundle.directory, threads=arguments.threads) for side, bundle in sealed.items()}
    results = {
        precision: measure.named(measure.predict("detection", runner, data)) for precision, runner in runners.items()
    }
    figures.write_text(json.dumps(results, indent=2) + "\n")
    return results


def _alone(data: Path, target: Path, fold: int) -> Path:
    """A data set of the fold's photographs alone, with all class names."""
    content = json.loads((data / "instances.json").read_text(encoding="utf-8"))
    content["images"] = content["images"][fold :: boxes.PARTS]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] in ids]
    target.mkdir(exist_ok=True)
    (target / "instances.json").write_text(json.dumps(content))
    if not (target / "images").exists():
        (target / "images").symlink_to((data / "images").resolve())
    return target


if __name__ == "__main__":
    main()
