"""Decoders of language models as text towers: ids and mask int64 [B, T] -> unit vectors float32 [B, D].

Source: Vaswani et al. 2017 (arXiv 1706.03762); RMSNorm: Zhang and Sennrich 2019 (arXiv 1910.07467); RoPE: Su et al.
2021 (arXiv 2104.09864); SwiGLU and GeGLU: Shazeer 2020 (arXiv 2002.05202); grouped queries: Ainslie et al. 2023 (arXiv
2305.13245); soft caps and norms after attention and MLP: Gemma 2, 2024 (arXiv 2408.00118).

Names beside those of `calmclip.export.towers`; norms have no bias, and projections of q, k, v may have one:

    blocks.{i}.attn.qkv.*       the rows of q [H d], then of k [KV d], then of v [KV d]
    blocks.{i}.mlp.up.*         the rows of the gate [F], then of up [F]
    blocks.{i}.post1?.weight  .post2?.weight      norms of what attention and MLP answer, before they are added
    dense.{i}.weight  dense.{i}.bias?             layers after the pooling

Padding may stand on either side. RoPE and the masks of causal and windowed attention depend only on the distance of two
tokens, so a row's answer does not depend on the place of its padding, nor on the other rows.

The graph has one form for each part, which rewrites match. B rows, T tokens (S = T; S = 1 in the last block if one
token is pooled), H heads of q, KV heads of k and v, d numbers in a head:

    norm      x * rsqrt(mean(x * x) + eps) * weight                                         over the last axis
    q, k, v   one product with ``qkv``, split along the last axis; each [B, S, n d] -> [B, n, S, d]; norms of q and k
    RoPE      x * cos + swap(x) * sin; swap exchanges the halves of d; cos, sin [S, d], sin negative in its first half
    logits    q as [B, KV, H / KV S, d] @ k^T; then as [B, H, S, T]; cap * tanh(logits) if capped; + mask [B, 1, S, T]
    mixture   softmax, as [B, KV, H / KV S, T] @ v, as [B, H, S, d], back to [B, S, H d], ``out``
    MLP       one product with ``up``, split in two halves: down(act(first half) * second half)

After `fold` the scale of the logits is in the weights of q (or of its norm), the 1 of Gemma's (1 + weight) in the
norms, and the scale of the embeddings in their table. With H = KV the reshapes around the two products are absent. The
last block computes q by a product of its own, from one token, if one is pooled.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.towers import State, count, part
from calmclip.export.towers.attention import AttentionSpec, Gate
from calmclip.export.towers.modules import Identity, Linear, Module, constant, unit
from calmclip.export.towers.text import TokenAt
from calmclip.export.towers.transformer import MASKED, linear, split_heads

Pool = Literal["last", "first", "mean", "weightedmean"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
DENSE: dict[str, Callable[[Tensor], Tensor]] = {"Identity": lambda x: x, "Tanh": torch.tanh}


@dataclass(frozen=True)
class Rope:
    """Token t turns pair j of a head's numbers by t ``frequencies[j]``; cos and sin are multiplied by ``gain``. With
    fewer frequencies than d / 2 the last numbers of a head do not turn."""

    frequencies: tuple[float, ...]
    gain: float = 1.0


@dataclass(frozen=True)
class Layer:
    """The settings of one block: its `Rope`, and a window: a token sees those at a distance below it; None: all."""

    rope: Rope
    window: int | None = None


@dataclass(frozen=True)
class DecoderStyle:
    """The settings that the shapes of tensors do not show. ``layers``: one for each block.

    ``pool``: last, first     the last or first token that is pooled
              mean            the mean of those that are pooled
              weightedmean    the same, weighted by the number of tokens up to each (SGPT)
    ``scale``: of the logits. ``cap``: logits become cap tanh(logits / cap). ``norm_offset``: added to the weights of
    norms. ``dense``: the activation after each layer of ``dense``.
    """

    heads: int
    kv_heads: int
    head_width: int
    scale: float
    layers: tuple[Layer, ...]
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    pool: Pool = "last"
    causal: bool = True
    eps: float = 1e-6
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    cap: float | None = None
    dense: tuple[str, ...] = ()
    attention: AttentionSpec = field(default_factory=AttentionSpec)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers of q, k and v for each token."""
        return self.heads * self.head_width, self.kv_heads * self.head_width, self.kv_heads * self.head_width


class Places(NamedTuple):
    """What a block needs to know of its tokens. ``cos``, ``sin``: of k [T, d], and of q [T, d] or [B, 1, 1, d];
    ``mask`` [B, 1, S, T], added to the logits; ``valid`` float32 [B, T], 1 for tokens that are not padding."""

    cos: Tensor
    sin: Tensor
    q_cos: Tensor
    q_sin: Tensor
    mask: Tensor
    valid: Tensor


