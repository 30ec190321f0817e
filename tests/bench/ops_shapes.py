"""Operators on unusual shapes, beside their local functions: few queries, many keys, odd widths and channels.

    python -m tests.bench.ops_shapes [--quick] [--without avx512,vnni,vbmi]

A line has the time of the operator, nanoseconds a number or a thousand products, and how many times as fast as the
function it is, in processor time of one thread. A shape whose work is paid by the vector stands beside its even
neighbour: an odd width should cost as much.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from calmclip.export.functions import alone
from calmclip.models.flow import Array
from calmclip.models.ops import spec, trial
from calmclip.models.ops.spec import ACTIVATIONS, Attribute, Op
from calmclip.models.ops.trial import Case
from tests.bench.alternate import machine
from tests.bench.ops import library, options

OPS: tuple[Op, ...] = ()  # the other benches measure the operators
random = np.random.default_rng(0)
X = {"x_scale": 0.02, "x_zero": 120}
Y = {"y_scale": 0.02, "y_zero": 120}
LAYER = ("x_scale", "x_zero", "weight", "weight_scale", "bias", "y_scale", "y_zero")


def octets(*shape: int) -> Array:
    return random.integers(0, 256, shape, np.uint8)


def weights(*shape: int) -> dict[str, Any]:
    return {
        "weight": random.integers(-128, 128, shape),
        "weight_scale": np.full(shape[-1], 1 / (80 * np.sqrt(prod(shape[:-1])))),
        "bias": np.zeros(shape[-1]),
    }


def attention(queries: int, keys: int, dims: int = 64, heads: int = 12, masked: bool = False) -> Case:
    width = dims * heads

    def draw() -> dict[str, Any]:
        kv = octets(1, keys, 2 * width)
        mask = np.where(random.random((queries, keys)) < 0.5, -np.inf, 0) if masked else [0]
        return {
            "q": octets(1, queries, width), "q_scale": 0.002, "q_zero": 130, "k": kv, "k_scale": 0.02, "v": kv,
            "v_scale": 0.02, "p_scale": 0, "mask": mask, **Y,
        }  # fmt: skip

    constants = ("q_scale", "q_zero", "k_scale", "v_scale", "p_scale", "mask", "y_scale", "y_zero")
    attributes: dict[str, Attribute] = {"heads": heads, "width": width, "v_start": width}
    name = f"{queries} queries, {keys} keys of {dims}{', masked' if masked else ''}"
    return Case(spec.QUANT_ATTENTION, draw, {"y": ("B", queries, width)}, constants, attributes, name)


def linear(rows: int, k: int, n: int) -> Case:
    return Case(
        spec.QUANT_LINEAR, lambda: {"x": octets(1, rows, k), **X, **weights(k, n), **Y}, {"y": ("B", rows, n)}, LAYER,
        {"activation": ACTIVATIONS.index("gelu")}, f"{rows} x {k} into {n}",
    )  # fmt: skip


def pointwise(side: int, k: int, n: int) -> Case:
    return Case(
        spec.QUANT_POINTWISE, lambda: {"x": octets(1, side, side, k), **X, **weights(k, n), **Y},
        {"y": ("B", side, side, n)}, LAYER, name=f"{side} x {side} x {k} into {n}",
    )  # fmt: skip


def conv(side: int, k: int, n: int, window: int = 3) -> Case:
    return Case(
        spec.QUANT_CONV, lambda: {"x": octets(1, side, side, k), **X, **weights(window, window, k, n), **Y},
        {"y": ("B", side, side, n)}, LAYER, {"pads": (window // 2,) * 4},
        f"{side} x {side} x {k} into {n}, {window} x {window}",
    )  # fmt: skip


def depthwise(side: int, channels: int, window: int = 3) -> Case:
    return Case(
        spec.QUANT_DEPTHWISE,
        lambda: {"x": octets(1, side, side, channels), **X, **weights(window, window, channels), **Y},
        {"y": ("B", side, side, channels)}, LAYER, {"pads": (window // 2,) * 4, "group": channels},
        f"{side} x {side} x {channels}, {window} x {window}",
    )  # fmt: skip


def norm(rows: int, width: int) -> Case:
    feeds = {"weight": np.ones(width), "bias": np.zeros(width), **Y}
    return Case(
        spec.QUANT_LAYER_NORM,
        lambda: {"x": random.normal(0, 1, (rows, width)), "residual": random.normal(0, 1, (rows, width)), **feeds},
        dict.fromkeys(("y", "normed", "sum"), (rows, width)), tuple(feeds), name=f"{rows} x {width}",
    )  # fmt: skip


def added(side: int, channels: int) -> Case:
    shape = (1, side, side, channels)
    feeds = {"a_scale": 0.02, "a_zero": 120, "b_scale": 0.03, "b_zero": 130, **Y}
    return Case(
        spec.QUANT_ADD, lambda: {"a": octets(*shape), "b": octets(*shape), **feeds}, {"y": ("B", *shape[1:])},
        tuple(feeds), name=f"{side} x {side} x {channels}",
    )  # fmt: skip


def patches(side: int, patch: int) -> Case:
    columns, count = 3 * patch**2, (side // patch) ** 2
    return Case(
        spec.QUANT_PATCHES, lambda: {"x": random.normal(0, 1, (1, 3, side, side)), **Y}, {"y": ("B", count, columns)},
        ("y_scale", "y_zero"), {"patch": (patch, patch)}, f"{side} x {side}, {patch} x {patch}",
    )  # fmt: skip


def pool(side: int, channels: int) -> Case:
    half = (side + 1) // 2
    return Case(
        spec.QUANT_MAX_POOL, lambda: {"x": octets(1, side, side, channels)}, {"y": ("B", half, half, channels)},
        attributes={"window": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}, name=f"{side} x {side} x {channels}",
    )  # fmt: skip


def shapes(quick: bool) -> Iterator[Case]:
    for queries in (1, 2, 4, 16):
        for keys in (197, 1024) if quick else (197, 577, 1024, 2048, 4096):
            yield attention(queries, keys)
    for tokens in (577, 1025) if quick else (577, 1025, 2305, 4097):
        yield attention(tokens, tokens, heads=2)
    for dims in (64, 63, 72, 80, 88, 33, 32, 24, 20):
        yield attention(197, 197, dims)
    yield attention(1, 1024, masked=True)
    for rows, k, n in ((50, 768, 768), (50, 767, 768), (50, 768, 767), (50, 766, 770), (1, 768, 768), (1, 767, 767)):
        yield linear(rows, k, n)
    for k, n in ((96, 96), (97, 96), (96, 97), (95, 95), (24, 144), (23, 143)):
        yield pointwise(28, k, n)
    for k, n in ((64, 64), (63, 64), (64, 63), (65, 65), (16, 16), (15, 15), (3, 32)):
        yield conv(28, k, n)
    for channels in (96, 95, 97, 64, 63, 33, 32, 17, 16, 7):
        yield depthwise(28, channels)
    for channels in (96, 95):
        yield depthwise(28, channels, 7)
    for width in (768, 767, 32, 31, 17):
        yield norm(197, width)
    for channels in (96, 95, 17):
        yield added(28, channels)
    for side, patch in ((224, 32), (224, 16), (224, 14), (221, 13)):
        yield patches(side, patch)
    for channels in (32, 31, 17, 3):
        yield pool(112, channels)


def main() -> None:
    arguments = options(__doc__, 0, "fewer shapes").parse_args()
    library()
    print(machine(1))
    with TemporaryDirectory() as folder:
        trial.FOLDER = Path(folder)
        for number, named in enumerate(shapes(arguments.quick)):
            case = replace(named, name=str(number))
            graph, (_, constants, elsewhere) = case.graph, case.drawn()
            model = alone(case.op, graph.inputs, graph.outputs, case.attributes, constants, elsewhere)
            (trial.FOLDER / graph.file).write_bytes(model.SerializeToString())
            compiled, function = trial.seconds(trial.pair(case))
            print(
                f"{case.op.name:16s} {named.name:34s} {compiled * 1e6:9.1f} us {function / compiled:7.2f}x", flush=True
            )


if __name__ == "__main__":
    main()
