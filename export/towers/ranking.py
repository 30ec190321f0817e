"""The ranking adapter: tokens of pictures and of an instruction -> a score for each picture.

Source: Yu et al. 2025, "Ranking-aware adapter for text-driven image ordering with CLIP" (arXiv 2412.06760). Layers of
self-attention over a picture's tokens and of cross-attention to the instruction's tokens (pre-norm), a norm and a
product; then layers of a post-norm encoder with ReLU; then

    score = MLP(sum over tokens of norm(x)),    MLP: twice a product, a norm and ReLU; then a product with one output

Learned numbers stand before the instruction's tokens, each broadcast over the width. Such a token has no variance, so
its norm is the norm's bias: the numbers add equal tokens, and their values change no score.

`Ranking.pair` is the branch that trains the adapter on pairs of pictures. No graph holds it. Names:

    words [S]  layers.{i}.among.*  layers.{i}.across.*  norm_layers.*  projection.weight
    encoder.{i}.*  norm_post.*  score.layers.{i}.up.*  .norm.*  score.out.*
    pairs.queries [Q, D]  pairs.q.*  .norm_q.*  .kv.*  .norm_kv.*  .out.*  .norm.*  pairs.score.*
"""

import torch
from torch import Tensor, nn

from calmclip.export.towers import State, Style, count, part
from calmclip.export.towers.bert import PostBlock
from calmclip.export.towers.modules import LayerNorm, Module
from calmclip.export.towers.queries import QueryAttention
from calmclip.export.towers.transformer import MLP, Block, Blocks, attend, linear

EPS = 1e-5
AMONG = 8  # heads of the first layers, and of the pair branch; a config states those of the encoder alone


class Across(Module):
    """x' = x + attention(norm1(x), norm_text(text)); x' + mlp(norm2(x'))."""

    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        self.norm1, self.norm_text, self.norm2 = (LayerNorm(width, eps=style.eps) for _ in range(3))
        self.attn = QueryAttention(part(state, "attn."), width, style.heads)
        self.mlp = MLP(part(state, "mlp."), style, width)

    def fold(self) -> None:
        self.attn.fold()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        text = self.norm_text(text)
        x = x + self.attn(self.norm1(x), text, text)
        return x + self.mlp(self.norm2(x))


class Fusion(Module):
    """Self-attention of a picture's tokens, then cross-attention to those of the text."""

    def __init__(self, state: State, style: Style, width: int) -> None:
        super().__init__()
        self.among = Block(part(state, "among."), style, width)
        self.across = Across(part(state, "across."), style, width)

    def fold(self) -> None:
        self.among.fold()
        self.across.fold()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.across(self.among(x), text)


class Hidden(Module):
    def __init__(self, state: State, width: int) -> None:
        super().__init__()
        self.up, self.norm = linear(state, "up", width, width), LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.up(x)))


class Regressor(Module):
    """[..., D] -> [...]."""

    def __init__(self, state: State, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(Hidden(part(state, f"layers.{i}."), width) for i in range(count(state, "layers.")))
        )
        self.out = linear(state, "out", width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x)).squeeze(-1)


class Pair(Module):
    """Which of two pictures has more of what the instruction names; x [B, N, D] are `Ranking.read` tokens.

    The queries attend to the tokens of both pictures in one softmax. The part of the answer that comes from the second
    picture is subtracted from that of the first.
    """

    def __init__(self, state: State, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.empty(state["queries"].shape))
        self.q, self.kv, self.out = (linear(state, name, width, width) for name in ("q", "kv", "out"))
        self.norm_q, self.norm_kv, self.norm = (LayerNorm(width, eps=EPS) for _ in range(3))
        self.score = Regressor(part(state, "score."), width)

    def difference(self, first: Tensor, second: Tensor) -> Tensor:
        """[B, Q, D], before the out-projection."""
        queries = self.norm_q(self.q(self.queries)) * (self.queries.shape[1] // self.heads) ** -0.5
        values = [self.norm_kv(self.kv(x)) for x in (first, second)]
        signed = torch.cat((values[0], -values[1]), dim=1)
        return attend(queries.expand(len(first), -1, -1), torch.cat(values, dim=1), signed, self.heads)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.score(self.norm(self.out(self.difference(first, second)).sum(dim=1)))


class Ranking(Module):
    """image_tokens [B, N, D], text_tokens [B, T, D] or [1, T, D] -> scores [B]. ``heads``: of the encoder."""

    def __init__(self, state: State, heads: int) -> None:
        super().__init__()
        width = len(state["norm_post.weight"])
        first = Style(heads=AMONG, pool="none", eps=EPS)
        self.words = nn.Parameter(torch.empty(state["words"].shape))
        self.layers = Blocks(Fusion(part(state, f"layers.{i}."), first, width) for i in range(count(state, "layers.")))
        self.norm_layers = LayerNorm(width, eps=EPS)
        self.projection = linear(state, "projection", width, bias=False)
        then = Style(heads=heads, activation="relu", pool="none", eps=EPS)
        self.encoder = Blocks(
            PostBlock(part(state, f"encoder.{i}."), then, width) for i in range(count(state, "encoder."))
        )
        self.norm_post = LayerNorm(width, eps=EPS)
        self.score = Regressor(part(state, "score."), width)
        self.pairs = Pair(part(state, "pairs."), width, AMONG)

    def fold(self) -> None:
        self.layers.fold()
        self.encoder.fold()

    def read(self, image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
        """[B, N, D]: the tokens of each picture, after it read the instruction."""
        words = self.words[None, :, None].expand(text_tokens.shape[0], -1, text_tokens.shape[-1])
        text, x = torch.cat((words, text_tokens), dim=1), image_tokens
        for layer in self.layers:
            x = layer(x, text)
        x = self.projection(self.norm_layers(x))
        for layer in self.encoder:
            x = layer(x)
        return x

    def forward(self, image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
        return self.score(self.norm_post(self.read(image_tokens, text_tokens)).sum(dim=1))

    def pair(self, first: Tensor, second: Tensor, text_tokens: Tensor) -> Tensor:
        """[B]: the score of each pair of pictures."""
        return self.pairs(self.read(first, text_tokens), self.read(second, text_tokens))
