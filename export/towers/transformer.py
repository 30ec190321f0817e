"""Pre-norm transformer blocks. One product computes q, k and v; the scale of attention is folded into its weights.

Source: Vaswani et al. 2017 (arXiv 1706.03762); pre-norm: Radford et al. 2021 (arXiv 2103.00020), section 2.4;
norms of q and k: Dehghani et al. 2023 (arXiv 2302.05442); experts: CLIP-MoE, Zhang et al. 2024 (arXiv 2409.19291).

Tokens are float32 [B, T, W]. A mask is float32 and is added to the logits [B, H, T, T]: 0, or -inf for hidden tokens.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.towers import State, Style, count, part
from calmclip.export.towers.attention import Gate, Softmax
from calmclip.export.towers.modules import Identity, LayerNorm, Linear, Module, constant, first, rows

Pick = Callable[[Tensor], Tensor]  # x [B, T, W] -> [B, 1, W]: one token of each row
Mask = Tensor | None  # added to the logits of attention
Kind = type[Module]  # of a block
Kinds = tuple[Kind, Kind]  # of all blocks but the last, and of the last


class QuickGELU(Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
}


def linear(state: State, name: str, inputs: int, outputs: int | None = None, *, bias: bool = True) -> Linear:
    """A layer without values yet. ``outputs``: None is the number of outputs that ``name`` has in ``state``."""
    return Linear(inputs, outputs or state[f"{name}.weight"].shape[0], bias=bias)


def norm(state: State, name: str, width: int, eps: float) -> LayerNorm | Identity:
    return LayerNorm(width, eps=eps) if f"{name}.weight" in state else Identity()


def projection(state: State, width: int) -> Linear | Identity:
    """The layer that turns the pooled token into the vector, with or without a bias."""
    bias = "projection.bias" in state
    return linear(state, "projection", width, bias=bias) if "projection.weight" in state else Identity()


PLAIN = Softmax()
MASKED = -1e4  # added to a padded token's logits: its float32 weight after the softmax is exactly 0


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Mask = None, softmax: Softmax = PLAIN, gate: Tensor | None = None
) -> Tensor:
    """q [B, S, W], already scaled, and k, v [B, T, W]; ``gate`` [B, H, S, 1] -> [B, S, W]."""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2)
    if mask is not None:
        logits = logits + mask
    answers = softmax(logits) @ v
    if gate is not None:
        answers = answers * gate
    return answers.transpose(1, 2).flatten(-2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, W] -> [B, H, T, W / H]"""
    return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)


