"""Pre-norm transformer blocks: q, k and v from one product, the scale of attention folded into its weights.

Source: Vaswani et al. 2017 (arXiv 1706.03762); pre-norm: Radford et al. 2021 (arXiv 2103.00020), section 2.4;
norms of q and k: Dehghani et al. 2023 (arXiv 2302.05442); experts: CLIP-MoE, Zhang et al. 2024 (arXiv 2409.19291).

Tokens are float32 [B, T, W]. A mask is float32, added to the logits [B, H, T, T]: 0, or -inf for what is not seen.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.towers import State, Style, count, part
from calmclip.export.towers.attention import Gate, Softmax


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
}


def linear(state: State, name: str, inputs: int, outputs: int | None = None, *, bias: bool = True) -> nn.Linear:
    """An empty layer; as many outputs as ``state`` has for ``name`` where that is free."""
    return nn.Linear(inputs, outputs or state[f"{name}.weight"].shape[0], bias=bias)


def projection(state: State, width: int) -> nn.Module:
    """What makes vectors of the pooled token: with or without a bias, or nothing."""
    if "projection.weight" not in state:
        return nn.Identity()
    return linear(state, "projection", width, bias="projection.bias" in state)


PLAIN = Softmax()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None,
    softmax: Softmax = PLAIN,
    gate: Tensor | None = None,
) -> Tensor:
    """q [B, S, W], already scaled, and k, v [B, T, W]; ``gate`` [B, H, S, 1] -> [B, S, W]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2)
    if mask is not None:
        logits = logits + mask
    answers = softmax(logits) @ v
    if gate is not None:
        answers = answers * gate
    return answers.transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    """As it is trained, and once folded as it is traced."""

    attends = 1  # Softmax ops in its graph

    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        self.heads, self.softmax = style.heads, style.attention.softmax
        self.scale, self.gate_scale = (width // style.heads) ** -0.5, style.attention.gate_scale
        own = part(state, "gate.")
        self.gate = Gate(own, style.heads, width) if own else None
        self.qkv = linear(state, "qkv", width, 3 * width)
        self.out = linear(state, "out", width, width)
        self.normed = "q_norm.weight" in state
        if self.normed:  # over each head
            self.q_norm = nn.LayerNorm(width // style.heads, eps=style.qk_eps)
            self.k_norm = nn.LayerNorm(width // style.heads, eps=style.qk_eps)

    def fold(self) -> None:
        """The scale d^-1/2 of the logits goes into what makes q, that of a gate and a gate that is the same for every
        token into the layer behind it. Once, when the weights are in."""
        width = self.qkv.out_features // 3
        layers = [(self.q_norm, width)] if self.normed else [(self.qkv, width)]
        for layer, rows in layers:
            layer.weight = _scaled(layer.weight, rows, self.scale)
            if layer.bias is not None:
                layer.bias = _scaled(layer.bias, rows, self.scale)
        self.scale = 1.0
        if self.gate is not None:
            gain = self.out.weight.new_full((width,), self.gate_scale)
            if self.gate.kind == "per_head":
                gain = gain * self.gate.logits.sigmoid().repeat_interleave(width // self.heads)
                self.gate = None
            else:
                self.gate.fold()
            self.out.weight = nn.Parameter(self.out.weight * gain, requires_grad=False)
        self.gate_scale = 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.mix(q, k, v, mask, x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
        """``x``: what q was made of, by which a gate decides."""
        if self.normed:
            q = self.q_norm(q.unflatten(-1, (self.heads, -1))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (self.heads, -1))).flatten(-2)
        q = q if self.scale == 1.0 else q * self.scale
        gate = None if self.gate is None else self.gate(x)
        gate = gate if gate is None or self.gate_scale == 1.0 else gate * self.gate_scale
        return self.out(attend(q, k, v, self.heads, mask, self.softmax, gate))


class MLP(nn.Module):
    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        self.up, self.act = linear(state, "up", width), ACTIVATIONS[style.activation]()
        self.down = linear(state, "down", self.up.out_features, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Experts(nn.Module):
    """p = softmax(gate(x)) over experts; the `top` best, renormalised to sum 1, mix their answers.

    Dense: every expert answers every token, and what was not chosen counts 0. Routed: an expert's tokens are gathered,
    answered and added where they belong. Both are exact.
    """

    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        number = count(state, "experts.")
        self.top, self.routed = min(style.top, number), style.routed
        self.gate = linear(state, "gate", width, number, bias=False)
        self.experts = nn.ModuleList(MLP(part(state, f"experts.{e}."), style, width) for e in range(number))

    def forward(self, x: Tensor) -> Tensor:
        chances = self.gate(x).softmax(dim=-1)
        best, which = chances.topk(self.top, dim=-1)
        best = best / best.sum(dim=-1, keepdim=True)
        weights = torch.zeros_like(chances).scatter(-1, which, best)
        if self.routed:
            return self.route(x.flatten(0, 1), weights.flatten(0, 1)).reshape(x.shape)
        return sum(weights[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[return-value]

    def route(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [N, W], weights [N, E], 0 for what was not chosen -> [N, W]."""
        found = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            own = weights[:, e].nonzero()[:, 0]
            answers = expert(x.index_select(0, own)) * weights[:, e].index_select(0, own)[:, None]
            found = found.index_add(0, own, answers)
        return found


class Block(nn.Module):
    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=style.eps), nn.LayerNorm(width, eps=style.eps)
        self.attn = Attention(part(state, "attn."), style, width)
        mixture = "mlp.gate.weight" in state
        self.mlp = (Experts if mixture else MLP)(part(state, "mlp."), style, width)

    def fold(self) -> None:
        self.attn.fold()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class LastBlock(Block):
    """The last block for one token a row: of the others only k and v are needed.

    ``own(x) -> [B, 1, W]`` takes that token, ``mask`` is its row. Equal to `Block`, then ``own``; which is what it does
    until it is folded.
    """

    folded = False

    def fold(self) -> None:
        super().fold()
        width = self.attn.out.in_features
        self.q, self.kv = rows(self.attn.qkv, 0, width), rows(self.attn.qkv, width, 3 * width)
        del self.attn.qkv
        self.folded = True

    def forward(self, x: Tensor, own, mask: Tensor | None = None) -> Tensor:  # type: ignore[no-untyped-def, override]
        if not self.folded:
            return own(super().forward(x, mask))
        k, v = self.kv(self.norm1(x)).chunk(2, dim=-1)
        x = own(x)
        seen = self.norm1(x)
        x = x + self.attn.mix(self.q(seen), k, v, mask, seen)
        return x + self.mlp(self.norm2(x))


def blocks(
    state: State, style: Style, width: int, *, one_token: bool, kinds: tuple[type[Block], type[Block]] | None = None
) -> nn.ModuleList:
    """``state`` holds {i}.norm1.weight and so on. ``one_token``: the last is of the second of ``kinds``."""
    usual, last = kinds or (Block, LastBlock)
    number = count(state, "")
    made = [usual] * (number - 1) + [last if one_token else usual]
    return nn.ModuleList(kind(part(state, f"{i}."), style, width) for i, kind in enumerate(made[:number]))


class Words(nn.Module):
    """x [B, T, W] -> a logit for each word, [B, T, V], by rows of its own or by the table that the words are read
    from."""

    def __init__(self, state: State, tokens: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(tokens.weight)) if "weight" in state else None
        self.bias = nn.Parameter(torch.empty(tokens.num_embeddings)) if "bias" in state else None

    def fold(self, table: Tensor) -> None:
        """The rows as their own, for a quantizer to round apart from those that are looked up."""
        self.weight = nn.Parameter(table if self.weight is None else self.weight, requires_grad=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return F.linear(x, table if self.weight is None else self.weight, self.bias)


def causal(context: int) -> Tensor:
    """[1, 1, C, C]: no token sees one that follows it."""
    return torch.full((context, context), -torch.inf).triu(1)[None, None]


def _scaled(weights: Tensor, rows: int, scale: float) -> nn.Parameter:
    return nn.Parameter(torch.cat([weights[:rows] * scale, weights[rows:]]), requires_grad=False)


def rows(layer: nn.Linear, first: int, last: int) -> nn.Linear:
    """A layer of its own that answers outputs ``first`` to ``last``."""
    with torch.device("meta"):
        part = nn.Linear(layer.in_features, last - first, bias=layer.bias is not None)
    part.weight = nn.Parameter(layer.weight[first:last].clone(), requires_grad=False)
    if layer.bias is not None:
        part.bias = nn.Parameter(layer.bias[first:last].clone(), requires_grad=False)
    return part


def unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1)
