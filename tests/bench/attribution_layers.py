"""How many layers of gradient x attention tell best which noun of a caption was exchanged, by the built-in model.

    python -m tests.bench.attribution_layers --data flickr8k [--bundles models/bundles]

``--data``: a data set of the eval misalignment, which exchanges one noun of a caption of each photograph. Printed is
how often that word has the lowest contribution of all content words, by the last n layers of the float text tower and
by leave-one-out, with one standard error; also for margins with leave-one-out's weights (`tasks.contributions`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from calmclip.export.nets.mini import DETECTOR, MASKS, SHIPPED
from calmclip.export.nets.mini.modules import load
from calmclip.export.towers.attribution import attending
from calmclip.models.evals.misalignment import Params, changed, read
from calmclip.models.flow import Array
from calmclip.models.runner import open_bundle
from calmclip.models.tasks.contributions import Scene, leave_one_out
from calmclip.models.tasks.gradient import of_words
from calmclip.models.tasks.words import words

EXPECTED = (0.0, 0.2, 0.4)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--bundles", type=Path, default=Path("models/bundles"))
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--kinds", default="wide", help="of the nouns that are exchanged for each other")
    options.add_argument("--pictures", type=int, default=300)
    arguments = options.parse_args()
    params = Params(seed=arguments.seed, kinds=arguments.kinds)
    data = read(arguments.data, params, arguments.pictures)
    runner = open_bundle(arguments.bundles / "mini-float", threads=1)
    vectors = runner.embed(images=data.pictures)
    torch.set_num_threads(1)
    text = load(SHIPPED, DETECTOR, MASKS).text
    hits: dict[tuple[str, float], list[bool]] = {}
    for image, (caption, false) in tqdm(zip(vectors, data.captions, strict=True), total=len(vectors), unit=""):
        spans = words(false)
        content, exchanged = np.array([span.has_content for span in spans]), np.array(changed(caption, false))
        located = runner.bundle.text().located(false)
        told = runner.run(leave_one_out(runner.bundle, Scene(false, spans, image)))
        assert told.weights is not None
        sides = {"leave-one-out": told.contributions}
        for count, tokens in enumerate(last_layers(text, located.ids, image), 1):
            sides[f"gradient, last {count}"] = of_words(tokens, located.offsets, spans)
        for name, values in sides.items():
            for expected in EXPECTED:
                least = np.where(content, values - expected * told.weights, np.inf).argmin()
                hits.setdefault((name, expected), []).append(bool(exchanged[least]))
    count = len(vectors)
    print(f"{count} captions of {arguments.data.name}, seed {arguments.seed}, kinds {arguments.kinds}")
    print(f"| contributions | {' | '.join(f'less {each} x weight' for each in EXPECTED)} |")
    for name in dict.fromkeys(name for name, _ in hits):
        parts = [100 * np.mean(hits[name, expected]) for expected in EXPECTED]
        errors = [(part * (100 - part) / count) ** 0.5 for part in parts]
        print(f"| {name} | {' | '.join(f'{p:.1f} ± {e:.1f}' for p, e in zip(parts, errors, strict=True))} |")


def last_layers(text: nn.Module, ids: Sequence[int], image: Array) -> Array:
    """float32 [L, T]: the contributions of the last 1, 2, … L layers, by one backward pass; `Attribution` has one
    factor for all of them."""
    layers = attending(text)
    gains = [torch.ones(1, len(ids), 1, requires_grad=True) for _ in layers]
    for layer, gain in zip(layers, gains, strict=True):
        layer.gain = gain
    score = (text(torch.tensor([[*ids]])) * torch.from_numpy(image)).sum()
    parts: Array = torch.stack(torch.autograd.grad(score, gains))[:, 0, :, 0].numpy()
    for layer in layers:
        layer.gain = None
    return np.cumsum(parts[::-1], axis=0)


if __name__ == "__main__":
    main()
