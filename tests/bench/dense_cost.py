"""How much longer the tower of a dense map takes than the image tower at the same size, by method.

    python -m tests.bench.dense_cost [--size 448] [--layers 12] [--threads 1] [--seconds 20] [--precision int8 float]

A ViT-B/16 with random weights; the plain tower has positions for this size. INT8 is the quantizer `fast` on random
pixels, so a ratio says what an export at best costs, and a cosine (of single patches, INT8 against float) says nothing
of trained weights. All sides run in turns; with one thread processor time is measured, else the clock. "fused" counts
the attentions that became one operator.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from functools import partial
from time import perf_counter, process_time

import numpy as np
import onnx
import torch

from calmclip.export import light, rewrites
from calmclip.export.nets import Tower, float32
from calmclip.export.quantizers import QUANTIZERS
from calmclip.export.towers import Style
from calmclip.export.towers.dense import METHODS, ClassToken, DenseTransformer, Positions
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.trace import to_onnx
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops.library import find
from tests.bench.alternate import alternate, machine
from tests.bench.quantizers import _state

WIDTH, PATCH, DIM = 768, 16, 512


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", type=int, default=448)
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--seconds", type=float, default=20.0, help="for each precision")
    options.add_argument("--precision", nargs="+", default=["int8", "float"], choices=["int8", "float"])
    arguments = options.parse_args()
    side = arguments.size // PATCH
    print(machine(arguments.threads), f"ViT-B/16, {arguments.layers} blocks, {arguments.size} pixels, random weights")
    pixels = [*_pixels(arguments.size, 4)]
    floats = {name: to_onnx(tower) for name, tower in towers(arguments.layers, side)}
    quantized = {name: fast(model, pixels) for name, model in floats.items()}
    for precision in arguments.precision:
        graphs = quantized if precision == "int8" else floats
        sessions, fused = {}, {}
        for name, model in graphs.items():
            swapped = rewrites.apply(model, rewrites.swaps()).model
            fused[name] = Counter(node.op_type for node in swapped.graph.node)
            sessions[name] = light.Session(swapped, threads=arguments.threads, library=find())
        calls = {name: partial(session.run, None, pixels[0]) for name, session in sessions.items()}
        clock = process_time if arguments.threads == 1 else perf_counter
        spent = alternate(calls, seconds=arguments.seconds, clock=clock)
        for name, timing in spent.items():
            ratio = timing.p50 / spent["plain"].p50
            facts = f"{name:8} {precision:6} {1000 * timing.p50:8.1f} ms  {ratio:5.2f} x plain"
            attention = f"{fused[name]['QuantAttention']} fused attentions, {fused[name]['Softmax']} Softmax"
            print(f"{facts}  {timing.calls} calls  {attention}", flush=True)
    for name in METHODS:
        runs = [light.Session(model[name], threads=arguments.threads) for model in (floats, quantized)]
        left, right = (run.run(None, pixels[0])[0].reshape(-1, DIM) for run in runs)
        print(f"{name:8} cosine of patches, INT8 against float: mean {cosines(left, right).mean():.4f}, "
              f"least {cosines(left, right).min():.4f}")  # fmt: skip


def towers(layers: int, side: int) -> Iterator[tuple[str, Tower]]:
    """The plain tower, then one for each method."""
    state = state_of(layers, side)
    inputs = {"pixels": float32("B", 3, side * PATCH, side * PATCH)}
    image = _image(state)
    image.fold()
    yield "plain", Tower(image, inputs, {"image_embeds": float32("B", DIM)}, None, "none")
    for name, method in METHODS.items():
        if method.inputs:
            continue
        reader = ClassToken(_image(state), Positions((side, side), (side, side)))
        dense = DenseTransformer(reader, name, method.blocks(layers), bare=False, cells=(side, side))
        dense.fold()
        yield name, Tower(dense.eval(), inputs, {"patches": float32("B", side, side, DIM)}, None, "none")


def state_of(layers: int, side: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "patch.weight": (WIDTH, 3, PATCH, PATCH),
        "cls": (WIDTH,),
        "positions": (1 + side * side, WIDTH),
        "projection.weight": (DIM, WIDTH),
        "norm_post.weight": (WIDTH,),
        "norm_post.bias": (WIDTH,),
    }
    return _state(shapes, layers)


def _image(state: dict[str, torch.Tensor]) -> VisionTransformer:
    image = VisionTransformer(state, Style(WIDTH // 64))
    image.load_state_dict(state)
    image.requires_grad_(False)
    return image.eval()


def fast(model: onnx.ModelProto, feeds: list[Arrays]) -> onnx.ModelProto:
    quantizer = QUANTIZERS.get("fast")
    params = quantizer.params()
    assert quantizer.observe
    return quantizer.quantize(model, quantizer.observe(model, feeds, params), params)


def cosines(a: Array, b: Array) -> Array:
    result: Array = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return result


def _pixels(size: int, count: int) -> Iterator[Arrays]:
    random = np.random.default_rng(0)
    for _ in range(count):
        yield {"pixels": random.standard_normal((1, 3, size, size)).astype(np.float32)}


if __name__ == "__main__":
    main()
