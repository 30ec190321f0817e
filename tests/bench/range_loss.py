"""What 8 bits cost in each kind of tensor: `python -m tests.bench.range_loss CHECKPOINT… --data DIR`.

Each net is exported with the quantizer `paper` (W8A8, one range for a whole tensor): everything in 8 bits, then once
for each kind of tensor with that kind in float. A row is the perplexity on held-out rows, and its growth over float.
``--data`` is a directory that `calmclip demonstrate` wrote for a net: it has calibration.txt and held/texts.txt.
"""

import json
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from calmclip.export.pipeline import build
from calmclip.export.quantizers.sites import Kind
from calmclip.export.recipe import load_recipe, recognise
from calmclip.export.training.demonstration import CALIBRATION
from calmclip.models.bundle.manifest import REPORT

KINDS: tuple[Kind, ...] = get_args(Kind)
ATTENTION: tuple[Kind, ...] = ("qkv", "scores", "probabilities", "mixtures")
FLOATS: dict[str, tuple[Kind, ...]] = {
    "nothing": (),
    "all but weights": tuple(kind for kind in KINDS if kind != "weights"),
    **{kind: (kind,) for kind in KINDS if kind != "inputs"},
    "attention": ATTENTION,
    "all but attention": tuple(kind for kind in KINDS if kind not in ATTENTION),
}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    for checkpoint in args.checkpoints:
        for label, perplexity, growth in measure(checkpoint, args.data):
            print(f"{checkpoint.name}, in float: {label:18} {perplexity:.2f} {growth:+.1%}", flush=True)


def measure(checkpoint: Path, data: Path) -> Iterator[tuple[str, float, float]]:
    """-> what is in float; perplexity; its growth over the float net's."""
    net_name, plugin = recognise(str(checkpoint))
    for label, kinds in FLOATS.items():
        net = plugin.load(str(checkpoint))
        (role,) = net.towers
        with TemporaryDirectory() as folder:
            recipe = load_recipe(
                str(checkpoint), net_name, net, name="range-loss", rewrites=[],
                quantize={role: {"name": "paper", "params": {"floats": kinds}}},
                calibration={"texts": data / "calibration.txt", "count": CALIBRATION, "seed": 0},
                evals={"perplexity": data / "held"}, bars={"min_output_cosine": -1.0},
            )  # fmt: skip
            sealed = build(recipe, Path(folder), net=net, release=True)
            sides = json.loads((sealed[0].directory / REPORT).read_text(encoding="utf-8"))["accuracy"]["perplexity"]
        before, after = sides["float32"]["perplexity"], sides["int8"]["perplexity"]
        yield label, after, after / before - 1


if __name__ == "__main__":
    main()
