"""What attention does beside softmax(q k^T) v: a clipped softmax, a gate on each head, or both (`AttentionSpec`).

    clipped   p = clip((zeta - gamma) softmax(x) + gamma, 0, 1)                  gamma <= 0, zeta >= 1; equation 4
    gated     out = gate_scale * sigmoid(logits(x)) * (p v), head by head        section 4.2

x is what the attention reads: behind the norm in a pre-norm block. With either a head can answer nothing for a token
without large logits, and so without the outliers that those need. Rows of a clipped softmax do not sum to 1.

Source: Bondarenko et al. 2023 (arXiv 2306.12929). The logits [B, T, H] of a gate, by the tensors under ``gate.``:

    per_head    logits [H]                                               the same for every token
    linear      weight [H, d]   bias [H]                                 head h sees its own d numbers of x alone
    mlp         hidden.weight [H, n, d]  hidden.bias [H, n]  weight [H, n]  bias [H]      ReLU between; as linear
    all_heads   weight [H, W]   bias [H]                                 every head sees all W = H d numbers
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calmclip.models.errors import BadRequest, UnknownCheckpoint

GateKind = Literal["none", "linear", "mlp", "all_heads", "per_head"]
GATES: tuple[GateKind, ...] = ("none", "linear", "mlp", "all_heads", "per_head")
KEYS = ("attn_softmax", "alpha", "max_seq_length", "attn_gate_scale", "fine_tuning", "attn_gate_init")  # of a config
_CLIPPED = re.compile(r"clipped\(([^:()]+):([^:()]+)\)")


@dataclass(frozen=True)
class Softmax:
    """clip((zeta - gamma) softmax(x) + gamma, 0, 1); the plain one with 0 and 1."""

    gamma: float = 0.0
    zeta: float = 1.0

    def __post_init__(self) -> None:
        if not (-1.0 < self.gamma <= 0.0 and 1.0 <= self.zeta < 2.0):
            raise BadRequest(f"gamma is {self.gamma:g} and zeta {self.zeta:g}; expected -1 < gamma <= 0, 1 <= zeta < 2")

    @property
    def clipped(self) -> bool:
        return (self.gamma, self.zeta) != (0.0, 1.0)

    @classmethod
    def of_length(cls, alpha: float, length: int) -> "Softmax":
        """gamma = -alpha / length, where ``length`` is that of the training's rows: a constant of the checkpoint."""
        return cls(gamma=-alpha / length)

    @classmethod
    def parse(cls, text: str) -> "Softmax":
        """Of "vanilla" or "clipped(gamma:zeta)", the names of the paper's code. Raises `BadRequest`."""
        if text == "vanilla":
            return cls()
        found = _CLIPPED.fullmatch(text.replace(" ", ""))
        try:
            return cls(*map(float, found.groups())) if found else cls(float("nan"))
        except (BadRequest, ValueError):
            raise BadRequest(
                f"softmax is {text!r}; expected vanilla, or clipped(gamma:zeta) with -1 < gamma <= 0 and 1 <= zeta "
                "< 2, for example clipped(-0.025:1)"
            ) from None

    def __str__(self) -> str:
        return f"clipped({_short(self.gamma)}:{_short(self.zeta)})" if self.clipped else "vanilla"

    def __call__(self, logits: Tensor) -> Tensor:
        chances = logits.softmax(dim=-1)
        if not self.clipped:
            return chances
        return (chances * (self.zeta - self.gamma) + self.gamma).clamp(0.0, 1.0)


@dataclass(frozen=True)
class AttentionSpec:
    """``gate_scale`` multiplies the gate: 1 / pi of one that was put into a trained net and starts at pi, so that the
    net starts as it was. Which gate there is, its tensors say."""

    softmax: Softmax = field(default_factory=Softmax)
    gate_scale: float = 1.0

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str = "config.json") -> "AttentionSpec":
        """By the keys of a checkpoint's config, none of which is guessed: ``attn_softmax``, or ``alpha`` and
        ``max_seq_length`` (which win); ``attn_gate_scale``, or ``fine_tuning`` and ``attn_gate_init``.

        Raises `UnknownCheckpoint` naming the key.
        """
        given = {name: value for name, value in config.items() if value is not None}
        try:
            softmax = Softmax.parse(str(given.get("attn_softmax", "vanilla")))
            if "alpha" in given:
                softmax = Softmax.of_length(float(given["alpha"]), int(given["max_seq_length"]))
            scale = 1.0
            if given.get("fine_tuning") and "attn_gate_init" in given:
                scale = 1.0 / float(given["attn_gate_init"])
            scale = float(given.get("attn_gate_scale", scale))
            if not (math.isfinite(scale) and scale > 0):
                raise BadRequest(f"attn_gate_scale is {scale:g}; expected a number above 0")
        except KeyError:
            raise UnknownCheckpoint(
                f"{where}: alpha without max_seq_length; gamma is -alpha / max_seq_length, the length of the "
                "training's rows"
            ) from None
        except (BadRequest, TypeError, ValueError, ArithmeticError) as error:
            raise UnknownCheckpoint(f"{where}: attention: {error}") from None
        return cls(softmax, scale)

    def written(self) -> dict[str, Any]:
        """The keys of a config that say it."""
        found: dict[str, Any] = {}
        if self.softmax.clipped:
            found["attn_softmax"] = str(self.softmax)
        if self.gate_scale != 1.0:
            found["attn_gate_scale"] = self.gate_scale
        return found


