"""The operators, one row each: the spec, the oracle, and small models to compare the two. Everything else reads this.

A row's other files follow from its name: `Op.key` names the oracle in `reference`, the op wrapper ``KEY_op`` that
``csrc/ops/ops.inc`` lists, and the local function in `calmclip.export.functions`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from calmclip.models.bundle.manifest import Graph, Tensor
from calmclip.models.flow import Array, Arrays
from calmclip.models.ops import reference, spec
from calmclip.models.ops.spec import ACTIVATIONS, METHODS, Attribute, Op

Random = np.random.Generator
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """One node of the operator; ``probes/NAME.onnx`` holds it. ``draw`` makes random inputs.

    ``inputs`` and ``outputs`` hold the tensors whose shapes the model fixes further than the spec does.
    """

    name: str
    draw: Callable[[Random], dict[str, Array]]
    attributes: dict[str, Attribute] = field(default_factory=dict)
    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One operator. ``oracle`` takes the inputs and attributes by name. ``tolerance``: largest difference from it."""

    op: Op
    oracle: Callable[..., Any]
    tolerance: float
    probes: tuple[Probe, ...]

    def graph(self, probe: Probe) -> Graph:
        inputs, outputs = self.op.inputs | probe.inputs, self.op.outputs | probe.outputs
        return Graph(file=f"{probe.name}.onnx", batch=False, inputs=inputs, outputs=outputs, preprocess=None)

    def expected(self, feeds: Arrays, probe: Probe) -> tuple[Array, ...]:
        """The oracle's outputs, in the order of the spec."""
        answer = self.oracle(**feeds, **probe.attributes)
        return answer if isinstance(answer, tuple) else (answer,)


def _rows(random: Random) -> dict[str, Array]:
    """Rows shorter and longer than a few vectors; some entries are masked."""
    x = random.normal(0, 5, (int(random.integers(1, 30)), int(random.integers(1, 700)))).astype(np.float32)
    x[random.random(x.shape) < 0.1] = -np.inf if random.random() < 0.5 else np.finfo(np.float32).min
    return {"x": x}


def _boxes(random: Random) -> dict[str, Array]:
    count = int(random.integers(0, 200))
    corner = random.uniform(0, 100, (count, 2))
    boxes = np.hstack([corner, corner + random.uniform(0, 40, (count, 2))]).astype(np.float32)
    return {
        "boxes": boxes,
        "scores": random.random(count).astype(np.float32),
        "classes": random.integers(0, 4, count),
        "method": random.integers(0, len(METHODS), 1),
        "per_class": random.integers(0, 2, 1),
        "iou_threshold": np.array([0.3], np.float32),
        "sigma": np.array([0.5], np.float32),
        "min_score": np.array([0.01], np.float32),
        "max_output": np.array([100]),
    }


def _suppressed(boxes: Array, scores: Array, classes: Array, **settings: Array) -> tuple[Array, ...]:
    """`reference.soft_nms` with its settings as the operator's inputs; one image."""
    values = {name: array.item() for name, array in settings.items()}
    values |= {"method": METHODS[values["method"]], "per_class": bool(values["per_class"])}
    kept = reference.soft_nms(boxes, scores, classes, **values)
    return *kept, np.zeros(len(kept.indices), np.int64)


def _picture(random: Random) -> dict[str, Array]:
    height, width = (int(side) for side in random.integers(1, 400, 2))
    return {"image": random.integers(0, 256, (height, width, 3), np.uint8)}


def _layer(random: Random) -> dict[str, Array]:
    """A linear layer with whole and partial panels and tiles; its results are about 1."""
    rows, k, n = (int(random.integers(1, limit)) for limit in (40, 200, 100))
    return {
        "x": random.integers(0, 256, (2, rows, k), np.uint8),
        "x_scale": _float(0.02), "x_zero": _bytes(random),
        "weight": random.integers(-128, 128, (k, n), np.int8),
        "weight_scale": (random.uniform(0.5, 1, n) / (80 * np.sqrt(k))).astype(np.float32),
        "bias": random.normal(0, 1, n).astype(np.float32),
    }  # fmt: skip


def _quantized_layer(random: Random) -> dict[str, Array]:
    feeds = _layer(random)
    n = len(feeds["bias"])
    scale = random.uniform(0.01, 0.03, n).astype(np.float32)
    return feeds | {"y_scale": scale, "y_zero": random.integers(0, 256, n, np.uint8)}


def _pointwise(random: Random) -> dict[str, Array]:
    """Pictures one pixel wide; y has one scale and one zero point."""
    feeds = _layer(random)
    return feeds | {"x": feeds["x"][:, :, None], "y_scale": _float(0.02), "y_zero": _bytes(random)}


