"""Methods of dense maps on a small ViT. Oracles: the formulas of the papers, head by head in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calmclip.export.towers import Style
from calmclip.export.towers.dense import METHODS, ClassToken, DenseTransformer, Extra, Positions
from calmclip.export.towers.image import VisionTransformer
from tests import towers

DEPTH, GRID = 3, (4, 4)
HEAD = towers.WIDTH // towers.HEADS


def state_of(**changes: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = towers.state_of("vit")
    for block in range(towers.LAYERS, DEPTH):
        state |= {f"blocks.{block}.{name}": tensor for name, tensor in towers.block().items()}
    return state | changes


def tower_of(state: dict[str, Tensor], method: str, blocks: int, **more: Any) -> DenseTransformer:
    image = VisionTransformer(state, Style(heads=towers.HEADS, pool="cls"))
    image.load_state_dict(state)
    reader = ClassToken(image, Positions(GRID, more.pop("grid", GRID), more.pop("mode", "bicubic")))
    tower = DenseTransformer(
        reader, method, blocks, more.pop("bare", False), reader.positions.new, more.pop("extras", {})
    )
    tower.requires_grad_(False).fold()
    return tower.eval()


def pictures(rows: int = 16, columns: int = 16) -> Tensor:
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(1))


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def feed_forward(state: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
    hidden = linear(state, f"{block}mlp.up", norm(state, f"{block}norm2", x))
    return x + linear(state, f"{block}mlp.down", hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)


def definition(state: dict[str, Tensor], pixels: Tensor, method: str, blocks: int) -> Tensor:
    """The map [B, 4, 4, D] by the papers, one head after another."""
    state = {name: tensor.double() for name, tensor in state.items()}
    cells = pixels.double().unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    cells = cells @ state["patch.weight"].flatten(1).T + state["patch.bias"]
    x = torch.cat([state["cls"].expand(len(cells), 1, -1), cells], dim=1) + state["positions"]
    path = x
    for number in range(DEPTH):
        block = f"blocks.{number}."
        q, k, v = linear(state, f"{block}attn.qkv", norm(state, f"{block}norm1", x)).split(towers.WIDTH, dim=-1)
        heads = [slice(i * HEAD, (i + 1) * HEAD) for i in range(towers.HEADS)]

        def weights(a: Tensor, b: Tensor, head: slice) -> Tensor:
            return ((a[..., head] @ b[..., head].transpose(1, 2)) / HEAD**0.5).softmax(-1)

        plain = torch.cat([weights(q, k, head) @ v[..., head] for head in heads], dim=-1)
        if method == "self":
            mixed = sum((weights(q, q, h) + weights(k, k, h) + weights(v, v, h)) / 3 for h in heads) @ v
        else:
            mixed = torch.cat([weights(v, v, head) @ v[..., head] for head in heads], dim=-1)
        path = x if number == DEPTH - blocks else path
        path = path + linear(state, f"{block}attn.out", mixed)
        before, x = x, feed_forward(state, block, x + linear(state, f"{block}attn.out", plain))
    if method == "values":
        path = feed_forward(state, block, before + linear(state, f"{block}attn.out", v))
    return (norm(state, "norm_post", path) @ state["projection.weight"].T)[:, 1:].reshape(len(pixels), *GRID, -1)


@pytest.mark.parametrize(
    ("method", "blocks"),
    [("values", 1), ("self", 1), ("self", 2), ("self", DEPTH), ("vv", 1), ("vv", 2), ("vv", DEPTH)],
)
def test_a_method_is_its_formula(method: str, blocks: int):
    state = state_of()
    want = definition(state, pictures(), method, blocks)
    patches = tower_of(state, method, blocks)(pictures())
    assert patches.shape == (2, *GRID, towers.OUT)
    assert (patches - want).abs().max() < 1e-4 * want.abs().max()


def test_how_many_blocks_are_the_papers():
    """ExCEL: 5 of ViT-B's 12. AnomalyCLIP: 19 of ViT-L's 24. "values" is the last block."""
    counts = {name: [method.blocks(depth) for depth in (1, 12, 24)] for name, method in METHODS.items()}
    assert counts["self"] == [1, 5, 10]
    assert counts["vv"] == [1, 10, 19]
    assert counts["values"] == [1, 1, 1]


def constant_values() -> tuple[dict[str, Tensor], Tensor]:
    """A tower whose last block gives every token the same v, the bias."""
    state, name = state_of(), f"blocks.{DEPTH - 1}.attn.qkv"
    weight = state[f"{name}.weight"].clone()
    weight[2 * towers.WIDTH :] = 0
    return state | {f"{name}.weight": weight}, state[f"{name}.bias"][2 * towers.WIDTH :]


def test_where_all_values_are_equal_vv_answers_that_value():
    state, value = constant_values()
    tower = tower_of(state, "vv", 1)
    last = tower.steps(pictures())[-1]
    want = last.x + last.layer.out(value.expand_as(last.x), last.tokens)
    assert (tower.method.read(tower, tower.steps(pictures())) - want).abs().max() < 1e-5


def test_the_rows_of_self_similarity_sum_to_the_number_of_heads():
    """So equal values come back times this number, as in ExCEL's code."""
    state, value = constant_values()
    tower = tower_of(state, "self", 1)
    last = tower.steps(pictures())[-1]
    want = last.x + last.layer.out(towers.HEADS * value.expand_as(last.x), last.tokens)
    assert (tower.method.read(tower, tower.steps(pictures())) - want).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_picture_without_positions_has_a_constant_map(method: str):
    state = state_of(positions=torch.zeros(1 + towers.PATCHES, towers.WIDTH))
    patches = tower_of(state, method, 1)(torch.full((1, 3, 16, 16), 0.7)).reshape(towers.PATCHES, -1)
    assert (patches - patches[0]).abs().max() < 1e-5
    assert patches.std() > 0.1


