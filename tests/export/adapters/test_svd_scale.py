"""Singular values. Oracles: identities, explicit factors in float64, and the import of a CLIP-SVD checkpoint."""

import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from calmclip.export import parity, pipeline
from calmclip.export.adapters import Adapt
from calmclip.export.adapters.svd_scale import scaled
from calmclip.export.checkpoints import Weights
from calmclip.export.nets import Net
from calmclip.export.trace import example, to_onnx
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from tests.tiny_layouts import openai_like

UP = "visual.transformer.resblocks.1.mlp.c_fc"
KEY = "text_model.encoder.layers.0.self_attn.k_proj"  # Hugging Face's name


def load(checkpoint: Path, kind: str = "clip", facts: Weights | None = None, **params: object) -> Net:
    adapters = [Adapt(name="svd-scale", params=params)] if params else []
    return pipeline.load(kind, str(checkpoint), facts or Weights(), adapters)


def weights(net: Net) -> dict[str, Tensor]:
    return {f"{role}.{n}": t for role, tower in net.towers.items() for n, t in tower.module.state_dict().items()}


@pytest.mark.slow
def test_the_base_with_the_values_of_a_checkpoint_is_that_checkpoint(tmp_path: Path):
    """A training moved the values by up to a tenth. In one matrix, U and V of the file have other signs and another
    order than those computed here."""
    torch.manual_seed(0)
    state = openai_like.svd_state()
    for name, tensor in state.items():
        if name.endswith("vector_S"):
            state[name] = tensor * (1 + 0.1 * (2 * torch.rand_like(tensor) - 1))
    vectors = {name: tensor.contiguous() for name, tensor in state.items() if name.endswith("vector_S")}
    order, signs = torch.randperm(128), (torch.rand(128) < 0.5) * 2.0 - 1
    vectors[f"{UP}.vector_S"] = vectors[f"{UP}.vector_S"][:, order]
    vectors[f"{UP}.fc_U.weight"] = (state[f"{UP}.fc_U.weight"] * signs)[:, order].contiguous()
    vectors[f"{UP}.fc_V.weight"] = (state[f"{UP}.fc_V.weight"] * signs[:, None])[order].contiguous()
    save_file(vectors, tmp_path / "values.safetensors")
    base = openai_like.saved(dict(openai_like.openai().state_dict()), tmp_path)
    net = load(base, facts=Weights(activation="quick_gelu"), by=tmp_path / "values.safetensors")
    want = weights(load(openai_like.saved(state, tmp_path, "svd.pth")))
    for name, tensor in weights(net).items():
        assert torch.allclose(tensor, want[name], atol=2e-6), name
    assert net.source.notes.endswith("singular values of 24 matrices from values.safetensors")
    assert len(net.source.weights["svd-scale/values.safetensors"]) == 64


def test_untouched_values_are_the_identity(tiny_hf_clip: Path, tmp_path: Path):
    state = load_file(tiny_hf_clip / "model.safetensors")
    vectors = {
        name.replace("weight", "vector_S"): torch.linalg.svdvals(tensor)
        for name, tensor in state.items()
        if ".layers." in name and tensor.ndim == 2
    }
    assert len(vectors) == 2 * 2 * 6
    save_file(vectors, tmp_path / "values.safetensors")
    net = load(tiny_hf_clip, by=tmp_path / "values.safetensors")
    for name, tensor in weights(load(tiny_hf_clip)).items():
        assert torch.allclose(weights(net)[name], tensor, atol=1e-6), name


@pytest.mark.parametrize("kind", ["factor", "ratio"])
def test_only_the_chosen_matrices_are_multiplied_and_no_bias(kind: str, tiny_hf_clip: Path, tmp_path: Path):
    """k of the first text block, a third of qkv."""
    params: dict[str, object] = {"by": "1.5", "layers": "text.blocks.0.attn.k"}
    if kind == "ratio":
        save_file({f"{KEY}.ratio": torch.full((1, 32), 1.5)}, tmp_path / "values.safetensors")
        params = {"by": tmp_path / "values.safetensors"}
    before, after = weights(load(tiny_hf_clip)), weights(load(tiny_hf_clip, **params))
    for name, tensor in before.items():
        want = tensor.clone()
        if name == "text.blocks.0.attn.qkv.weight":
            want[32:64] *= 1.5
        assert torch.allclose(after[name], want, atol=1e-6), name


def test_a_layouts_own_names_are_known_in_other_nets(tiny_opt: Path, tmp_path: Path):
    save_file({"model.decoder.layers.1.fc1.ratio": torch.tensor([2.0])}, tmp_path / "values.safetensors")
    before, after = (
        weights(load(tiny_opt, "opt", **params))["lm.blocks.1.mlp.up.weight"]
        for params in ({}, {"by": tmp_path / "values.safetensors"})
    )
    assert torch.allclose(after, 2 * before, atol=1e-6)


