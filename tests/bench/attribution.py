"""What the graph `attribution` costs beside the graph `text`, and beside leaving out one word at a time.

    python -m tests.bench.attribution [--layers 1 4 12] [--words 12] [--threads 1] [--seconds 20]

The text tower of CLIP's ViT-B/32 (width 512, 8 heads, 12 layers, 49,408 words) with random weights; INT8 is the
quantizer `fast` on random tokens. A caption of n words has n + 2 tokens here; leave-one-out runs it and n texts that
lack a word in one batch. All sides run in turns; with one thread processor time is measured, else the clock. The last
table compares contributions: the graph with INT8 weights against float, and both sides' size without shared weights.
"""

import argparse
from functools import partial
from time import perf_counter, process_time

import numpy as np
import onnx
import torch
from torch.nn import functional as F

from calmclip.export import borrow, light, rewrites
from calmclip.export.nets import Tower, float32, text_inputs
from calmclip.export.nets.common.attribution import borrower
from calmclip.export.quantizers import QUANTIZERS
from calmclip.export.towers import Style
from calmclip.export.towers.attribution import Attribution
from calmclip.export.towers.text import TextTransformer
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.flow import Arrays
from calmclip.models.ops.library import find
from tests.bench.alternate import alternate, machine

WIDTH, LAYERS, VOCABULARY, CONTEXT, DIM = 512, 12, 49_408, 77, 512
SHARED = 4096  # bytes; see `export.weights`


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, nargs="+", default=[1, 4, 12])
    options.add_argument("--words", type=int, default=12)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--seconds", type=float, default=20.0)
    arguments = options.parse_args()
    print(machine(arguments.threads), "text tower of ViT-B/32, random weights")
    tower, random = text_tower(), np.random.default_rng(0)
    words, feeds = arguments.words, [caption(random, arguments.words) for _ in range(8)]
    text = to_onnx(tower)
    int8 = fast(text, feeds)
    image = F.normalize(torch.randn(1, DIM), dim=-1).numpy()
    batch = {"ids": np.concatenate([caption(random, words)["ids"] for _ in range(words + 1)])}
    graphs = {"text, one caption": (int8, feeds[0]), f"leave-one-out, {words} words": (int8, batch)}
    compared = []
    for layers in arguments.layers:
        added = borrower(tower, float32("B", DIM))
        floats = borrow.untransposed(
            to_onnx(Tower(Attribution(tower.module, layers), added.inputs, added.outputs, None, "none"))
        )
        stored = borrow.stored(floats, text, int8)
        graphs[f"attribution, {layers} of {LAYERS} layers"] = stored, {**feeds[0], "image_embeds": image}
        compared.append((layers, floats, stored))
    sessions = {name: (opened(graph, arguments.threads), feed) for name, (graph, feed) in graphs.items()}
    calls = {name: partial(session.run, None, feed) for name, (session, feed) in sessions.items()}
    clock = process_time if arguments.threads == 1 else perf_counter
    timings = alternate(calls, seconds=arguments.seconds, clock=clock)
    first = timings["text, one caption"].p50
    for name, timing in timings.items():
        print(f"{name:32} {1000 * timing.p50:8.2f} ms  {timing.p50 / first:6.2f} x text  {timing.calls} calls")
    for layers, floats, stored in compared:
        runs = [light.Session(graph, threads=arguments.threads) for graph in (floats, stored)]
        answers = [[run.run(None, {**feed, "image_embeds": image})[0][0] for feed in feeds] for run in runs]
        cosine = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(*answers, strict=True)]
        sizes = f"{own(stored, int8) / 1e6:.2f} MB, in float {own(floats, text) / 1e6:.2f} MB"
        print(
            f"{layers} layers: cosine of contributions, INT8 weights against float: {np.mean(cosine):.4f}, least "
            f"{min(cosine):.4f}; weights of its own {sizes}"
        )


def text_tower() -> Tower:
    """Of random numbers, of the size at which a residual branch adds to a stream of length 1."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "tokens.weight": (VOCABULARY, WIDTH), "positions": (CONTEXT, WIDTH), "projection.weight": (DIM, WIDTH),
        "norm_post.weight": (WIDTH,), "norm_post.bias": (WIDTH,),
    }  # fmt: skip
    sizes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.out": (WIDTH, WIDTH), "mlp.up": (4 * WIDTH, WIDTH)}
    sizes["mlp.down"] = WIDTH, 4 * WIDTH
    for block in (f"blocks.{number}" for number in range(LAYERS)):
        for name, size in sizes.items():
            shapes |= {f"{block}.{name}.weight": size, f"{block}.{name}.bias": size[:1]}
        shapes |= {f"{block}.norm{place}.{part}": (WIDTH,) for place in (1, 2) for part in ("weight", "bias")}
    state = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    state |= {name: torch.ones(WIDTH) for name in shapes if "norm" in name and name.endswith("weight")}
    module = TextTransformer(state, Style(WIDTH // 64, pool="eot", causal=True))
    module.load_state_dict(state)
    module.requires_grad_(False)
    module.fold()
    tokens = TextPreprocess(context=CONTEXT)
    return Tower(module.eval(), text_inputs(tokens), {"text_embeds": float32("B", DIM)}, tokens, "none")


def caption(random: np.random.Generator, words: int) -> Arrays:
    ids = random.integers(1000, 40_000, (1, words + 2))
    ids[0, 0], ids[0, -1] = VOCABULARY - 2, VOCABULARY - 1
    return {"ids": ids}


def fast(model: onnx.ModelProto, feeds: list[Arrays]) -> onnx.ModelProto:
    quantizer = QUANTIZERS.get("fast")
    params = quantizer.params()
    assert quantizer.observe
    return quantizer.quantize(model, quantizer.observe(model, feeds, params), params)


def opened(graph: onnx.ModelProto, threads: int) -> light.Session:
    return light.Session(rewrites.apply(graph, rewrites.swaps()).model, threads=threads, library=find())


def own(graph: onnx.ModelProto, lender: onnx.ModelProto) -> int:
    """Bytes of the weights that a bundle of both graphs stores for ``graph`` alone."""
    lent = {tensor.raw_data for tensor in lender.graph.initializer if light.size(tensor) >= SHARED}
    return sum(light.size(tensor) for tensor in graph.graph.initializer if tensor.raw_data not in lent)


if __name__ == "__main__":
    main()