class RMSNorm(Module):
    """x / rms(x) times the weight, which may be stored as its difference from ``offset``."""

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.offset = eps, offset

    def fold(self, scale: float = 1.0) -> None:
        """Fold the offset, and a factor of the answer, into the weight."""
        self.weight, self.offset = constant((self.weight + self.offset) * scale), 0.0

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + self.eps) * weight


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [B, n, S, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([second, first], dim=-1) * sin


class Attention(Module):
    """Attention with grouped queries: H / KV heads of q read one head of k and v."""

    attends = 1  # Softmax ops in its graph

    def __init__(self, state: State, style: DecoderStyle, width: int, layer: Layer) -> None:
        super().__init__()
        self.style, self.layer = style, layer
        self.softmax, self.scale = style.attention.softmax, style.scale
        self.cap, self.gate_scale = style.cap, style.attention.gate_scale
        gate = part(state, "gate.")
        self.gate = Gate(gate, style.heads, width, style.attention.gate_mean) if gate else None
        style.attention.check_gate("none" if self.gate is None else self.gate.kind)
        self.qkv = linear(state, "qkv", width, sum(style.sizes), bias="qkv.bias" in state)
        self.out = linear(state, "out", style.sizes[0], width, bias="out.bias" in state)
        qk_norm = "q_norm.weight" in state
        self.q_norm = RMSNorm(style.head_width, style.eps, style.norm_offset) if qk_norm else None
        self.k_norm = RMSNorm(style.head_width, style.eps, style.norm_offset) if qk_norm else None
        turned, half = len(layer.rope.frequencies), style.head_width // 2
        self.order = None if turned == half else _halves(turned, style.head_width)

    def fold(self) -> None:
        """Fold the scale of the logits into q, and the gate's scale, or a gate that is the same for every token, into
        ``out``. If only a part of a head turns, exchange its numbers so that the halves turn together."""
        self._fold_order()
        scale = self.scale / self.cap if self.cap else self.scale
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm.fold(scale)
            self.k_norm.fold()
        else:
            queries = self.style.sizes[0]
            for name, tensor in [*self.qkv.named_parameters()]:
                gain = torch.ones(len(tensor), *[1] * (tensor.ndim - 1))
                gain[:queries] = scale
                setattr(self.qkv, name, constant(tensor * gain))
        self.scale = 1.0
        if self.gate is not None:
            gain = self.out.weight.new_full((self.out.in_features,), self.gate_scale)
            if self.gate.kind == "per_head":
                gain = gain * self.gate.logits.sigmoid().repeat_interleave(self.style.head_width)
                self.gate = None
            else:
                self.gate.fold()
            self.out.weight = constant(self.out.weight * gain)
        self.gate_scale = 1.0

    def _fold_order(self) -> None:
        if self.order is None:
            return
        style = self.style
        heads = torch.arange(style.heads + style.kv_heads)[:, None] * style.head_width
        rows = torch.cat([(heads + self.order).flatten(), torch.arange(sum(style.sizes[:2]), sum(style.sizes))])
        for name, tensor in [*self.qkv.named_parameters()]:
            setattr(self.qkv, name, constant(tensor[rows]))
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.weight = constant(norm.weight[self.order])
        self.order = None

    def forward(self, x: Tensor, places: Places) -> Tensor:
        q, k, v = torch.split(self.qkv(x), [*self.style.sizes], dim=-1)
        return self.mix(q, k, v, x, places)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, places: Places) -> Tensor:
        """``x``: the tokens that the gate reads: those that q was computed from, or all if it averages over them."""
        style = self.style
        q, k, v = split_heads(q, style.heads), split_heads(k, style.kv_heads), split_heads(v, style.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.order is not None:
            q, k = q[..., self.order], k[..., self.order]
        q, k = turn(q, places.q_cos, places.q_sin), turn(k, places.cos, places.sin)
        group, tokens = style.heads // style.kv_heads, q.shape[2]
        logits = grouped(q, group) @ k.transpose(-1, -2)
        logits = ungrouped(logits if self.scale == 1.0 else logits * self._unfolded(), group, tokens)
        if self.cap:
            logits = torch.tanh(logits) * self.cap
        probabilities = self.softmax(logits + places.mask)
        answers = ungrouped(grouped(probabilities, group) @ v, group, tokens)
        if self.gate is not None:
            gate = self.gate(x, places.valid if self.gate.mean else None)
            answers = answers * (gate if self.gate_scale == 1.0 else gate * self.gate_scale)
        return self.out(answers.transpose(1, 2).flatten(-2))

    def _unfolded(self) -> float:
        return self.scale / self.cap if self.cap else self.scale


def grouped(x: Tensor, group: int) -> Tensor:
    """[B, H, S, n] -> [B, H / ``group``, ``group`` S, n]. Nothing moves in memory: one head of k and v serves the rows
    of all heads of q that read it."""
    return x if group == 1 else x.reshape(x.shape[0], x.shape[1] // group, group * x.shape[2], x.shape[3])


def ungrouped(x: Tensor, group: int, tokens: int) -> Tensor:
    """The inverse, for S = ``tokens``."""
    return x if group == 1 else x.reshape(x.shape[0], x.shape[1] * group, tokens, x.shape[3])


def _halves(turned: int, width: int) -> Tensor:
    """Numbers 0 to 2 ``turned`` of a head turn in pairs (j, j + ``turned``). In this order j and j + width / 2 do, as
    if all turned. q k^T does not depend on the order."""
    still = torch.arange(2 * turned, width)
    half = width // 2 - turned
    return torch.cat([torch.arange(turned), still[:half], torch.arange(turned, 2 * turned), still[half:]])


class GatedMLP(Module):
    """down(act(gate) * up), with gate and up from one product."""

    def __init__(self, state: State, style: DecoderStyle, width: int) -> None:
        super().__init__()
        self.up, self.act = linear(state, "up", width, bias="up.bias" in state), ACTIVATIONS[style.activation]
        self.down = linear(state, "down", self.up.out_features // 2, width, bias="down.bias" in state)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class Block(Module):
    """x' = x + post1(attention(norm1(x))); x' + post2(mlp(norm2(x'))). ``post1`` and ``post2`` may be absent."""

    def __init__(self, state: State, style: DecoderStyle, width: int, layer: Layer) -> None:
        super().__init__()

        def norm(name: str) -> RMSNorm | Identity:
            return RMSNorm(width, style.eps, style.norm_offset) if f"{name}.weight" in state else Identity()

        self.layer = layer
        self.norm1, self.norm2 = (RMSNorm(width, style.eps, style.norm_offset) for _ in range(2))
        self.post1, self.post2 = norm("post1"), norm("post2")
        self.attn = Attention(part(state, "attn."), style, width, layer)
        self.mlp = GatedMLP(part(state, "mlp."), style, width)

    def fold(self) -> None:
        self.attn.fold()
        for norm in (self.norm1, self.norm2, self.post1, self.post2):
            if isinstance(norm, RMSNorm):
                norm.fold()

    def forward(self, x: Tensor, places: Places) -> Tensor:
        return self.finish(x, self.attn(self.norm1(x), places))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.post1(attended)
        return x + self.post2(self.mlp(self.norm2(x)))


class LastBlock(Block):
    """The last block, for one token of each row. The other tokens need k and v only. Before `fold` it computes all
    tokens and then picks one, with the same answer [B, 1, W]."""

    folded = False

    def fold(self) -> None:
        super().fold()
        queries, layer = self.attn.style.sizes[0], self.attn.qkv
        self.q, self.kv = _rows(layer, slice(0, queries)), _rows(layer, slice(queries, None))
        del self.attn.qkv
        self.folded = True

    def forward(self, x: Tensor, places: Places, pick: Callable[[Tensor], Tensor] = lambda x: x[:, -1:]) -> Tensor:
        if not self.folded:
            return pick(super().forward(x, places))
        tokens = self.norm1(x)
        k, v = self.kv(tokens).chunk(2, dim=-1)
        inputs = pick(tokens)
        averages = self.attn.gate is not None and self.attn.gate.mean
        return self.finish(pick(x), self.attn.mix(self.q(inputs), k, v, tokens if averages else inputs, places))


def _rows(layer: Linear, part: slice) -> Linear:
    with torch.device("meta"):
        rows = Linear(layer.in_features, len(layer.weight[part]), bias=layer.bias is not None)
    rows.weight = constant(layer.weight[part].clone())
    if layer.bias is not None:
        rows.bias = constant(layer.bias[part].clone())
    return rows


class DecoderText(Module):
    """Pools the tokens after the last norm, applies the dense layers, and makes unit vectors."""

    def __init__(self, state: State, style: DecoderStyle) -> None:
        super().__init__()
        self.style = style
        words, width = state["tokens.weight"].shape
        self.tokens, self.embed_scale = nn.Embedding(words, width), style.embed_scale
        number = count(state, "blocks.")
        if number != len(style.layers):
            raise ValueError(f"there are {number} blocks, and settings of {len(style.layers)}")
        one_token = style.pool in ("last", "first")
        self.blocks: Any = nn.ModuleList(
            (LastBlock if one_token and i == number - 1 else Block)(part(state, f"blocks.{i}."), style, width, layer)
            for i, layer in enumerate(style.layers)
        )
        self.norm_post = RMSNorm(width, style.eps, style.norm_offset)
        self.dense: Any = nn.ModuleList()
        for index in range(len(style.dense)):
            self.dense.append(linear(state, f"dense.{index}", width, bias=f"dense.{index}.bias" in state))
            width = len(state[f"dense.{index}.weight"])

    def fold(self) -> None:
        """Folds every block and norm, and the scale of the embeddings into their table."""
        for block in self.blocks:
            block.fold()
        self.norm_post.fold()
        if self.embed_scale != 1.0:
            self.tokens.weight = constant(self.tokens.weight * self.embed_scale)
            self.embed_scale = 1.0

    def forward(self, ids: Tensor, mask: Tensor, pooled: Tensor | None = None) -> Tensor:
        """``mask``: 1 for tokens, 0 for padding; ``pooled``: the same for those that are pooled; None: ``mask``."""
        return unit(self.encode(self.embed(ids), mask, pooled))

    def embed(self, ids: Tensor) -> Tensor:
        """[B, T, W], the input of the first block."""
        words: Tensor = self.tokens(ids)
        return words if self.embed_scale == 1.0 else words * self.embed_scale

    def encode(self, words: Tensor, mask: Tensor, pooled: Tensor | None = None) -> Tensor:
        """[B, D], before it is made a unit vector. ``words`` [B, T, W]: from `embed`, or learnt vectors in place of
        some."""
        pooled = mask if pooled is None else pooled
        if self.style.pool in ("last", "first"):
            at = self.pooled_at(pooled)
            x = self._blocks(words, mask, at).flatten(1)
            x = self.norm_post(x)
        else:
            weights = (mask.cumsum(dim=1) * pooled if self.style.pool == "weightedmean" else pooled).to(words.dtype)
            x = self.norm_post(self._blocks(words, mask, None))
            x = (x * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
        for layer, activation in zip(self.dense, self.style.dense, strict=True):
            x = DENSE[activation](layer(x))
        return x

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T, W]: all tokens after the last norm. The module must not be folded if it pools one token."""
        return self.norm_post(self._blocks(self.embed(ids), mask, None))

    def pooled_at(self, pooled: Tensor) -> Tensor:
        """int64 [B]: the place of the token that is pooled."""
        if self.style.pool == "first":
            return pooled.argmax(dim=1)
        return (pooled * torch.arange(pooled.shape[1], device=pooled.device)).argmax(dim=1)

    def _blocks(self, x: Tensor, mask: Tensor, at: Tensor | None) -> Tensor:
        """The answer of the last block, [B, T, W]; for the tokens ``at`` alone, [B, 1, W]."""
        length, valid = x.shape[1], mask.to(x.dtype)
        tokens = torch.arange(length, device=x.device)
        turns = {layer.rope: self._turns(layer.rope, tokens) for layer in self.style.layers}
        masks = {layer.window: self._mask(layer.window, tokens[None], valid) for layer in self.style.layers}
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            cos, sin = turns[block.layer.rope]
            places = Places(cos, sin, cos, sin, masks[block.layer.window], valid)
            if at is None or index < last:
                x = Block.forward(block, x, places) if isinstance(block, LastBlock) else block(x, places)
                continue
            if block.folded:
                q_cos, q_sin = (rows.index_select(0, at)[:, None, None] for rows in (cos, sin))
                row = self._mask(block.layer.window, at[:, None], valid)
                places = places._replace(q_cos=q_cos, q_sin=q_sin, mask=row)
            x = block(x, places, TokenAt(at))
        return x

    def _turns(self, rope: Rope, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, d]; the sign of sin belongs to the exchange of halves."""
        still = self.style.head_width // 2 - len(rope.frequencies)
        angles = tokens.to(torch.float32)[:, None] * torch.tensor(rope.frequencies + (0.0,) * still)
        cos, sin = angles.cos(), angles.sin()
        if rope.gain != 1.0:
            gain = torch.tensor((rope.gain,) * len(rope.frequencies) + (1.0,) * still)
            cos, sin = cos * gain, sin * gain
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def _mask(self, window: int | None, queries: Tensor, valid: Tensor) -> Tensor:
        """``queries``: the places of the tokens of q, [1, T] or [B, 1] -> [B, 1, S, T]: 0, or `MASKED` for the tokens
        that one does not see."""
        padding = ((1 - valid) * MASKED)[:, None, None, :]
        keys, queries = torch.arange(valid.shape[1], device=valid.device), queries[:, None, :, None]
        # compared without a difference, which would be the largest tensor of a long text
        unseen = keys > queries if self.style.causal else None
        if window is not None:
            far = keys <= queries - window
            unseen = far | (keys >= queries + window) if unseen is None else far | unseen
        return padding if unseen is None else torch.where(unseen, MASKED, padding)
