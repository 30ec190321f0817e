"""Dense maps of image towers: pixels float32 [B, 3, H, W] -> patches float32 [B, h, w, D], in the space of the tower's
vectors and not normalized, so that the mean over any part of the map is linear in the patches.

A transformer gathers the whole picture: in the class token by the attention of its last block, or in a pool behind its
blocks. A map keeps each patch apart. `METHODS` lists how: another read-out of the last blocks. A tower that pools a map
of convolutions gives its cells, each projected as the pooled vector is.

A method reads `Step`: what a block computes, each part when it is first read, so the graph holds what a method reads
and no more. `Extra` reads the same steps for one more output.

Source: MaskCLIP, Zhou et al. 2022 (arXiv 2112.01071), section 3.2; with residual and feed-forward as in CLIP-DINOiser,
Wysoczanska et al. 2024 (arXiv 2312.12359) and its code; the methods name their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.towers.guided import centred, guided, resized
from calmclip.export.towers.image import AttentionPool, MeanPool, Trunk, VisionTransformer
from calmclip.export.towers.modules import Module, constant, rows, unit
from calmclip.export.towers.transformer import Attention, Block

Grid = tuple[int, int]  # rows and columns of the map
INNER = -3  # the block whose feed-forward's input tells patches of one thing from those of another


class Heads(NamedTuple):
    """What the heads of an attention compare and mix, each [B, H, T, d]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Layer:
    """A block of a `VisionTransformer` in the parts that maps read. x [B, T, W] is its input; ``tokens`` [B, T, W] are
    what its attention reads. ``products``: q, k and v, each from the tokens, if the block's own product does not make
    all of them."""

    def __init__(self, block: Block, products: Sequence[Module] = ()) -> None:
        self.block, self.products = block, products
        self.number = block.attn.heads
        scale: float = (block.attn.out.in_features // self.number) ** -0.5
        self.factors = 1 / scale, scale, scale  # q holds the scale

    @property
    def attention(self) -> Attention:
        return self.block.attn

    def tokens(self, x: Tensor) -> Tensor:
        return self.block.read(x)

    def heads(self, tokens: Tensor) -> Heads:
        attention = self.attention
        if self.products:
            parts = [product(tokens) for product in self.products]
        else:
            parts = [*attention.qkv(tokens).chunk(3, dim=-1)]
        q, k, v = (torch.unflatten(part, -1, (self.number, -1)) for part in parts)
        if attention.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        return Heads(*(part.transpose(1, 2) for part in (q, k, v)))

    def mix(self, heads: Heads) -> Tensor:
        """softmax(q k^T) v of each head, as rows [B, T, W]. The factor of the logits is in q."""
        return joined(self.softmax(heads.q @ heads.k.transpose(-1, -2)) @ heads.v)

    def alike(self, heads: Heads, part: int) -> Tensor:
        """softmax(z z^T d^-1/2) of each head, [B, H, T, T]. z is q, k or v, without the factor that q holds."""
        z = heads[part]
        return self.softmax((z * self.factors[part]) @ z.transpose(-1, -2))

    def softmax(self, logits: Tensor) -> Tensor:
        return self.attention.softmax(logits)

    def out(self, answers: Tensor, tokens: Tensor) -> Tensor:
        """The answers of the heads, rows [B, T, W] -> what attention adds to x. A gate reads ``tokens``."""
        attention = self.attention
        if attention.gate is not None:
            heads = torch.unflatten(answers, -1, (self.number, -1)).transpose(1, 2)
            answers = joined(heads * attention.gate(tokens))
        return attention.out(answers)

    def middle(self, x: Tensor) -> Tensor:
        """What the feed-forward reads, of x and the answer of attention."""
        return self.block.norm2(x)

    def forward(self, middle: Tensor) -> Tensor:
        """What the feed-forward adds."""
        answer: Tensor = self.block.mlp(middle)
        return answer


class Step:
    """What one block computes of its input x [B, T, W]."""

    def __init__(self, layer: Layer, x: Tensor) -> None:
        self.layer, self.x = layer, x

    @cached_property
    def tokens(self) -> Tensor:
        return self.layer.tokens(self.x)

    @cached_property
    def heads(self) -> Heads:
        return self.layer.heads(self.tokens)

    @cached_property
    def values(self) -> Tensor:
        """The values of all heads as rows [B, T, W], of a layer with ``products``."""
        return self.layer.products[2](self.tokens)

    @cached_property
    def attended(self) -> Tensor:
        """x and the answer of attention."""
        return self.x + self.layer.out(self.layer.mix(self.heads), self.tokens)

    @cached_property
    def middle(self) -> Tensor:
        """The input of the feed-forward (the output of ``ln_2``)."""
        return self.layer.middle(self.attended)

    @cached_property
    def after(self) -> Tensor:
        """The input of the next block."""
        return self.attended + self.layer.forward(self.middle)

    def answered(self, answers: Tensor, *, bare: bool) -> Tensor:
        """The block's output if its heads answered ``answers``, rows [B, T, W]; ``bare``: those alone, without the
        residual and the feed-forward."""
        added = self.layer.out(answers, self.tokens)
        if bare:
            return added
        x = self.x + added
        return x + self.layer.forward(self.layer.middle(x))


def joined(heads: Tensor) -> Tensor:
    """[B, H, T, d] -> rows [B, T, W]."""
    return heads.transpose(1, 2).flatten(-2)


class Reader(Module):
    """A tower as maps read it. ``gathers``: the last block's attention gathers the picture, and the last of its layers
    has ``products``; else a pool behind the blocks gathers it. Only a folded one can run."""

    gathers = True

    def fold(self) -> None: ...

    def layers(self) -> Sequence[Layer]:
        raise NotImplementedError

    def tokens(self, pixels: Tensor) -> Tensor:
        """[B, T, W], the input of the first block; the patches are the last ones."""
        raise NotImplementedError

    def project(self, x: Tensor, bare: bool) -> Tensor:
        """Patches behind the last block [B, N, W] -> [B, N, D]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Positions:
    """How a table of positions changes for another size of the picture. ``mode``: bicubic or bilinear, as torch's
    `interpolate` without antialiasing."""

    old: Grid
    new: Grid
    mode: str = "bicubic"

    def of(self, table: Tensor) -> Tensor:
        """[n + h w, W] for the old grid -> the same for the new one. The first n rows, of tokens, stay."""
        if self.old == self.new:
            return table
        first = len(table) - self.old[0] * self.old[1]
        cells = torch.unflatten(table[first:].T, 1, self.old)[None]
        cells = F.interpolate(cells, self.new, mode=self.mode, align_corners=False)
        return torch.cat([table[:first], cells[0].flatten(1).T])


class ClassToken(Reader):
    """A `VisionTransformer` whose class token is the vector."""

    def __init__(self, image: VisionTransformer, positions: Positions) -> None:
        super().__init__()
        self.image, self.positions = image, positions

    def fold(self) -> None:
        """Split the last block's q, k and v, so that a graph holds those that it reads."""
        self.image.positions = constant(self.positions.of(self.image.positions))
        self.image.fold()
        last: Any = self.image.blocks[-1]
        self.query, self.key, self.value = last.q, _keys(last.kv), _values(last.kv)

    def layers(self) -> Sequence[Layer]:
        *others, last = (cast(Block, block) for block in self.image.blocks)
        return [*map(Layer, others), Layer(last, (self.query, self.key, self.value))]

    def tokens(self, pixels: Tensor) -> Tensor:
        return self.image.tokens(pixels)

    def project(self, x: Tensor, bare: bool) -> Tensor:
        return self.image.projection(self.image.norm_post(x))


class LearnedQuery(Reader):
    """A `VisionTransformer` whose pool is a learned query (SigLIP): each patch's value takes the place of the pool's
    answer. ``bare``: without the feed-forward of the pool."""

    gathers = False

    def __init__(self, image: VisionTransformer, positions: Positions) -> None:
        super().__init__()
        self.image, self.positions = image, positions

    def fold(self) -> None:
        """Split the pool's values from its keys."""
        self.image.positions = constant(self.positions.of(self.image.positions))
        self.image.fold()
        self.value = _values(self.pool.kv)

    @property
    def pool(self) -> AttentionPool:
        return cast(AttentionPool, self.image.pool)

    def layers(self) -> Sequence[Layer]:
        return [Layer(cast(Block, block)) for block in self.image.blocks]

    def tokens(self, pixels: Tensor) -> Tensor:
        return self.image.tokens(pixels)

    def project(self, x: Tensor, bare: bool) -> Tensor:
        x = self.pool.out(self.value(self.image.norm_post(x)))
        return self.image.projection(x if bare else x + self.pool.mlp(self.pool.norm(x)))


class Extra(Module):
    """One more output of the graph: what blocks computed -> [B, h, w, *``shape``], float32. ``attends``: as of
    `Attention`."""

    shape: tuple[int, ...] = ()

    def forward(self, tower: "DenseTransformer", steps: Sequence[Step]) -> Tensor:
        raise NotImplementedError


class DenseTransformer(Module):
    """The map of a transformer, whose modules it holds. ``blocks``: how many of the last ones the method reads.
    ``bare``: without the residual and the feed-forward of the block, or of the pool, that gathers the picture.
    ``cells``: the grid of the tower's patches; ``grid``: that of the map, if it is another one. ``extras``: output ->
    what makes it. Only a folded one can run."""

    def __init__(
        self,
        tower: Reader,
        method: str,
        blocks: int,
        bare: bool,
        cells: Grid,
        extras: Mapping[str, Extra] | None = None,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.tower, self.method, self.blocks, self.bare = tower, METHODS[method], blocks, bare
        self.cells, self.grid = cells, grid or cells
        self.extras = nn.ModuleList((extras or {}).values())

    def fold(self) -> None:
        self.tower.fold()

    def forward(self, pixels: Tensor, guide: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """``guide``: the method's input beside the pixels, if it has one."""
        steps = self.steps(pixels)
        patches = self.project(self.method.read(self, steps, *([] if guide is None else [guide])))
        extras = tuple(extra(self, steps) for extra in self.extras)
        return (patches, *extras) if extras else patches

    def steps(self, pixels: Tensor) -> list[Step]:
        """Of all blocks, in their order."""
        steps: list[Step] = []
        for layer in self.tower.layers():
            steps.append(Step(layer, steps[-1].after if steps else self.tower.tokens(pixels)))
        return steps

    def project(self, x: Tensor) -> Tensor:
        """Tokens behind the last block [B, T, W], those of the map last -> [B, h, w, D]."""
        rows = x[:, -self.grid[0] * self.grid[1] :]
        return torch.unflatten(self.tower.project(rows, self.bare), 1, self.grid)

    def patches(self, x: Tensor) -> Tensor:
        """Tokens [B, T, W] -> those of patches, [B, h w, W]."""
        return x[:, -self.cells[0] * self.cells[1] :]


Read = Callable[..., Tensor]  # (tower, its steps, *more inputs) -> tokens behind the last block, [B, T, W]


@dataclass(frozen=True)
class Method:
    """``share``: the part of the tower's blocks, the last ones, that it reads another way if the caller does not say;
    None: the last block alone. ``attends``: how many Softmax ops it adds for each of them. ``inputs``: of the graph,
    beside the pixels."""

    read: Read
    share: Fraction | None = None
    attends: int = 0
    inputs: tuple[str, ...] = ()

    def blocks(self, depth: int) -> int:
        return max(1, round(depth * self.share)) if self.share else 1


def values(tower: DenseTransformer, steps: Sequence[Step]) -> Tensor:
    """Each token of the block that gathers the picture attends to itself alone. The pool of a tower that has one does
    so instead (`Reader.project`)."""
    last = steps[-1]
    return last.answered(last.values, bare=tower.bare) if tower.tower.gathers else last.after


def apart(steps: Sequence[Step], answers: Callable[[Step], Tensor]) -> list[Tensor]:
    """A path beside the tower's: from the input of the first of ``steps``, x + attention without the feed-forward,
    where the heads of each block answer ``answers``, rows [B, T, W], of what they compute on the tower's own path. ->
    x behind each step."""
    path: list[Tensor] = []
    for step in steps:
        x = path[-1] if path else step.x
        path.append(x + step.layer.out(answers(step), step.tokens))
    return path


def self_similarity(step: Step) -> Tensor:
    """A v with A = (softmax(q q^T s) + softmax(k k^T s) + softmax(v v^T s)) / 3, summed over the heads. All heads mix
    their v by this A, whose rows sum to the number of heads, as in the paper's code."""
    weights = [step.layer.alike(step.heads, part).sum(dim=1, keepdim=True) for part in range(3)]
    return joined((weights[0] + weights[1] + weights[2]) @ (step.heads.v / 3))


def values_alike(step: Step) -> Tensor:
    """softmax(v v^T s) v of each head."""
    return joined(step.layer.alike(step.heads, 2) @ step.heads.v)


def _on_path(answers: Callable[[Step], Tensor]) -> Read:
    return lambda tower, steps: apart(steps[-tower.blocks :], answers)[-1]


def guided_values(tower: DenseTransformer, steps: Sequence[Step], guide: Tensor | None = None) -> Tensor:
    """Each patch of the last block attends to those that are like it: by ``guide`` [B, h2, w2, C], to whose grid values
    are resized, or else by the tower's own features. Without the residual and the feed-forward."""
    last = steps[-1]
    values, features = tower.patches(last.values), centred(tower.patches(steps[INNER].middle))
    if guide is not None:
        values, features = resized(values, tower.cells, tower.grid), unit(guide.flatten(1, 2))
    return last.answered(guided(values, features), bare=True)


# self: ExCEL, CVPR 2025 (code zwyang6/ExCEL): the last 5 of 12 blocks. vv: AnomalyCLIP's DPAM, Zhou et al. 2024 (arXiv
# 2310.18961): the last 19 of 24; first CLIP Surgery, Li et al. 2023 (arXiv 2304.05653).
# guided: Trident, see `calmclip.export.towers.guided`
METHODS: Mapping[str, Method] = {
    "values": Method(values),
    "self": Method(_on_path(self_similarity), Fraction(5, 12), attends=3),
    "vv": Method(_on_path(values_alike), Fraction(19, 24), attends=1),
    "guided": Method(guided_values, attends=1),
}


class DenseTrunk(Module):
    """The map of a `Trunk`, whose modules it holds. ``pool``: the name of the module in ``image.trunk`` that makes a
    vector of the map. Only a folded one can run."""

    def __init__(self, image: Trunk, pool: str, positions: Positions) -> None:
        super().__init__()
        self.image, self.pool, self.positions, self.grid = image, pool, positions, positions.new

    def fold(self) -> None:
        """The cells take the place of the pool. What follows it works on rows, so on cells as on pictures."""
        cast(Any, self.image).fold()
        pool = self.image.trunk.get_submodule(self.pool)
        if isinstance(pool, MeanPool):
            pool.positions = constant(self.positions.of(pool.positions))
        self.image.trunk.set_submodule(self.pool, ValueCells(pool) if isinstance(pool, MeanPool) else Cells(pool))

    def forward(self, pixels: Tensor) -> Tensor:
        cells = self.image.projection(self.image.trunk(pixels))  # [B h w, D]
        return torch.unflatten(cells, 0, (-1, *self.grid))


class Cells(Module):
    """A map [B, C, h, w] -> its cells as maps of one cell each, pooled: [B h w, C] or [B h w, C, 1, 1]."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        cells: Tensor = self.pool(x.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None])
        return cells


class ValueCells(Module):
    """A map [B, W, h, w] -> [B h w, D]: the answer of a folded `MeanPool` if it attended to one cell alone."""

    def __init__(self, pool: MeanPool) -> None:
        super().__init__()
        self.pool = pool
        self.value = _values(pool.kv)

    def forward(self, x: Tensor) -> Tensor:
        cells = x.flatten(2).transpose(1, 2) + self.pool.positions[1:]
        return self.pool.out(self.value(cells)).flatten(0, 1)


def _keys(keys_and_values: nn.Linear) -> Module:
    return cast(Module, rows(keys_and_values, 0, keys_and_values.in_features))


def _values(keys_and_values: nn.Linear) -> Module:
    width = keys_and_values.in_features
    return cast(Module, rows(keys_and_values, width, 2 * width))
