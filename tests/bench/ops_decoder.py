"""QuantRows, QuantRowsLinear and RotaryAttention: the ops beside the local functions that a bundle carries.

    python -m tests.bench.ops_decoder --threads 1 [--quick]

The shapes are those of a block of Qwen3-0.6B: width 1024, 16 heads of 128, 8 of keys and values, MLP 3072. Each line is
of several nodes, each with weights of its own, 50 MB and more, so that none are in a cache when they are wanted. The
"peak" is the products of a line in registers. One thread is timed by processor time, more by the clock.
"""

from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter, process_time
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import helper, numpy_helper

from calmclip.export.functions import BODIES
from calmclip.models.flow import Array
from calmclip.models.ops.library import Library
from calmclip.models.ops.spec import (
    ACTIVATIONS,
    DOMAIN,
    QUANT_ROWS,
    QUANT_ROWS_LINEAR,
    ROTARY_ATTENTION,
    VERSION,
    Op,
)
from tests.bench.alternate import alternate, line, machine
from tests.bench.ops import library, options
from tests.bench.ops_quant_linear import peak

OPS = (QUANT_ROWS, QUANT_ROWS_LINEAR, ROTARY_ATTENTION)
WIDTH, HEADS, GROUPS, DIMS, HIDDEN = 1024, 16, 8, 128, 3072
PRODUCTS = {"qkv": (WIDTH, (HEADS + 2 * GROUPS) * DIMS, 0), "out": (HEADS * DIMS, WIDTH, 0),
            "gate and up": (WIDTH, 2 * HIDDEN, 1), "down": (HIDDEN, WIDTH, 0)}  # fmt: skip
Side = Callable[[], object]


def main() -> None:
    parser = options(__doc__, 3.0, "16 tokens only, and less time")
    arguments = parser.parse_args()
    built, seconds = library(), 0.5 if arguments.quick else arguments.seconds
    clock = process_time if arguments.threads == 1 else perf_counter
    print(machine(arguments.threads))
    for tokens in (16,) if arguments.quick else (16, 128):
        for name, (k, n, gated) in PRODUCTS.items():
            copies = max(2, 50_000_000 // (k * n))
            sides = _sides(QUANT_ROWS_LINEAR, *_product(tokens, k, n, gated), copies, built, arguments.threads)
            sides["peak"] = peak(built, copies * tokens * k * n, arguments.threads)
            print(line(f"{tokens} x {k} -> {n} {name}", alternate(sides, seconds=seconds, clock=clock), "op"))
        for op, case in ((QUANT_ROWS, _rows(tokens)), (ROTARY_ATTENTION, _attention(tokens))):
            timed = alternate(_sides(op, *case, 1, built, arguments.threads), seconds=seconds, clock=clock)
            print(line(f"{tokens} {op.name}", timed, "op"), flush=True)


Case = tuple[dict[str, Array], dict[str, list[Array]], dict[str, Any]]  # fed, constants of each node, attributes


def _product(tokens: int, k: int, n: int, gated: int) -> Case:
    random = np.random.default_rng(0)
    copies = max(2, 50_000_000 // (k * n))
    fed = {
        "x": random.integers(0, 256, (1, tokens, k), np.uint8), "x_scale": np.full((1, tokens, 1), 0.01, np.float32),
        "residual": random.standard_normal((1, tokens, n // (1 + gated)), np.float32),
    }  # fmt: skip
    constants = {
        "x_zero": [np.array(128, np.uint8)],
        "weight": [random.integers(-127, 128, (k, n), np.int8) for _ in range(copies)],
        "weight_scale": [np.full(n, 1e-3, np.float32)], "bias": [np.zeros(n, np.float32)],
    }  # fmt: skip
    return fed, constants, {"gated": gated, "activation": ACTIVATIONS.index("silu") if gated else 0}


def _rows(tokens: int) -> Case:
    x = np.random.default_rng(0).standard_normal((1, tokens, WIDTH), np.float32)
    return {"x": x}, {"weight": [np.ones(WIDTH, np.float32)]}, {"normalize": 1}


def _attention(tokens: int) -> Case:
    random = np.random.default_rng(0)
    qkv = random.standard_normal((1, tokens, (HEADS + 2 * GROUPS) * DIMS), np.float32)
    angle = np.tile(random.uniform(-3, 3, (tokens, DIMS // 2)), 2)
    tables = {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    fed = dict.fromkeys("qkv", qkv) | {f"{part}_{name}": table for part in "qk" for name, table in tables.items()}
    fed["mask"] = np.triu(np.full((tokens, tokens), -1e4, np.float32), 1)
    starts = {"k_start": HEADS * DIMS, "v_start": (HEADS + GROUPS) * DIMS}
    weights = {f"{part}_weight": [np.full(DIMS, DIMS**-0.25, np.float32)] for part in "qk"}
    return fed, weights, {"heads": HEADS, "groups": GROUPS, "dims": DIMS, **starts}


def _sides(
    op: Op, fed: Mapping[str, Array], constants: Mapping[str, list[Array]], attributes: Mapping[str, Any],
    copies: int, built: Library, threads: int,
) -> dict[str, Side]:  # fmt: skip
    settings = {**op.attributes, **attributes}
    held = [
        numpy_helper.from_array(a, f"{name}_{i}") for name, arrays in constants.items() for i, a in enumerate(arrays)
    ]
    nodes, outputs = [], []
    for copy in range(copies):
        read = [f"{name}_{copy % len(constants[name])}" if name in constants else name for name in op.inputs]
        names = [f"{name}_{copy}" for name in op.outputs]
        nodes.append(helper.make_node(op.name, read, names, domain=DOMAIN, **settings))
        kinds = [helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)) for tensor in op.outputs.values()]
        outputs += [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, kinds, strict=True)]
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(a.dtype), [f"{name}_{i}" for i in range(a.ndim - 1)] + [a.shape[-1]]
        )
        for name, a in fed.items()
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    graph = helper.make_graph(nodes, "bench", inputs, outputs, held)
    model = helper.make_model(graph, functions=[BODIES[op.name](**settings)], opset_imports=opsets, ir_version=10)
    sides: dict[str, Side] = {}
    for side, of in (("op", built), ("function", None)):
        choices = ort.SessionOptions()
        choices.intra_op_num_threads, choices.log_severity_level = threads, 3
        if of is not None:
            choices.register_custom_ops_library(str(of.path))
        session = ort.InferenceSession(model.SerializeToString(), choices, providers=["CPUExecutionProvider"])
        sides[side] = partial(session.run, None, dict(fed))
    return sides


if __name__ == "__main__":
    main()
