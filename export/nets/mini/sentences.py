"""MiniLM, or the encoder of many languages, and the text head in numpy, float64: the text vectors that become constants
of graphs.

Float32 sums depend on the number of threads and on the instruction set; those of float64, rounded to float32, do not.
The network is that of `minilm` and `towers.TextTower`.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer

from calmclip.export.nets.mini.facts import HEADS, WIDTH
from calmclip.models.flow import Array

_STEP = 1 / 1024  # of the table of erf
_POINTS = np.arange(6 / _STEP + 1) * _STEP  # erf(6) is 1 in float64
_ERF = np.array([math.erf(point) for point in _POINTS])
_SLOPE = 2 / math.sqrt(math.pi) * np.exp(-(_POINTS**2))


def embed(parameters: Mapping[str, Array], tokenizer: bytes, phrases: Sequence[str]) -> Array:
    """``parameters``: those of the text graph (`parameters.text`) -> float32 [len(phrases), 384], unit rows."""
    words = "encoder.words.weight"  # a large table, of which few rows are read
    exact = {name: array if name == words else array.astype(np.float64) for name, array in parameters.items()}
    encoder = Tokenizer.from_str(tokenizer.decode())
    encoder.no_padding()
    rows = [encoding.ids for encoding in encoder.encode_batch(list(phrases))]
    states = np.empty((len(rows), WIDTH))
    for length in {len(row) for row in rows}:  # texts of one length share each product
        group = [index for index, row in enumerate(rows) if len(row) == length]
        states[group] = _mean_states(exact, np.array([rows[index] for index in group]))
    return unit(_linear(exact, "project", unit(states))).astype(np.float32)


def unit(rows: Array) -> Array:
    """Rows divided by their length."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12))


def _mean_states(numbers: Mapping[str, Array], ids: Array) -> Array:
    """ids [N, T] -> [N, 384]."""
    count, tokens = ids.shape
    x = _norm(numbers, "encoder.norm", numbers["encoder.words.weight"][ids] + numbers["encoder.positions"][:tokens])
    for index in range(sum(name.endswith(".qkv.bias") for name in numbers)):
        layer = f"encoder.layers.{index}"
        parts = _linear(numbers, f"{layer}.qkv", x).reshape(count, tokens, 3, HEADS, WIDTH // HEADS)
        query, key, value = parts.transpose(2, 0, 3, 1, 4)  # [N, 12, T, 32] each
        logits = query @ key.transpose(0, 1, 3, 2)
        chances = np.exp(logits - logits.max(-1, keepdims=True))
        mixed = (chances / chances.sum(-1, keepdims=True)) @ value
        mixed = mixed.transpose(0, 2, 1, 3).reshape(count, tokens, WIDTH)
        x = _norm(numbers, f"{layer}.norm1", x + _linear(numbers, f"{layer}.out", mixed))
        inner = _gelu(_linear(numbers, f"{layer}.up", x))
        x = _norm(numbers, f"{layer}.norm2", x + _linear(numbers, f"{layer}.down", inner))
    return np.asarray(x.mean(1))


def _linear(numbers: Mapping[str, Array], name: str, x: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])  # one large product: small ones keep several threads waiting for each other
    result = rows @ numbers[f"{name}.weight"].T + numbers[f"{name}.bias"]
    return np.asarray(result.reshape(*x.shape[:-1], -1))


def _norm(numbers: Mapping[str, Array], name: str, x: Array) -> Array:
    away = x - x.mean(-1, keepdims=True)
    scaled = away / np.sqrt((away**2).mean(-1, keepdims=True) + 1e-12)
    return np.asarray(scaled * numbers[f"{name}.weight"] + numbers[f"{name}.bias"])


def _gelu(x: Array) -> Array:
    return np.asarray(x * 0.5 * (1 + erf(x / np.sqrt(2))))


def erf(x: Array) -> Array:
    """The error function within 1e-13: its Taylor series of third order at the nearest point of a table."""
    away = np.minimum(np.abs(x), _POINTS[-1])
    nearest = np.rint(away / _STEP).astype(np.int64)
    point = _POINTS[nearest]
    rest = away - point
    series = rest * (1 + rest * (-point + rest * (2 * point**2 - 1) / 3))
    return np.asarray(np.copysign(_ERF[nearest] + _SLOPE[nearest] * series, x))