class Gate(nn.Module):
    """x [B, T, W] -> sigmoid of the logits, [B, H, T, 1]. Once folded, each head's own numbers are picked by a matrix
    that holds zeros for the others': one product for all heads."""

    def __init__(self, state: Mapping[str, Tensor], heads: int, width: int) -> None:
        super().__init__()
        self.kind = kind(state, heads, width)
        each = width // heads
        if self.kind == "per_head":
            self.logits = nn.Parameter(torch.empty(heads))
            return
        inputs = width if self.kind == "all_heads" else each
        if self.kind == "mlp":
            inputs = state["hidden.weight"].shape[1]
            self.hidden = nn.Module()
            self.hidden.weight = nn.Parameter(torch.empty(heads, inputs, each))
            self.hidden.bias = nn.Parameter(torch.empty(heads, inputs))
        self.weight = nn.Parameter(torch.empty(heads, inputs))
        self.bias = nn.Parameter(torch.empty(heads))
        self.folded = False

    def fold(self) -> None:
        """Blocks on a diagonal, zeros beside them, stored so that a product takes them as they are."""
        if self.kind == "per_head":
            return
        if self.kind == "mlp":
            self.hidden.weight = _fixed(torch.block_diag(*self.hidden.weight).T)
            self.hidden.bias = _fixed(self.hidden.bias.flatten())
        whole = self.weight if self.kind == "all_heads" else torch.block_diag(*self.weight[:, None])
        self.weight, self.bias = _fixed(whole.T), _fixed(self.bias)
        self.folded = True

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "per_head":
            return self.logits.sigmoid()[:, None, None]
        return self.scores(x).sigmoid().transpose(1, 2).unsqueeze(-1)

    def scores(self, x: Tensor) -> Tensor:
        """[B, T, H]."""
        if self.folded:
            if self.kind == "mlp":
                x = torch.relu(x @ self.hidden.weight + self.hidden.bias)
            return x @ self.weight + self.bias
        if self.kind != "all_heads":
            x = x.unflatten(-1, (len(self.weight), -1))
        if self.kind == "mlp":
            x = torch.relu(torch.einsum("bthd,hnd->bthn", x, self.hidden.weight) + self.hidden.bias)
        if self.kind == "all_heads":
            return x @ self.weight.T + self.bias
        return (x * self.weight).sum(dim=-1) + self.bias


def kind(state: Mapping[str, Tensor], heads: int, width: int) -> GateKind:
    """Which gate the tensors under ``gate.`` are, by their names and shapes. Raises `KeyError`: one is missing."""
    if not state:
        return "none"
    if "logits" in state:
        return "per_head"
    if {"hidden.weight", "hidden.bias"} & state.keys():
        return "mlp"
    return "all_heads" if state["weight"].shape[-1] == width and heads > 1 else "linear"


def new_gate(
    kind: GateKind, heads: int, width: int, start: float = 0.5, hidden: int | None = None
) -> dict[str, Tensor]:
    """Tensors under ``gate.`` for a net that is to be trained, by which the gate is ``start`` whatever it reads: with
    ``gate_scale`` 1 / ``start`` a trained net starts as it was. The paper draws weights of N(0, 0.01) instead of 0.

    ``hidden``: of mlp, a quarter of a head where it is not given, at least 4. Raises `BadRequest` for a ``start``
    outside 0 to 1.
    """
    if not 0 < start < 1:
        raise BadRequest(f"a gate starts at {start}; expected a number between 0 and 1")
    bias, each = torch.full((heads,), math.log(start / (1 - start))), width // heads
    inner = hidden or max(4, each // 4)
    inputs = {"linear": each, "mlp": inner, "all_heads": width}
    if kind == "none":
        return {}
    if kind == "per_head":
        return {"logits": bias}
    found = {"weight": torch.zeros(heads, inputs[kind]), "bias": bias}
    if kind == "mlp":
        found["hidden.weight"] = torch.randn(heads, inner, each) * each**-0.5
        found["hidden.bias"] = torch.zeros(heads, inner)
    return found


def _short(number: float) -> str:
    """As short as it can be and be read as the same number."""
    return short if float(short := f"{number:g}") == number else repr(number)


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().contiguous(), requires_grad=False)