def _windowed(random: Random) -> dict[str, Array]:
    """Whole and partial tiles and panels; rows of windows that fill no whole words. Results are about 1."""
    channels, n = (int(random.integers(1, limit)) for limit in (20, 70))
    return {
        "x": _bytes(random, *(int(random.integers(1, limit)) for limit in (3, 9, 40)), channels),
        "x_scale": _float(0.02), "x_zero": _bytes(random),
        "weight": random.integers(-128, 128, (3, 3, channels, n), np.int8),
        "weight_scale": (random.uniform(0.5, 1, n) / (240 * np.sqrt(channels))).astype(np.float32),
        "bias": random.normal(0, 1, n).astype(np.float32), "y_scale": _float(0.02), "y_zero": _bytes(random),
    }  # fmt: skip


def _added_layer(random: Random) -> dict[str, Array]:
    feeds = _layer(random)
    shape = (*feeds["x"].shape[:-1], len(feeds["bias"]))
    return feeds | {"residual": random.normal(0, 1, shape).astype(np.float32)}


def _layer_of_rows(random: Random) -> dict[str, Array]:
    """A layer whose columns gate each other: half as many columns of y."""
    feeds = _layer(random)
    n = len(feeds["bias"]) // 2 * 2 + 2
    k, rows = feeds["x"].shape[-1], feeds["x"].shape[:-1]
    return feeds | {
        "x_scale": random.uniform(0.01, 0.03, (*rows, 1)).astype(np.float32),
        "weight": random.integers(-128, 128, (k, n), np.int8),
        "weight_scale": (random.uniform(0.5, 1, n) / (80 * np.sqrt(k))).astype(np.float32),
        "bias": random.normal(0, 1, n).astype(np.float32),
        "residual": random.normal(0, 1, (*rows, n // 2)).astype(np.float32),
    }


def _rows_of_numbers(random: Random) -> dict[str, Array]:
    x = _stream(random)
    return {"x": x["x"], "weight": x["weight"]}


def _float(value: float) -> Array:
    return np.array(value, np.float32)


def _bytes(random: Random, *shape: int) -> Array:
    return np.asarray(random.integers(0, 256, shape), np.uint8)


def _attention(random: Random, step: float) -> dict[str, Array]:
    """Causal; q, k and v are columns of one tensor, the output of one fused projection."""
    batch, tokens = int(random.integers(1, 4)), int(random.integers(1, 90))
    qkv = _bytes(random, batch, tokens, 3 * 96)
    return {
        "q": qkv, "q_scale": _float(0.002), "q_zero": _bytes(random), "k": qkv, "k_scale": _float(0.02),
        "v": qkv, "v_scale": _float(0.02), "p_scale": _float(step),
        "mask": np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1),
        "y_scale": random.uniform(0.012, 0.03, 96).astype(np.float32), "y_zero": _bytes(random, 96),
    }  # fmt: skip


def _rotary(random: Random) -> dict[str, Array]:
    """Causal; four heads of q and two of k and v are columns of one tensor."""
    batch, tokens = int(random.integers(1, 4)), int(random.integers(1, 50))
    qkv = random.normal(0, 1, (batch, tokens, 8 * 12)).astype(np.float32)
    angle = random.uniform(-3, 3, (tokens, 12))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    weight = random.uniform(0.3, 1, (2, 12)).astype(np.float32)
    return {
        "q": qkv, "k": qkv, "v": qkv, "q_weight": weight[0], "k_weight": weight[1],
        "q_cos": cos, "q_sin": sin, "k_cos": cos, "k_sin": sin,
        "mask": np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1),
    }  # fmt: skip


def _stream(random: Random) -> dict[str, Array]:
    rows, width = int(random.integers(1, 30)), int(random.integers(1, 300))
    x, residual = random.normal(0, 1, (2, rows, width)).astype(np.float32)
    weight, bias = random.normal(0, 1, (2, width)).astype(np.float32)
    scale = {"y_scale": _float(0.03), "y_zero": _bytes(random)}
    return {"x": x, "residual": residual, "weight": weight, "bias": bias} | scale


def _pixels(random: Random) -> dict[str, Array]:
    """Pictures of at least 14 x 14 pixels, the largest patch."""
    batch, height, width = (int(side) for side in random.integers((1, 14, 14), (5, 70, 70)))
    x = random.normal(0, 1, (batch, 3, height, width)).astype(np.float32)
    return {"x": x, "y_scale": _float(0.02), "y_zero": _bytes(random)}


