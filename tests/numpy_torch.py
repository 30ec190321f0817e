"""The functions of torch and torchvision that the operators' tests call, in numpy's float64.

torch for aarch64 is 400 MB and takes a minute to import in an emulator. `stand_in` puts these under its name where
torch is not installed, which is in `tests.aarch64` alone; tests/test_aarch64.py compares each with torch's.
"""

import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np


class Tensor(np.ndarray):
    """An array with the methods of torch's tensors, where their names or arguments differ from numpy's."""

    def numpy(self) -> Any:
        return self.view(np.ndarray)

    def double(self) -> Any:
        return self.astype(np.float64)

    def numel(self) -> int:
        return self.size

    def abs(self) -> Any:
        return np.abs(self)

    def permute(self, *axes: int) -> Any:
        return np.transpose(self, axes)

    def transpose(self, *axes: Any) -> Any:
        return self.swapaxes(*axes)

    def flatten(self, first: Any = 0, last: int = -1) -> Any:
        last %= self.ndim
        return self.reshape(*self.shape[:first], -1, *self.shape[last + 1 :])

    def unflatten(self, axis: int, sides: Sequence[int]) -> Any:
        return self.reshape(*self.shape[:axis], *sides, *self.shape[axis + 1 :])

    def expand(self, *shape: int) -> Any:
        return np.broadcast_to(self, shape, subok=True)

    def amax(self, axis: int, keepdim: bool = False) -> Any:
        return np.maximum.reduce(self.numpy(), axis=axis, keepdims=keepdim).view(Tensor)  # type: ignore[call-overload]

    def sum(self, axis: Any = None, keepdim: bool = False) -> Any:  # type: ignore[override]  # torch's names
        return np.add.reduce(self.numpy(), axis=axis, keepdims=keepdim)[...].view(Tensor)  # type: ignore[call-overload]

    def clamp(self, min: float | None = None, max: float | None = None) -> Any:  # torch's names
        return clamp(self, min, max)

    def softmax(self, axis: int) -> Any:
        return softmax(self, axis)

    def chunk(self, count: int, axis: int) -> Any:
        return np.split(self, count, axis)


def tensor(x: Any, dtype: Any = None) -> Any:
    return np.asarray(x, dtype).view(Tensor)


def from_numpy(x: Any) -> Any:
    return x.view(Tensor)


def ones(*shape: int) -> Any:
    return np.ones(shape).view(Tensor)


def softmax(x: Any, axis: int) -> Any:
    powers = np.exp(x - np.maximum.reduce(x, axis=axis, keepdims=True))
    return powers / np.add.reduce(powers, axis=axis, keepdims=True)


def clamp(x: Any, min: float | None = None, max: float | None = None) -> Any:  # torch's names
    return x if min is None and max is None else np.clip(x, min, max)


def sigmoid(x: Any) -> Any:
    return (1 + np.tanh(x / 2)) / 2


def relu(x: Any) -> Any:
    return np.maximum(x, 0)


def gelu(x: Any, approximate: str = "none") -> Any:
    if approximate == "tanh":
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2)) / 2


def silu(x: Any) -> Any:
    return x * sigmoid(x)


def pad(x: Any, sides: Sequence[int]) -> Any:
    """Zeros around the last two axes; ``sides``: before and behind the last axis, then those of the one before."""
    left, right, top, bottom = sides
    return np.pad(x, [(0, 0)] * (x.ndim - 2) + [(top, bottom), (left, right)]).view(Tensor)


def _windows(x: Any, window: Sequence[int], stride: Sequence[int]) -> Any:
    """[B, C, H, W] -> [B, C, rows, columns, h, w]"""
    views = np.lib.stride_tricks.sliding_window_view(x.view(np.ndarray), tuple(window), (2, 3))
    return views[:, :, :: stride[0], :: stride[1]]


def unfold(x: Any, window: Sequence[int], stride: Sequence[int]) -> Any:
    """[B, C, H, W] -> [B, C h w, places]"""
    windows = _windows(x, window, stride)
    batch, channels, rows, columns, high, wide = windows.shape
    ordered = windows.transpose(0, 1, 4, 5, 2, 3).reshape(batch, channels * high * wide, rows * columns)
    return ordered.view(Tensor)


def max_pool2d(x: Any, window: Sequence[int], stride: Sequence[int]) -> Any:
    return _windows(x, window, stride).max((-2, -1)).view(Tensor)


def layer_norm(x: Any, shape: Sequence[int], weight: Any, bias: Any, epsilon: float) -> Any:
    centred = x - np.add.reduce(x, axis=-1, keepdims=True) / shape[-1]
    variance = np.add.reduce(centred**2, axis=-1, keepdims=True) / shape[-1]
    return centred / np.sqrt(variance + epsilon) * weight + bias


def rms_norm(x: Any, shape: Sequence[int], weight: Any, epsilon: float) -> Any:
    return x / np.sqrt(np.add.reduce(x**2, axis=-1, keepdims=True) / shape[-1] + epsilon) * weight


def scaled_dot_product_attention(q: Any, k: Any, v: Any, scale: float) -> Any:
    return softmax(scale * (q @ k.swapaxes(-1, -2)), -1) @ v


def nms(boxes: Any, scores: Any, threshold: float) -> Any:
    """torchvision's, in the boxes' type."""
    boxes, left, kept = boxes.view(np.ndarray), np.argsort(-scores.view(np.ndarray), kind="stable"), []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while left.size:
        best, left = left[0], left[1:]
        kept.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = np.prod(np.maximum(high - low, 0), -1)
        left = left[shared / (areas[best] + areas[left] - shared) <= threshold]
    return tensor(kept)


TORCH = {
    "cat": lambda parts, axis=0: np.concatenate(parts, axis).view(Tensor), "clamp": clamp,
    "einsum": lambda *of: np.einsum(*of).view(Tensor), "exp": np.exp, "float64": np.float64,
    "from_numpy": from_numpy, "ones": ones, "relu": relu, "round": np.rint, "sigmoid": sigmoid,
    "softmax": softmax, "tanh": np.tanh, "tensor": tensor,
    "where": lambda condition, x, y: tensor(np.where(condition, x, y)),
}  # fmt: skip
FUNCTIONAL = {
    function.__name__: function
    for function in (gelu, layer_norm, max_pool2d, pad, rms_norm, scaled_dot_product_attention, silu, unfold)
}


def stand_in() -> None:
    """Under the name torch, where there is none."""
    if "torch" not in sys.modules and find_spec("torch") is None:
        torch, nn, functional = (ModuleType(name) for name in ("torch", "torch.nn", "torch.nn.functional"))
        vars(torch).update(TORCH | {"nn": nn})
        vars(nn).update({"functional": functional})
        vars(functional).update(FUNCTIONAL)
        vision, ops = ModuleType("torchvision"), ModuleType("torchvision.ops")
        vars(vision).update({"ops": ops})
        vars(ops).update({"nms": nms})
        sys.modules |= {module.__name__: module for module in (torch, nn, functional, vision, ops)}
