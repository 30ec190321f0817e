"""Sharpness of layers. Oracles: numpy's eigenvalues, closed forms, gradients of transformers, folded towers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from calmclip.export import sharpness as module
from calmclip.export import zero_shot
from calmclip.export.interpolate import open_ends
from calmclip.export.nets import NETS, ready
from calmclip.export.sharpness import Ascent, layers, measure, sharpness, stragglers
from calmclip.export.towers.image import MeanPool
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest, ExportError
from tests import tiny


def symmetric(values: list[float], seed: int) -> torch.Tensor:
    """A matrix with these eigenvalues."""
    size = len(values)
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return torch.from_numpy(basis @ np.diag(values) @ basis.T)


@pytest.mark.parametrize("values", [[7, 3, 2, 1, 0.5, 0.1], [3, 2, 1, -1, -2, -8], [2, 1, 0, 0, 0, -50]])
@pytest.mark.parametrize("length", [1.0, 3.0])
def test_of_a_quadratic_it_is_half_rho_squared_times_the_largest_eigenvalue(values: list[float], length: float):
    """Also where a negative eigenvalue is the largest in magnitude, on which the plain power method ends. There the
    steps must become shorter."""
    hessian = symmetric(values, 1)
    centre = torch.from_numpy(np.random.default_rng(2).standard_normal(len(values)))
    centre *= length / centre.norm()
    weights = centre.clone()

    def loss():
        yield 0.5 * (weights - centre) @ hessian @ (weights - centre)

    top = np.linalg.eigh(hessian.numpy())[0][-1]
    growth = sharpness(loss, [weights], Ascent(rho=0.1, steps=400))
    assert growth == pytest.approx((0.1 * length) ** 2 / 2 * top, rel=1e-6)
    assert torch.equal(weights, centre)
    few = sharpness(loss, [weights], Ascent(rho=0.1, steps=2))
    assert 0 <= few <= growth * (1 + 1e-9)


def test_of_a_least_squares_layer_it_is_the_largest_singular_value_of_its_inputs():
    """Weights that fit exactly: the loss is |x eps|^2 / 2 per output, so its curvature is x^T x for each row, also when
    the terms of the loss come one after another."""
    generator = torch.Generator().manual_seed(0)
    layer, x = nn.Linear(5, 2, bias=False).double(), torch.randn(9, 5, generator=generator).double()
    target = layer(x).detach()

    def loss():
        for part, wanted in zip(x.split(4), target.split(4), strict=True):
            yield 0.5 * (layer(part) - wanted).square().sum()

    radius = 0.05 * float(layer.weight.detach().norm())
    expected = radius**2 / 2 * np.linalg.svd(x.numpy())[1][0] ** 2
    assert sharpness(loss, [layer.weight], Ascent(steps=60)) == pytest.approx(expected, rel=1e-6)


def test_of_a_linear_loss_one_step_finds_radius_times_gradient():
    """Over two tensors of one layer, whose gradients differ in length."""
    weights = [torch.tensor([3.0, 0.0]).double(), torch.tensor([[4.0]]).double()]  # length 5
    how = Ascent(rho=0.2, steps=1)
    growth = sharpness(lambda: [2 * weights[0][0] - weights[0][1] + 2 * weights[1].sum()], weights, how)
    assert growth == pytest.approx(0.2 * 5 * 3)


def test_random_points_alone_never_leave_the_ball_and_depend_on_the_seed_and_the_layer():
    weights = torch.tensor([0.6, 0.8], dtype=torch.float64)
    start = weights.clone()
    distances: list[float] = []

    def loss():
        distances.append(float((weights.detach() - start).norm()))
        yield weights[0] * 1.0

    def of(seed: int, number: int) -> float:
        return sharpness(loss, [weights], Ascent(rho=0.5, steps=0, restarts=3, seed=seed), number=number)

    assert of(1, 2) == of(1, 2)
    assert len({of(1, 2), of(2, 2), of(1, 3)}) == 3
    assert max(distances) == pytest.approx(0.5)
    assert of(0, 0) <= 0.5
    with pytest.raises(BadRequest, match="steps is 0 and restarts is 0"):
        sharpness(loss, [weights], Ascent(steps=0))


def test_weights_get_their_bits_back_after_an_error_and_zero_weights_have_no_ball():
    weights = torch.tensor([1 / 3, 1e-8])
    before = weights.clone()
    calls = iter([1.0, float("inf")])
    with pytest.raises(ExportError, match="a smaller rho may help"):
        sharpness(lambda: [weights.sum() * next(calls)], [weights], Ascent())
    assert torch.equal(weights, before)
    assert not weights.requires_grad
    zeros = torch.zeros(3)
    assert sharpness(lambda: [zeros.sum()], [zeros], Ascent(restarts=2)) == 0


@pytest.mark.parametrize(
    ("peaks", "expected"),
    [
        ({"a": 1.0, "b": 9.0, "c": 1.1, "d": 1.2}, ["b"]),
        ({"a": 8.0, "b": 9.0, "c": 1.1, "d": 1.0, "e": 0.9}, ["b", "a"]),  # mean 4, deviation 3.7
        ({"a": 6.0, "b": 9.0, "c": 1.1, "d": 1.0, "e": 0.9}, ["b"]),  # mean 3.6, deviation 3.33
        ({"a": 2.0, "b": 2.0, "c": 2.0}, ["a"]),
        ({"a": 0.0, "b": 0.0}, []),
        ({"a": 2.0}, ["a"]),
    ],
)
def test_stragglers_are_a_deviation_above_the_mean_peak(peaks: dict[str, float], expected: list[str]):
    assert stragglers(peaks) == expected


# on nets


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """labels.json and images/"""
    folder, random, rows = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0), []
    (folder / "images").mkdir()
    for number in range(8):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"images/{number}.png")
        rows.append({"file": f"{number}.png", "label": ("cat", "dog")[number % 2]})
    (folder / "labels.json").write_text(json.dumps(rows))
    return folder


def test_a_small_step_grows_the_loss_by_the_gradient_of_transformers(tiny_hf_clip: Path, pictures: Path):
    """s = r |g| in a small ball, in both towers, for a block and a parameter of its own."""
    from transformers import CLIPModel

    net = NETS.get("clip").unfolded(str(tiny_hf_clip))
    data = zero_shot.read("p", pictures, net)
    reference = CLIPModel.from_pretrained(tiny_hf_clip).eval()
    out = reference(input_ids=data.tokens[0], pixel_values=data.pixels)
    torch.autograd.backward(nn.functional.cross_entropy(out.logits_per_image, data.truth))
    theirs = {
        "image.blocks.0": reference.vision_model.encoder.layers[0],
        "text.blocks.1": reference.text_model.encoder.layers[1],
        "text.projection": reference.text_projection,
        "image.norm_pre": reference.vision_model.pre_layrnorm,
    }
    named = {layer: names for layer, names in layers(net).items() if layer in theirs}
    growth = measure(net, data, named, Ascent(rho=2e-4, steps=1), "test")
    for layer, part in theirs.items():
        norms = [
            np.sqrt(sum(float(t.double().square().sum()) for t in tensors))
            for tensors in ([p.detach() for p in part.parameters()], [p.grad for p in part.parameters()])
        ]
        assert growth[layer] == pytest.approx(2e-4 * norms[0] * norms[1], rel=0.05), layer


def test_layers_are_blocks_and_what_lies_outside_of_them_or_every_module(tiny_hf_clip: Path):
    net = NETS.get("clip").unfolded(str(tiny_hf_clip))
    blocks, modules = layers(net), layers(net, modules=True)
    assert [name for name in blocks if name.startswith("image.")] == [
        "image.cls", "image.positions", "image.patch", "image.norm_pre", "image.blocks.0", "image.blocks.1",
        "image.norm_post", "image.projection",
    ]  # fmt: skip
    assert {"image.blocks.0.attn.qkv", "text.blocks.1.mlp.up", "text.tokens"} <= {*modules}
    every = sorted(f"{t.prefix}{n}" for t in net.towers.values() for n, _ in t.module.named_parameters())
    assert sorted(name for names in blocks.values() for name in names) == every
    assert sorted(name for names in modules.values() for name in names) == every


@pytest.mark.parametrize("name", ["hf_siglip", "altclip", pytest.param("openai_resnet", marks=pytest.mark.slow)])
def test_towers_compute_before_folding_what_they_compute_after_it(name: str, checkpoint: Callable[[str], Path]):
    """With gradients for every parameter."""
    net = NETS.get("clip").unfolded(str(checkpoint(name)))
    folded, generator = ready(net), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (2, net.towers["text"].preprocess.context), generator=generator)
    pixels = torch.randn(2, 3, *net.towers["image"].preprocess.size, generator=generator)
    for role, given in (("image", [pixels]), ("text", [ids, torch.ones_like(ids)])):
        tower = net.towers[role]
        inputs = given[: len(tower.inputs)]
        tower.module.requires_grad_(True)
        vectors = tower.module(*inputs)
        assert torch.allclose(vectors, folded.towers[role].module(*inputs), atol=1e-5)
        torch.autograd.backward((vectors**3).sum())
        still = [n for n, p in tower.module.named_parameters() if p.grad is None or not p.grad.any()]
        assert still == []


def test_the_mean_pool_of_resnets_computes_before_folding_what_it_computes_after_it():
    generator = torch.Generator().manual_seed(0)
    shapes = {"positions": (5, 16), "qkv.weight": (48, 16), "qkv.bias": (48,), "out.weight": (8, 16), "out.bias": (8,)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    pool = MeanPool(state, "", heads=2)
    pool.load_state_dict(state)
    x = torch.randn(3, 16, 2, 2, generator=generator)
    before = pool(x)
    pool.fold()
    assert torch.allclose(before, pool(x), atol=1e-5)


def test_a_tower_that_computes_something_else_after_folding_is_refused(
    tiny_hf_clip: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
):
    net = NETS.get("clip").unfolded(str(tiny_hf_clip))
    data = zero_shot.read("p", pictures, net)
    module.check(net, data)
    other = ready(net)
    other.towers["text"].module.norm_post.bias.data += 1
    monkeypatch.setattr(module, "ready", lambda net: other)
    with pytest.raises(BadRequest, match=r"text tower of .* computes only after its layers are folded"):
        module.check(NETS.get("clip").unfolded(str(tiny_hf_clip)), data)


@pytest.mark.slow
def test_a_tower_that_only_folding_completes_is_refused(checkpoint: Callable[[str], Path], pictures: Path):
    net = NETS.get("clip").unfolded(str(checkpoint("grain")))
    data = zero_shot.read("p", pictures, net)
    with pytest.raises(BadRequest, match=r"image tower of .* computes only after its layers are folded"):
        module.check(net, data)


def test_the_verb_finds_a_planted_straggler_and_prunes_its_changes(
    tiny_hf_clip: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A layer whose weights are ten times as large has a ball ten times as wide."""
    kin = tiny.hf_clip_kin(tmp_path / "kin", part="vision_model.encoder.layers.1.")
    call = ["sharpness", str(tiny_hf_clip), str(kin), "--data", f"p={pictures}", "--steps", "2", "--json"]
    call += ["--alphas", "0,1"]
    layer = "image.blocks.1"
    prune = ["--layers", layer, "--out", str(tmp_path / "out"), "--replace", "--prune"]
    sides = [load_file(path / "model.safetensors") for path in (tiny_hf_clip, kin)]
    for part, side in (("0", sides[0]), ("1", sides[1]), (".25", None)):
        assert main([*call, *prune, part]) == 0
        answer = json.loads(capsys.readouterr().out)
        written = load_file(tmp_path / "out/model.safetensors")
        if side is not None:
            assert all(torch.equal(tensor, side[name]) for name, tensor in written.items())
    names = [name for name in written if ".layers.1." in name and "vision" in name]
    changed = sum(int((sides[0][name] != sides[1][name]).sum()) for name in names)
    kept = sum(int((written[name] != sides[0][name]).sum()) for name in names)
    size = sum(written[name].numel() for name in names)
    assert changed == size
    assert kept == round(size / 4)
    assert answer["stragglers"] == [layer] == [*answer["layers"]]
    ends = open_ends(str(tiny_hf_clip), str(kin))
    data = zero_shot.read("p", pictures, ends.net)
    figures = answer["pruned"]["data"]["p"]
    assert figures["before"] == pytest.approx(zero_shot.score(ends.load(sides[1]), data).accuracy)
    assert figures["loss_after"] == pytest.approx(zero_shot.score(ends.load(written), data).loss, rel=1e-5)
    plot = tmp_path / "layers.png"
    assert main([*call[:-3], "--alphas", ".5", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "straggler" in out
    assert "text.blocks.1" in out
    with Image.open(plot) as drawn:
        assert drawn.format == "PNG"