def _convolved(random: Random) -> dict[str, Array]:
    """Whole and partial strips and tiles; one whole and one partial block of channels. Results are about 1."""
    return {
        "x": _bytes(random, *(int(random.integers(1, limit)) for limit in (3, 12, 60)), 80),
        "x_scale": _float(0.02), "x_zero": _bytes(random),
        "weight": random.integers(-128, 128, (3, 3, 80), np.int8),
        "weight_scale": (random.uniform(0.5, 1, 80) / 240).astype(np.float32),
        "bias": random.normal(0, 1, 80).astype(np.float32),
        "y_scale": random.uniform(0.01, 0.03, 80).astype(np.float32), "y_zero": _bytes(random, 80),
    }  # fmt: skip


def _bytes_of_a_picture(random: Random) -> dict[str, Array]:
    return {"x": _bytes(random, *(int(random.integers(1, limit)) for limit in (3, 12, 20, 100)))}


def _looked_up(random: Random) -> dict[str, Array]:
    """Fewer and more bytes than a vector holds."""
    return {"x": _bytes(random, int(random.integers(1, 9)), int(random.integers(1, 90))), "table": _bytes(random, 256)}


def _added(random: Random) -> dict[str, Array]:
    """Fewer and more numbers than a block holds. a has one scale; b and y have one for each of 80 columns."""
    shape = (int(random.integers(1, 9)), int(random.integers(1, 9)), 80)
    return {
        "a": _bytes(random, *shape), "a_scale": _float(0.02), "a_zero": _bytes(random),
        "b": _bytes(random, *shape), "b_scale": random.uniform(0.01, 0.03, 80).astype(np.float32),
        "b_zero": _bytes(random, 80),
        "y_scale": random.uniform(0.02, 0.05, 80).astype(np.float32), "y_zero": _bytes(random, 80),
    }  # fmt: skip


def _tensor(dtype: Literal["float32", "uint8"], *shape: int | str) -> Tensor:
    return Tensor(dtype=dtype, shape=shape)


_CLIP: dict[str, Attribute] = {"gamma": -0.003, "zeta": 1.003}
_RESIZE: dict[str, Attribute] = {
    "size": (48, 40),
    "shortest": 56,
    "gain": (0.02, 0.01, 0.03),
    "bias": (-2.5, 0.4, 1.0),
}
_GELU: dict[str, Attribute] = {"activation": ACTIVATIONS.index("gelu")}
_HEADS: dict[str, Attribute] = {"heads": 2, "width": 96, "q_start": 0, "k_start": 96, "v_start": 192}


def _quantizer(name: str, *shape: int | str) -> Tensors:
    """Scale and zero point of the tensor ``name``: one number each, or one for each channel."""
    return {f"{name}_scale": _tensor("float32", *shape), f"{name}_zero": _tensor("uint8", *shape)}


_FLOATS, _BYTES = _tensor("float32", "R", "C"), _tensor("uint8", "R", "C")
_TOKENS, _ADDED = _tensor("uint8", "B", "T", "K"), _tensor("float32", "B", "T", "N")
_GROUPED: dict[str, Attribute] = {
    "heads": 4, "groups": 2, "dims": 12, "k_start": 48, "v_start": 72,
}  # fmt: skip
_STREAM = _tensor("float32", "R", "W")
_TERM = _tensor("uint8", "B", "T", 80)
_HEADED = _quantizer("y", 96) | {"mask": _tensor("float32", "T", "T")}