def test_factors_answer_as_the_merged_matrix():
    """fc_U (s' fc_V x), in float64."""
    torch.manual_seed(0)
    weight, x, s = torch.randn(12, 8), torch.randn(5, 8, dtype=torch.float64), torch.rand(8) + 0.5
    u, _, v = torch.linalg.svd(weight.double(), full_matrices=False)
    merged = scaled(weight, {"vector_S": s[None]}, "w")
    assert torch.allclose(F.linear(F.linear(x, v) * s.double(), u), F.linear(x, merged), atol=1e-12)
    assert torch.allclose(torch.linalg.svdvals(merged), s.double().sort(descending=True).values, atol=1e-12)
    assert torch.allclose(scaled(weight, {"ratio": torch.tensor(3.0)}, "w"), 3 * weight.double(), atol=1e-12)


def test_equal_singular_values_that_are_changed_unequally_need_u_and_v():
    weight, s = torch.eye(4) * 2, torch.tensor([2.0, 2.0, 3.0, 2.0])
    assert torch.allclose(scaled(weight, {"ratio": torch.full((4,), 1.5)}, "w"), 1.5 * weight.double())
    with pytest.raises(UnknownCheckpoint, match="w: some singular values of this matrix are equal, and vector_S chang"):
        scaled(weight, {"vector_S": s}, "w")
    factors = {"fc_U.weight": torch.eye(4), "fc_V.weight": torch.eye(4)}
    assert torch.equal(scaled(weight, {"vector_S": s, **factors}, "w"), s.double().diag())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vector_S": torch.ones(1, 5)}, "w: vector_S holds 5 numbers; expected 4"),
        ({"ratio": torch.full((4,), torch.nan)}, "w: ratio holds infinities or NaN"),
        (
            {"vector_S": torch.ones(4), "fc_U.weight": torch.eye(4), "fc_V.weight": torch.eye(4)},
            r"miss \d+\.\d% of this",
        ),
        (
            {"vector_S": torch.ones(4), "fc_U.weight": torch.eye(4), "fc_V.weight": torch.eye(3)},
            r"do not make a matrix",
        ),
    ],
)
def test_values_that_do_not_fit_a_matrix_are_refused(given: dict[str, Tensor], message: str):
    torch.manual_seed(0)
    with pytest.raises(UnknownCheckpoint, match=message):
        scaled(torch.randn(4, 4), given, "w")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            KEY.replace("layers.0", "layers.7"),
            r"layers\.7\.self_attn\.k_proj is no matrix of this checkpoint; the first",
        ),
        ("conv1.weight", r"holds no singular values; expected tensors LAYER\.vector_S or LAYER\.ratio"),
    ],
)
def test_a_file_of_other_tensors_is_refused(name: str, message: str, tiny_hf_clip: Path, tmp_path: Path):
    save_file({f"{name}.vector_S" if "layers" in name else name: torch.ones(32)}, tmp_path / "values.safetensors")
    with pytest.raises(UnknownCheckpoint, match=message):
        load(tiny_hf_clip, by=tmp_path / "values.safetensors")


def test_a_pattern_without_a_matrix_names_some(tiny_hf_clip: Path):
    with pytest.raises(BadRequest, match=r"no matrix is called 'x\.\*'; the matrices are image\.blocks\.0\.attn\.q, "):
        load(tiny_hf_clip, by=2, layers="x.*")


def test_the_command_line_takes_it(tiny_hf_clip: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["recipe", str(tiny_hf_clip), "--svd-layers", "*.mlp.*", "--svd-scale", "1.25"]) == 0
    (adapter,) = tomllib.loads(capsys.readouterr().out)["adapters"]
    assert adapter == {"name": "svd-scale", "params": {"by": 1.25, "layers": "*.mlp.*"}}
    assert main(["recipe", str(tiny_hf_clip), "--svd-scale", "0"]) == 2
    assert "adapter svd-scale: by (--svd-scale): Value error, 0 is no factor; expected" in capsys.readouterr().err


@pytest.mark.slow
def test_its_graphs_answer_as_torch(tiny_hf_clip: Path):
    for role, tower in load(tiny_hf_clip, by=1.1, layers="*.attn.*").towers.items():
        feeds = [{name: tensor.numpy() for name, tensor in zip(tower.inputs, example(tower), strict=True)}]
        agreement = parity.compare(parity.torch_run(tower), parity.onnx_run(to_onnx(tower)), feeds, None)
        assert agreement[f"{role}_embeds"]["max_abs"] <= 1e-5
