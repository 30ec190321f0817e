"""Searches and records the settings and activation ranges that ship with the built-in model.

`python -m calmclip.export.nets.mini.record --help`

Run it again after a change of a tower's graph or weights. Until then export says that the ranges do not fit, and
observes ranges on the pictures that ship with calmclip.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from calmclip.export import calibrate, report, samples
from calmclip.export.graph import fingerprint
from calmclip.export.nets import NETS
from calmclip.export.nets.mini import RANGES, multilingual, phrases, with_languages
from calmclip.export.nets.mini.facts import TEMPLATES
from calmclip.export.pipeline import nominal
from calmclip.export.quantizers import QUANTIZERS, Goal
from calmclip.export.recipe import Bars
from calmclip.models.classifier import fill
from calmclip.models.datasets import read_captions
from calmclip.models.preprocess.image import SUFFIXES

SEED = 0
COVERAGE = 0.95  # of the multiply-accumulates that may be in INT8: no large convolution goes to float


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=Path, action="append", default=[], help="a folder; may be repeated")
    options.add_argument("--captions", type=Path, required=True, help="JSON {file: [captions]}, or .jsonl")
    options.add_argument("--names", type=Path, help="JSON with `class_names`")
    options.add_argument(
        "--languages", action="store_true", help="the text tower of many languages; phrases.txt in place of names"
    )
    options.add_argument("--each", type=int, default=96, help="pictures of each folder, at most (default %(default)s)")
    options.add_argument(
        "--texts", type=int, default=256, help="captions, and half as many names (default %(default)s)"
    )
    options.add_argument("--source", required=True, help="where pictures and texts come from, in words")
    options.add_argument("--only", nargs="+", help="graphs to record; the entries of the others stay")
    arguments = options.parse_args()
    draw = random.Random(SEED)
    pictures = []
    for folder in arguments.images:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        pictures += draw.sample(files, min(arguments.each, len(files)))
    draw.shuffle(pictures)  # a sample of the first ones is a sample of all folders
    captions = [text for texts in read_captions(arguments.captions).values() for text in texts]
    texts = draw.sample(captions, arguments.texts)
    net = NETS.get("mini").load("mini")
    file, known = RANGES, net.source.weights
    if arguments.languages:
        net = with_languages(net)
        file, arguments.only = multilingual.RANGES, ["text"]
        known = {name: sha for name, sha in net.source.weights.items() if name not in known}
        words = phrases.sections()
        rows = [*words["nouns"], *words["captions"], *phrases.composed(words, 2 * arguments.texts)]
        texts += [draw.choice(row) for row in draw.sample(rows, 2 * arguments.texts)]
        texts += samples.calibration_texts()  # of other kinds than captions
        draw.shuffle(texts)
    else:
        names = json.loads(arguments.names.read_text(encoding="utf-8"))["class_names"]
        texts += [fill(draw.choice(TEMPLATES), name) for name in draw.sample(names, arguments.texts // 2)]
    bars = Bars.model_validate(net.bars)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in net.files.items():
            (Path(folder) / name).write_bytes(data)
        graphs = json.loads(file.read_bytes())["graphs"] if arguments.only and file.is_file() else {}
        for role in arguments.only or net.towers:
            tower = net.towers[role]
            model, quantizer = tower.graph, QUANTIZERS.get(tower.quantizer)
            assert model
            assert quantizer.search
            parts = zip(calibrate.hold_out(pictures), calibrate.hold_out(texts), strict=True)
            feeds, held = (calibrate.feeds(tower, Path(folder), *part) for part in parts)
            mean = max(report.COSINE, bars.cosine(role))
            goal = Goal(mean, report.WORST, COVERAGE, dims=nominal(tower), summary=tower.summary)
            params = quantizer.params.model_validate(tower.quantizer_params)
            result = quantizer.search(model, feeds, held, params, goal)
            graphs[role] = {
                "fingerprint": fingerprint(model),
                "quantizer": tower.quantizer,
                "params": dict(tower.quantizer_params),
                "settled": {"name": result.quantizer, "params": result.written()},
                "ranges": result.ranges,
            }
            print(f"{role}: {json.dumps(result.history, indent=1)}", flush=True)
    calibrate.record(file, arguments.source, [path.name for path in pictures], known, graphs)


if __name__ == "__main__":
    main()
