"""Upcycling. Oracles: the dense model for equal experts, and a sum over experts written out in float64."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calmclip.export import parity, pipeline
from calmclip.export.adapters import Adapt
from calmclip.export.checkpoints import Weights
from calmclip.export.nets import Net
from calmclip.export.towers.transformer import Experts
from calmclip.export.trace import example, to_onnx
from calmclip.models.bundle.store import read
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from tests import tiny

BLOCKS = tuple(f"{role}.blocks.{i}" for role in ("image", "text") for i in range(2))


@pytest.fixture(scope="module")
def kin(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints that differ from `tiny.hf_clip` in their MLPs alone."""
    folder = tmp_path_factory.mktemp("kin")
    return [tiny.hf_clip_kin(folder / f"kin{seed}", seed) for seed in (1, 2)]


@pytest.fixture
def routers(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    save_file({f"{block}.mlp.gate.weight": torch.randn(3, 32) for block in BLOCKS}, tmp_path / "routers.safetensors")
    return tmp_path / "routers.safetensors"


def load(checkpoint: Path, experts: list[Path] | None = None, **params: object) -> Net:
    adapters = [Adapt(name="upcycle", params={"checkpoints": experts, **params})] if experts else []
    return pipeline.load("clip", str(checkpoint), Weights(), adapters)


def mlps(net: Net) -> dict[str, torch.nn.Module]:
    return {f"{role}.blocks.{i}": net.towers[role].module.blocks[i].mlp for role in net.towers for i in range(2)}


def answers(net: Net) -> list[Tensor]:
    with torch.inference_mode():
        return [tower.module(*example(tower)) for tower in net.towers.values()]


def test_equal_experts_are_the_dense_model(tiny_hf_clip: Path, routers: Path):
    net = load(tiny_hf_clip, [tiny_hf_clip] * 2, routers=routers)
    assert all(isinstance(mlp, Experts) for mlp in mlps(net).values())
    for mixed, dense in zip(answers(net), answers(load(tiny_hf_clip)), strict=True):
        assert torch.allclose(mixed, dense, atol=1e-5)


@pytest.mark.parametrize("top", [1, 2, 3])
def test_a_mixture_is_the_sum_over_its_experts_dense_or_routed(top: int, tiny_hf_clip: Path, kin: list[Path], routers):
    """With all experts the weights are those of the softmax."""
    torch.manual_seed(0)
    x, gates = torch.randn(2, 5, 32), load_file(routers)
    alone = [mlps(load(path)) for path in (tiny_hf_clip, *kin)]
    both = [mlps(load(tiny_hf_clip, kin, routers=routers, top=top, routed=routed)) for routed in (False, True)]
    for block in BLOCKS:
        p = (x.double() @ gates[f"{block}.mlp.gate.weight"].double().T).softmax(-1)
        want = torch.zeros(2, 5, 32, dtype=torch.float64)
        for row in np.ndindex(2, 5):
            best = p[row].argsort(descending=True)[:top].tolist()
            for expert in best:
                want[row] += p[row][expert] / p[row][best].sum() * alone[expert][block](x[row]).double()
        for way in both:
            assert torch.allclose(way[block](x).double(), want, atol=1e-4 * float(want.abs().max())), block


def test_blocks_whose_mlps_are_equal_stay_dense_and_routers_are_drawn_by_the_seed(tiny_hf_clip: Path, tmp_path: Path):
    other = tiny.hf_clip_kin(tmp_path / "kin", part="vision_model.encoder.layers.1.mlp.")
    first, again, second = (load(tiny_hf_clip, [other], seed=seed) for seed in (0, 0, 1))
    assert [block for block, mlp in mlps(first).items() if isinstance(mlp, Experts)] == ["image.blocks.1"]
    gates = [mlps(net)["image.blocks.1"].gate.weight for net in (first, again, second)]
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])
    assert float(gates[0].abs().max()) <= 32**-0.5  # torch's default for a linear layer of 32 inputs
    assert "2 experts, 2 a token, in 1 blocks, with the MLPs of kin; untrained routers (seed 0)" in first.source.notes
    assert len(first.source.weights["upcycle/1/model.safetensors"]) == 64