def test_the_towers_own_path_ends_in_the_pictures_vector():
    state = state_of()
    image = VisionTransformer(state, Style(heads=towers.HEADS, pool="cls"))
    image.load_state_dict(state)
    image.requires_grad_(False).fold()
    tower = tower_of(state, "vv", DEPTH)
    vectors = tower.tower.project(tower.steps(pictures())[-1].after[:, 0], bare=False)
    assert torch.cosine_similarity(vectors, image(pictures())).min() > 1 - 1e-6


def cubic(distance: float) -> float:
    """Keys' kernel with a = -3/4, which torch has."""
    a, d = -0.75, abs(distance)
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def triangle(distance: float) -> float:
    return max(0.0, 1 - abs(distance))


@pytest.mark.parametrize(("mode", "kernel"), [("bicubic", cubic), ("bilinear", triangle)])
def test_positions_are_resized_by_their_kernel(mode: str, kernel: Any):
    """A place beyond the border counts as the cell at the border. The class token's position stays."""
    old, new = (3, 4), (5, 9)
    table = torch.randn(1 + 12, 8, generator=torch.Generator().manual_seed(0))

    def weights(before: int, after: int) -> Any:
        matrix = np.zeros((after, before))
        for place in range(after):
            centre = (place + 0.5) * before / after - 0.5
            for cell in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                matrix[place, min(max(cell, 0), before - 1)] += kernel(centre - cell)
        return matrix

    cells = table[1:].double().numpy().reshape(*old, 8)
    want = np.einsum("yh,xw,hwc->yxc", weights(old[0], new[0]), weights(old[1], new[1]), cells)
    resized = Positions(old, new, mode).of(table)
    assert torch.equal(resized[0], table[0])
    assert resized[1:].numpy() == pytest.approx(want.reshape(45, 8), abs=1e-5)
    assert Positions(old, old, mode).of(table) is table


def test_a_larger_picture_has_a_larger_map():
    """Two pictures side by side, of a tower whose positions are equal and whose tokens attend to themselves alone."""
    state = state_of(positions=torch.ones(1 + towers.PATCHES, towers.WIDTH))
    for block in range(DEPTH):
        state[f"blocks.{block}.attn.out.weight"] = torch.zeros(towers.WIDTH, towers.WIDTH)
    left, right = pictures(), pictures().flip(0)
    small, large = tower_of(state, "values", 1), tower_of(state, "values", 1, grid=(4, 8))
    want = torch.cat([small(left), small(right)], dim=2)
    assert (large(torch.cat([left, right], dim=3)) - want).abs().max() < 1e-5


class Middle(Extra):
    """The first three numbers of what the feed-forward of a block reads."""

    shape = (3,)

    def forward(self, tower: DenseTransformer, steps: Any) -> Tensor:
        return tower.patches(steps[-2].middle)[..., :3].unflatten(1, tower.grid)


def test_another_output_reads_what_a_block_computes():
    state = state_of()
    patches, middle = tower_of(state, "values", 1, extras={"keys": Middle()})(pictures())
    assert torch.equal(patches, tower_of(state, "values", 1)(pictures()))
    image = VisionTransformer(state, Style(heads=towers.HEADS, pool="cls"))
    image.load_state_dict(state)
    seen: list[Tensor] = []
    block: Any = image.blocks[-2]
    block.norm2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    image.requires_grad_(False)(pictures())
    assert (middle - seen[0][:, 1:, :3].unflatten(1, GRID)).abs().max() < 1e-5