TABLE = (
    Row(spec.SOFTMAX, reference.softmax, 1e-6, (
        Probe("softmax", _rows, {}, {"x": _FLOATS}, {"y": _FLOATS}),
        Probe("clipped_softmax", _rows, _CLIP, {"x": _FLOATS}, {"y": _FLOATS}),
    )),
    Row(spec.SOFT_NMS, _suppressed, 1e-5, (Probe("soft_nms", _boxes),)),
    Row(spec.IMAGE_TO_PIXELS, reference.image_to_pixels, 0, (
        Probe("image_to_pixels", _picture, _RESIZE, {}, {"pixels": _tensor("float32", 1, 3, 48, 40)}),
    )),
    Row(spec.IMAGE_TO_QUANTIZED_PIXELS, reference.image_to_quantized_pixels, 0, (
        Probe("image_to_quantized_pixels", _picture, _RESIZE | {"scale": 0.02, "zero_point": 120}, {},
              {"pixels": _tensor("uint8", 1, 3, 48, 40)}),
    )),
    # a tolerance of 1 for uint8: next to a tie an answer may be one step off
    Row(spec.QUANT_LINEAR, reference.quant_linear, 1, (
        Probe("quant_linear", _quantized_layer, _GELU, {"x": _TOKENS} | _quantizer("y", "N"),
              {"y": _tensor("uint8", "B", "T", "N")}),
    )),
    Row(spec.QUANT_LINEAR_TO_FLOAT, reference.quant_linear_to_float, 1e-5, (
        Probe("quant_linear_to_float", _added_layer, _GELU, {"x": _TOKENS, "residual": _ADDED}, {"y": _ADDED}),
    )),
    Row(spec.QUANT_ROWS_LINEAR, reference.quant_rows_linear, 1e-5, (
        Probe("quant_rows_linear", _layer_of_rows, {"activation": ACTIVATIONS.index("silu"), "gated": 1},
              {"x": _TOKENS, "x_scale": _tensor("float32", "B", "T", 1), "residual": _ADDED}, {"y": _ADDED}),
    )),
    Row(spec.QUANT_POINTWISE, reference.quant_pointwise, 1, (
        Probe("quant_pointwise", _pointwise, {}, _quantizer("y") | {"x": _tensor("uint8", "B", "H", "W", "K")},
              {"y": _tensor("uint8", "B", "H", "W", "N")}),
    )),
    Row(spec.QUANT_CONV, reference.quant_conv, 1, (
        Probe("quant_conv", _windowed, {"strides": (2, 1), "pads": (2, 1, 0, 1)}, _quantizer("y")),
    )),
    Row(spec.QUANT_ATTENTION, reference.quant_attention, 1, (
        Probe("quant_attention", lambda random: _attention(random, 0), _HEADS, _HEADED),
        Probe("clipped_quant_attention", lambda random: _attention(random, 1 / 255), _HEADS | _CLIP, _HEADED),
    )),
    Row(spec.ROTARY_ATTENTION, reference.rotary_attention, 2e-5, (
        Probe("rotary_attention", _rotary, _GROUPED | _CLIP | {"cap": 5.0},
              {name: _tensor("float32", "T", 12) for name in ("q_cos", "q_sin", "k_cos", "k_sin")}
              | {"mask": _tensor("float32", "T", "T")}, {"y": _tensor("float32", "B", "T", 48)}),
    )),
    Row(spec.QUANT_LAYER_NORM, reference.quant_layer_norm, 1, (
        Probe("quant_layer_norm", _stream, {}, {"x": _STREAM, "residual": _STREAM} | _quantizer("y"),
              {"y": _tensor("uint8", "R", "W"), "normed": _STREAM, "sum": _STREAM}),
    )),
    Row(spec.QUANT_ROWS, reference.quant_rows, 1, (
        Probe("quant_rows", _rows_of_numbers, {}, {"x": _STREAM},
              {"y": _tensor("uint8", "R", "W"), "scale": _tensor("float32", "R", 1)}),
        Probe("normalized_quant_rows", _rows_of_numbers, {"normalize": 1}, {"x": _STREAM},
              {"y": _tensor("uint8", "R", "W"), "scale": _tensor("float32", "R", 1)}),
    )),
    Row(spec.QUANT_PATCHES, reference.quant_patches, 1, (
        Probe("quant_patches", _pixels, {"patch": (14, 14)}),
        Probe("overlapping_quant_patches", _pixels, {"patch": (3, 3), "strides": (2, 2), "pads": (0, 1, 1, 0)}),
    )),
    Row(spec.QUANT_DEPTHWISE, reference.quant_depthwise, 1, (
        Probe("quant_depthwise", _convolved, {"strides": (2, 1), "pads": (2, 1, 0, 1), "group": 80},
              {"x": _tensor("uint8", "B", "H", "W", 80)} | _quantizer("x") | _quantizer("y", 80),
              {"y": _tensor("uint8", "B", "h", "w", 80)}),
    )),
    Row(spec.QUANT_MAX_POOL, reference.quant_max_pool, 0, (
        Probe("quant_max_pool", _bytes_of_a_picture, {"window": (3, 2), "strides": (2, 1), "pads": (1, 0, 2, 1)}),
    )),
    Row(spec.QUANT_LOOKUP, reference.quant_lookup, 0, (
        Probe("quant_lookup", _looked_up, {}, {"x": _BYTES}, {"y": _BYTES}),
    )),
    Row(spec.QUANT_ADD, reference.quant_add, 1, (
        Probe("quant_add", _added, {},
              {"a": _TERM, "b": _TERM} | _quantizer("a") | _quantizer("b", 80) | _quantizer("y", 80), {"y": _TERM}),
    )),
)  # fmt: skip

OPS = tuple(row.op for row in TABLE)
