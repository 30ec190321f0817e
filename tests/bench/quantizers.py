"""Latency of quantizers at batch 1 on blocks of BERT and ViT (width 768, random weights), and their cosine to float.

    python -m tests.bench.quantizers [--threads 1] [--layers 2] [--seconds 10]

`attention` is `static` with the products of two activations in INT8 too. Ratios compare with `static`.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from calmclip.export import light, rewrites
from calmclip.export.graph import activation_products
from calmclip.export.nets import Tower
from calmclip.export.quantizers import QUANTIZERS, smooth
from calmclip.export.towers import Style
from calmclip.export.towers.bert import BertText
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.library import find
from tests.bench.alternate import alternate, line, machine

WIDTH, WORDS = 768, 30522


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--seconds", type=float, default=10.0, help="for each line")
    arguments = options.parse_args()
    print(machine(arguments.threads))
    random = np.random.default_rng(0)
    for tokens in (16, 128):
        mask = np.ones((1, tokens), np.int64)
        feeds = [{"ids": random.integers(0, WORDS, (1, tokens)), "mask": mask} for _ in range(4)]
        _compare(f"BERT, {tokens} tokens", bert(arguments.layers), feeds, arguments)
    feeds = [{"pixels": random.standard_normal((1, 3, 224, 224)).astype(np.float32)} for _ in range(4)]
    _compare("ViT, 50 tokens", vit(arguments.layers), feeds, arguments)


def bert(layers: int) -> Tower:
    shapes = {"tokens.weight": (WORDS, WIDTH), "positions": (512, WIDTH), "types": (2, WIDTH)}
    state = _state(shapes | {f"norm_pre.{part}": (WIDTH,) for part in ("weight", "bias")}, layers)
    ids = Tensor(dtype="int64", shape=("B", "T"))
    return _tower(BertText(state, Style(12, pool="mean"), 512), state, {"ids": ids, "mask": ids})


def vit(layers: int) -> Tower:
    shapes = {"patch.weight": (WIDTH, 3, 32, 32), "cls": (WIDTH,), "positions": (50, WIDTH)}
    state = _state(shapes, layers)
    pixels = Tensor(dtype="float32", shape=("B", 3, 224, 224))
    return _tower(VisionTransformer(state, Style(12)), state, {"pixels": pixels})


def _state(shapes: dict[str, tuple[int, ...]], layers: int) -> dict[str, torch.Tensor]:
    shapes = dict(shapes)
    sizes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.out": (WIDTH, WIDTH)}
    sizes |= {"mlp.up": (4 * WIDTH, WIDTH), "mlp.down": (WIDTH, 4 * WIDTH)}
    for i in range(layers):
        for name, (outputs, inputs) in sizes.items():
            shapes |= {f"blocks.{i}.{name}.weight": (outputs, inputs), f"blocks.{i}.{name}.bias": (outputs,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.{part}": (WIDTH,) for part in ("weight", "bias")}
    return {name: torch.randn(shape) * (1.0 if len(shape) < 2 else shape[-1] ** -0.5) for name, shape in shapes.items()}


def _tower(module: VisionTransformer | BertText, state: dict[str, torch.Tensor], inputs: dict[str, Tensor]) -> Tower:
    module.load_state_dict(state)
    module.requires_grad_(False)
    module.fold()
    return Tower(module.eval(), inputs, {"y": Tensor(dtype="float32", shape=("B", WIDTH))}, None, "none")


def _compare(case: str, tower: Tower, feeds: Sequence[Arrays], arguments: argparse.Namespace) -> None:
    model = to_onnx(tower)
    sides = {"float": model}
    for name in ("static", "paper", "fast", "dynamic"):
        quantizer = QUANTIZERS.get(name)
        params = quantizer.params()
        ranges = quantizer.observe(model, feeds, params) if quantizer.observe else {}
        sides[name] = quantizer.quantize(model, ranges, params)
    params = smooth.Params(alpha=None, attention=tuple(node.name for node in activation_products(model)))
    sides["attention"] = smooth.quantize(model, smooth.observe(model, feeds, params), params)
    runs: dict[str, Callable[[], list[Array]]] = {}
    for name, side in sides.items():
        session = light.Session(rewrites.apply(side, rewrites.swaps()).model, threads=arguments.threads, library=find())
        runs[name] = partial(session.run, None, feeds[0])
    true = np.ravel(runs["float"]()[0])
    for name, run in runs.items():
        row = np.ravel(run()[0])
        print(f"{case:18s} {name:10s} cosine {row @ true / np.linalg.norm(row) / np.linalg.norm(true):.5f}")
    print(line(case, alternate(runs, seconds=arguments.seconds), "static"), flush=True)


if __name__ == "__main__":
    main()
