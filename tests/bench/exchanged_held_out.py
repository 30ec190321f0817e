"""What the built-in bundle's margins are fitted to: photographs that the picture's head has not seen.

    python -m tests.bench.exchanged_held_out --align align --captions align/flickr8k_train_captions.json

The shipped heads were trained on the photographs of this split, which so fit their captions better than others do, and
a threshold that is fitted to them would flag too many words of other captions. So a head is trained on 5,500 of the
6,000 photographs, from cached features and the vectors of the bundle's own texts, and words of captions of both the
other 500 and of 500 of the 5,500 are exchanged. Needs torch. About 4 minutes on one core.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calmclip.export import align
from calmclip.export.nets.mini.backbone import frozen
from calmclip.export.nets.mini.modules import tensors
from calmclip.export.nets.mini.towers import Heads, ImageHead
from calmclip.export.nets.mini.weights import backbone_state
from calmclip.models.evals.exchanged import exchange
from calmclip.models.evals.misalignment import changed
from calmclip.models.flow import Array
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.tasks.words import without, words

EXPECTED = (0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
HELD, PER_PICTURE, DIM = 500, 3, 384


class Texts:
    """Unit rows of texts, each embedded once, turned by the trained projection."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.rows, self.weight = runner, dict[str, Array](), np.eye(DIM)

    def __call__(self, texts: list[str]) -> Array:
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        for place in range(0, len(new), 256):
            part = new[place : place + 256]
            self.rows |= zip(part, self.runner.embed(texts=part), strict=True)
        turned = np.stack([self.rows[text] for text in texts]) @ self.weight.T
        unit: Array = turned / np.linalg.norm(turned, axis=1, keepdims=True)
        return unit


def train(pictures: torch.Tensor, captions: list[list[str]], names: list[str], texts: Texts) -> Heads:
    rows = texts([caption for texts_of_one in captions for caption in texts_of_one[:PER_PICTURE]])
    weight = torch.zeros(DIM, pictures.shape[-1] + DIM)
    weight[:, pictures.shape[-1] :] = torch.eye(DIM)
    flat = pictures.flatten(0, 1)
    table = torch.from_numpy(texts(names)).float()
    centre = torch.zeros(DIM)
    start = Heads(weight, centre, torch.eye(DIM), centre, flat.mean(0), flat.std(0) + 1e-6, table)
    source = align.captioned(pictures, torch.from_numpy(rows).float(), [PER_PICTURE] * len(captions))
    return align.align([source], start, align.Training(seeds=1), quiet=True)[0]


def table(name: str, images: Array, captions: list[list[str]], texts: Texts, options: argparse.Namespace) -> None:
    rows = exchange(captions, options.seed, options.kinds)
    for expected in EXPECTED:
        lowest, hits = [], []
        for row in rows:
            for caption in (row.caption, row.false):
                spans = words(caption)
                shorter = [without(caption, span) for span in spans]
                vectors = texts([caption, *(text or caption for text in shorter)])
                moves = vectors[0] - vectors[1:]
                moves[[not text for text in shorter]] = vectors[0]
                margins = moves @ images[row.picture] - expected * np.linalg.norm(moves, axis=1)
                margins = np.where([span.has_content for span in spans], margins, np.inf)
                if caption is row.caption:
                    lowest.append(margins.min())
                else:
                    hits.append(changed(row.caption, caption)[int(margins.argmin())])
        five, ten = np.quantile(lowest, [0.05, 0.1])
        print(f"| {name} | {expected} | {100 * np.mean(hits):.1f} | {five:.3f} | {ten:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--align", type=Path, required=True, help="folder of flickr8k_train_features.npz, texts.json")
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=Path("models/bundles/mini-int8"))
    parser.add_argument("--kinds", default="wide")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    cached = np.load(options.align / "flickr8k_train_features.npz")
    pictures = torch.from_numpy((cached["q"] * cached["scale"]).astype(np.float32))[:, None]
    content: dict[str, Any] = json.loads(options.captions.read_text(encoding="utf-8"))
    captions = [content[str(file)] for file in cached["files"]]
    names = json.loads((options.align / "texts.json").read_text(encoding="utf-8"))["class_names"]
    order = np.random.default_rng(3).permutation(len(captions))
    texts = Texts(open_bundle(options.bundle, threads=1))
    trained = [int(place) for place in order[HELD:]]
    heads = train(pictures[trained], [captions[place] for place in trained], names, texts)
    texts.weight = heads.text_weight.double().numpy()
    head = ImageHead(heads, frozen(tensors(backbone_state())).classifier)
    print("| photographs | expected | lowest % | 5 % of lowest margins | 10 % |\n| --- | --- | --- | --- | --- |")
    for name, places in (("trained on", trained[:HELD]), ("held out", [int(place) for place in order[:HELD]])):
        with torch.inference_mode():
            images = head(pictures[places, 0]).double().numpy()
        table(name, images, [captions[place] for place in places], texts, options)


if __name__ == "__main__":
    main()