class Attention(Module):
    """Attention in two forms: for training, and after `fold` for tracing."""

    attends = 1  # Softmax ops in its graph
    gain: Tensor | None = None  # [B, T, 1], a factor of the values while `towers.attribution` differentiates by it

    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        self.heads, self.softmax = style.heads, style.attention.softmax
        self.scale, self.gate_scale = (width // style.heads) ** -0.5, style.attention.gate_scale
        gate = part(state, "gate.")
        self.gate = Gate(gate, style.heads, width, style.attention.gate_mean) if gate else None
        style.attention.check_gate("none" if self.gate is None else self.gate.kind)
        self.qkv = linear(state, "qkv", width, 3 * width)
        self.out = linear(state, "out", width, width)
        self.qk_norm = "q_norm.weight" in state
        if self.qk_norm:  # per head
            self.q_norm = LayerNorm(width // style.heads, eps=style.qk_eps)
            self.k_norm = LayerNorm(width // style.heads, eps=style.qk_eps)

    def fold(self) -> None:
        """Fold the scale d^-1/2 of the logits into the layer that computes q. Fold the gate's scale, and a gate that is
        the same for every token, into ``out``. Call it once, after the weights are loaded."""
        width = self.out.in_features
        layer = self.q_norm if self.qk_norm else self.qkv
        layer.weight, layer.bias = (_scaled(tensor, width, self.scale) for tensor in (layer.weight, layer.bias))
        self.scale = 1.0
        if self.gate is not None:
            gain = self.out.weight.new_full((width,), self.gate_scale)
            if self.gate.kind == "per_head":
                gain = gain * self.gate.logits.sigmoid().repeat_interleave(width // self.heads)
                self.gate = None
            else:
                self.gate.fold()
            self.out.weight = constant(self.out.weight * gain)
        self.gate_scale = 1.0

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.mix(q, k, v, mask, x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, x: Tensor) -> Tensor:
        """``x``: the tokens that the gate reads: those that q was computed from, or all if it averages over them."""
        q, k = self.normed(q, k)
        q = q if self.scale == 1.0 else q * self.scale
        v = v if self.gain is None else v * self.gain
        gate = None if self.gate is None else self.gate(x, valid(mask) if self.gate.mean else None)
        gate = gate if gate is None or self.gate_scale == 1.0 else gate * self.gate_scale
        return self.out(attend(q, k, v, self.heads, mask, self.softmax, gate))

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k after their norms, where a checkpoint has them."""
        if not self.qk_norm:
            return q, k
        q = self.q_norm(torch.unflatten(q, -1, (self.heads, -1))).flatten(-2)
        return q, self.k_norm(torch.unflatten(k, -1, (self.heads, -1))).flatten(-2)


class MLP(Module):
    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        self.up, self.act = linear(state, "up", width), ACTIVATIONS[style.activation]()
        self.down = linear(state, "down", self.up.out_features, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Experts(Module):
    """p = softmax(gate(x)) over experts. The answers of the ``top`` best are summed with p, renormalized to sum 1.

    Dense: every expert computes every token, and the others have the weight 0. Routed: an expert computes only its own
    tokens, which are gathered and added back. Both are exact.
    """

    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        number = count(state, "experts.")
        self.top, self.routed = min(style.top, number), style.routed
        self.gate = linear(state, "gate", width, number, bias=False)
        self.experts = nn.ModuleList(MLP(part(state, f"experts.{e}."), style, width) for e in range(number))

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.gate(x).softmax(dim=-1)
        best, indices = probabilities.topk(self.top, dim=-1)
        best = best / best.sum(dim=-1, keepdim=True)
        weights = torch.zeros_like(probabilities).scatter(-1, indices, best)
        if self.routed:
            return self.route(x.flatten(0, 1), weights.flatten(0, 1)).reshape(x.shape)
        return cast(Tensor, sum(weights[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts)))

    def route(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [N, W], weights [N, E] with 0 for the experts that are not chosen -> [N, W]."""
        total = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            routed = weights[:, e].nonzero()[:, 0]
            answers = expert(x.index_select(0, routed)) * weights[:, e].index_select(0, routed)[:, None]
            total = total.index_add(0, routed, answers)
        return total


class Block(Module):
    """x' = x + attention(norm1(x)); x' + mlp(norm2(x'))."""

    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width, eps=style.eps), LayerNorm(width, eps=style.eps)
        self.attn = Attention(part(state, "attn."), style, width)
        mixture = "mlp.gate.weight" in state
        self.mlp = (Experts if mixture else MLP)(part(state, "mlp."), style, width)

    def fold(self) -> None:
        self.attn.fold()

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        return self.finish(x, self.attn(self.read(x), mask))

    def read(self, x: Tensor) -> Tensor:
        """The input of attention."""
        return self.norm1(x)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's answer, from x and the answer of attention."""
        x = x + attended
        return x + self.mlp(self.norm2(x))


class LastBlock(Block):
    """The last block, for one token per row. The other tokens need k and v only.

    ``pick`` takes that token, and ``mask`` is its row. The answer [B, 1, W] equals `Block`, then ``pick``; before
    `fold` that is how it is computed.
    """

    folded = False

    def fold(self) -> None:
        super().fold()
        width = self.attn.out.in_features
        self.q, self.kv = rows(self.attn.qkv, 0, width), rows(self.attn.qkv, width, 3 * width)
        del self.attn.qkv
        self.folded = True

    def forward(self, x: Tensor, mask: Mask = None, pick: Pick = first) -> Tensor:
        if not self.folded:
            return pick(super().forward(x, mask))
        tokens = self.read(x)
        k, v = self.kv(tokens).chunk(2, dim=-1)
        x = pick(x)
        inputs = self.read(x)
        averages = self.attn.gate is not None and self.attn.gate.mean
        return self.finish(x, self.attn.mix(self.q(inputs), k, v, mask, tokens if averages else inputs))


class Blocks(nn.ModuleList):
    """Blocks in order. Each is called with the tokens and the mask."""

    def fold(self) -> None:
        block: Any
        for block in self:
            block.fold()

    def before_last(self, x: Tensor, mask: Mask = None) -> tuple[Tensor, Callable[..., Tensor]]:
        """The input of the last block, and that block."""
        *others, last = self
        for block in others:
            x = block(x, mask)
        return x, last


def blocks(
    state: State,
    style: Style,
    width: int,
    one_token: bool,
    kinds: Kinds = (Block, LastBlock),
    mixer: Kind | None = None,
) -> Blocks:
    """``state`` holds {i}.norm1.weight and so on. ``one_token``: the last block is of the second of ``kinds``. A block
    with the tensor mix.scale is of the class ``mixer``."""
    parts = [part(state, f"{i}.") for i in range(count(state, ""))]
    classes = [kinds[0]] * (len(parts) - 1) + [kinds[one_token]]
    classes = [
        mixer if mixer and "mix.scale" in tensors else kind for tensors, kind in zip(parts, classes, strict=False)
    ]
    return Blocks(kind(tensors, style, width) for tensors, kind in zip(parts, classes, strict=True))


class Words(Module):
    """x [B, T, W] -> a logit for each word, [B, T, V], by its own weights or by the table of token embeddings."""

    def __init__(self, state: State, tokens: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(tokens.weight)) if "weight" in state else None
        self.bias = nn.Parameter(torch.empty(tokens.num_embeddings)) if "bias" in state else None

    def fold(self, table: Tensor) -> None:
        """Copy the table, so that a quantizer rounds these weights apart from the embeddings."""
        self.weight = constant(table.clone() if self.weight is None else self.weight)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return F.linear(x, table if self.weight is None else self.weight, self.bias)


def hide(valid: Tensor) -> Tensor:
    """``valid`` [B, T], 1 for tokens and 0 for padding -> the mask [B, 1, 1, T] that hides the padding."""
    return ((1 - valid) * MASKED)[:, None, None, :]


def valid(mask: Mask) -> Tensor | None:
    """The inverse: [B or 1, T], 1 for the tokens that the last query of ``mask`` sees. A causal mask hides no token
    from it, so what it does not see is padding."""
    return None if mask is None else torch.eq(mask[:, 0, -1], 0).to(mask.dtype)


def causal(context: int) -> Tensor:
    """The mask [1, 1, C, C] that hides the tokens after each token."""
    return torch.full((context, context), -torch.inf).triu(1)[None, None]


def _scaled(weights: Tensor, rows: int, scale: float) -> nn.Parameter:
    return constant(torch.cat([weights[:rows] * scale, weights[rows:]]))