def test_a_checkpoint_that_differs_elsewhere_is_refused_with_the_tensors(tiny_hf_clip: Path, tmp_path: Path):
    other = tiny.hf_clip_kin(tmp_path / "kin")
    file = other / "model.safetensors"
    state = load_file(file)
    state["text_model.final_layer_norm.bias"] += 0.25
    state["logit_scale"] += 1
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        UnknownCheckpoint,
        match=r"in 2 tensors: text_model\.final_layer_norm\.bias by up to 0\.25, logit_scale by up to \d+",
    ):
        load(tiny_hf_clip, [other])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text.blocks.9.mlp.gate.weight": (3, 32)},
            "text.blocks.9.mlp.gate.weight is the router of no block; expected ",
        ),
        ({"text.blocks.0.mlp.gate.weight": (2, 32)}, r"has the shape \[2, 32\]; expected \[3, 32\]"),
        ({"text.blocks.0.mlp.gate.weight": None}, r"lacks transformer\.resblocks\.0\.gate\.weight; the MLPs of this"),
    ],
)
def test_routers_that_do_not_fit_are_named(change, message: str, tiny_hf_clip: Path, kin: list[Path], routers: Path):
    state = load_file(routers)
    for name, shape in change.items():
        state.pop(name, None)
        state |= {name: torch.ones(shape)} if shape else {}
    save_file(state, routers)
    with pytest.raises(UnknownCheckpoint, match=message):
        load(tiny_hf_clip, kin, routers=routers)


def test_what_makes_no_mixture_is_refused(tiny_hf_clip: Path, kin: list[Path]):
    with pytest.raises(BadRequest, match="top is 4; there are 3 experts, this checkpoint's included"):
        load(tiny_hf_clip, kin, top=4)
    with pytest.raises(UnknownCheckpoint, match="the MLPs of all checkpoints are equal"):
        load(tiny_hf_clip, [tiny_hf_clip])
    twice = [Adapt(name="upcycle", params={"checkpoints": kin})] * 2
    with pytest.raises(BadRequest, match="is a mixture of experts already; expected a dense checkpoint"):
        pipeline.load("clip", str(tiny_hf_clip), Weights(), twice)


def test_the_command_line_takes_it(tiny_hf_clip: Path, kin: list[Path], routers: Path, capsys):
    more = ["--upcycle-top", "3", "--upcycle", ",".join(map(str, kin)), "--upcycle-routed"]
    assert main(["recipe", str(tiny_hf_clip), *more, "--upcycle-routers", str(routers)]) == 0
    (adapter,) = tomllib.loads(capsys.readouterr().out)["adapters"]
    want = {"checkpoints": [*map(str, kin)], "routers": str(routers), "top": 3, "routed": True}
    assert adapter == {"name": "upcycle", "params": want}
    assert Adapt(**adapter).public()["params"]["checkpoints"] == ["kin1", "kin2"]


@pytest.mark.slow
def test_dense_and_routed_graphs_are_one_function_and_a_bundle_is_sealed(
    tiny_hf_clip: Path, kin: list[Path], routers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    dense, routed = (load(tiny_hf_clip, kin, routers=routers, routed=routed) for routed in (False, True))
    for role, tower in dense.towers.items():
        feeds = [{name: tensor.numpy() for name, tensor in zip(tower.inputs, example(tower), strict=True)}]
        runs = [parity.onnx_run(to_onnx(net.towers[role])) for net in (dense, routed)]
        for run in runs:
            assert parity.compare(parity.torch_run(tower), run, feeds, None)[f"{role}_embeds"]["max_abs"] <= 1e-5
    command = ["export", str(tiny_hf_clip), "--upcycle", ",".join(map(str, kin)), "--name", "moe"]
    assert main([*command, "--out", str(tmp_path), "--upcycle-routed"]) == 0
    assert re.search(
        r"upcycle: 3 experts, 2 a token, in 4 blocks, with the MLPs of kin1, kin2; untrained routers \(seed 0\); "
        "tokens go to experts at random until they are trained",
        capsys.readouterr().out,
    )
    (bundle,) = tmp_path.glob("moe-*/")
    assert "untrained routers (seed 0)" in read(bundle).manifest.source.notes
