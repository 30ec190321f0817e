"""The graph `dense` with keys, objectness and a guide. Oracles: the definitions, on the modules of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export import parity
from calmclip.export.adapters import Adapt
from calmclip.export.checkpoints import Weights
from calmclip.export.nets import Net, float32
from calmclip.export.pipeline import load
from calmclip.export.trace import to_onnx
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from tests import tiny
from tests.tiny_layouts import openai_like

WIDTH, GRID, BLOCKS = 32, (4, 4), 4
GUIDE = """<ir_version: 8, opset_import: ["" : 17]>
dino (float[B, 3, 32, 32] x) => (float[B, 3, 8, 8] y) {
    y = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (x)
}"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_clip(tmp_path_factory.mktemp("clip") / "clip", BLOCKS)


def layers(file: Path, width: int = WIDTH, **changes: Tensor) -> Path:
    """A file as CLIP-DINOiser's training writes it, with random numbers."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"obj_proj.bias": (5,), "obj_proj.weight": (5, width, 3, 3),
              "bkg_decoder.bias": (1,), "bkg_decoder.weight": (1, width, 1, 1)}  # fmt: skip
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    torch.save({"epoch": 3, "model_state_dict": tensors | changes}, file)
    return file


@pytest.fixture
def dinoiser(tmp_path: Path) -> Path:
    return layers(tmp_path / "last.pt")


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(GUIDE), tmp_path / "dino.onnx")
    return tmp_path / "dino.onnx"


def given(params: Mapping[str, str], guide: Path, dinoiser: Path) -> dict[str, str]:
    """``params`` with the files that GUIDE and LAYERS stand for."""
    return {name: {"GUIDE": str(guide), "LAYERS": str(dinoiser)}.get(value, value) for name, value in params.items()}


def dense(checkpoint: Path, **params: Any) -> Net:
    return load("clip", str(checkpoint), Weights(), [Adapt(name="dense", params=params)])


def answers(net: Net, **feeds: Tensor) -> dict[str, Tensor]:
    """Of the module that is traced."""
    outputs = parity.torch_run(net.towers["dense"])({name: tensor.numpy() for name, tensor in feeds.items()})
    return {name: torch.from_numpy(array) for name, array in outputs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("params", [{"method": "values", "dinoiser": "LAYERS"}, {"method": "guided"},
                                    {"method": "guided", "guide": "GUIDE"}])  # fmt: skip
def test_the_traced_graph_answers_as_the_module(clip: Path, guide: Path, dinoiser: Path, params: Mapping[str, str]):
    net = dense(clip, **given(params, guide, dinoiser))
    tower, feeds = net.towers["dense"], {"pixels": pictures(), "guide": torch.randn(2, 8, 8, 3)}
    arrays = {name: feeds[name].numpy() for name in tower.inputs}
    outputs, traced = parity.torch_run(tower)(arrays), parity.onnx_run(to_onnx(tower))(arrays)
    assert {name: array.shape[1:] for name, array in traced.items()} == {
        name: spec.shape[1:] for name, spec in tower.outputs.items()
    }
    assert all(near(torch.from_numpy(traced[name]), torch.from_numpy(outputs[name])) for name in outputs)


def pictures() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def reference(clip: Path, pixels: Tensor) -> tuple[Any, Tensor, Tensor]:
    """-> transformers' model, the output of ln_2 in its block -3, and the input of its last block."""
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    inner: list[Tensor] = []
    model.vision_model.encoder.layers[-3].layer_norm2.register_forward_hook(lambda *called: inner.append(called[-1]))
    x = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    return model, inner[0][:, 1:], x


def near(answer: Tensor, want: Tensor) -> bool:
    return bool((answer - want).abs().max() < 1e-4 * want.abs().max())


@torch.inference_mode()
def test_dinoisers_layers_read_ln_2_of_the_third_block_from_the_end(clip: Path, dinoiser: Path):
    net = dense(clip, method="values", dinoiser=str(dinoiser))
    outputs, (_, inner, _) = answers(net, pixels=pictures()), reference(clip, pictures())
    tensors = torch.load(dinoiser)["model_state_dict"]
    plane = inner.transpose(1, 2).reshape(2, WIDTH, *GRID)
    project = nn.Conv2d(WIDTH, 5, 3, padding=1, padding_mode="replicate")
    project.weight.data, project.bias.data = tensors["obj_proj.weight"], tensors["obj_proj.bias"]
    assert near(outputs["keys"], F.normalize(project(plane), dim=1).permute(0, 2, 3, 1))
    decode = nn.Conv2d(WIDTH, 1, 1)
    decode.weight.data, decode.bias.data = tensors["bkg_decoder.weight"], tensors["bkg_decoder.bias"]
    assert near(outputs["objectness"], torch.sigmoid(decode(F.normalize(plane, dim=1)))[:, 0])
    plain = answers(dense(clip, method="values"), pixels=pictures())
    assert (outputs["patches"] == plain["patches"]).all()
    assert any(name.startswith("dinoiser/last.pt") for name in net.source.weights)


def definition(model: Any, x: Tensor, features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention by ``features`` [B, N, C] over the values of the last block, resized to ``grid`` -> [B, h, w, D]."""
    last = model.vision_model.encoder.layers[-1]
    values = last.self_attn.v_proj(last.layer_norm1(x))[:, 1:].transpose(1, 2).reshape(2, WIDTH, *GRID)
    values = F.interpolate(values, size=grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    rows = []
    for picture in range(2):
        unit = features[picture] / features[picture].norm(dim=-1, keepdim=True)
        alike = unit @ unit.T
        alike = 3.0 * (alike - 1.2 * alike.mean())
        alike[alike < 0] = -torch.inf
        rows.append(last.self_attn.out_proj(alike.softmax(-1) @ values[picture]))
    patches = model.visual_projection(model.vision_model.post_layernorm(torch.stack(rows)))
    return patches.reshape(2, *grid, 16)


@torch.inference_mode()
def test_the_last_block_is_guided_by_the_towers_own_features(clip: Path):
    outputs, (model, inner, x) = answers(dense(clip, method="guided"), pixels=pictures()), reference(clip, pictures())
    features = inner - inner.mean(dim=1, keepdim=True)
    assert near(outputs["patches"], definition(model, x, features, GRID))
    assert near(outputs["keys"], F.normalize(features, dim=-1).reshape(2, *GRID, WIDTH))


@torch.inference_mode()
def test_the_last_block_is_guided_by_another_network_on_its_own_grid(clip: Path, guide: Path):
    net = dense(clip, method="guided", guide=str(guide))
    tower = net.towers["guide"]
    assert [*net.towers][-2:] == ["guide", "dense"]  # a tower stands before those that read it
    assert net.towers["dense"].inputs["guide"] == tower.outputs["patches"] == float32("B", 8, 8, 3)
    features = torch.from_numpy(parity.onnx_run(tower.graph)({"pixels": pictures().numpy()})["patches"])
    outputs, (model, _, x) = answers(net, pixels=pictures(), guide=features), reference(clip, pictures())
    assert [*outputs] == ["patches"]
    assert near(outputs["patches"], definition(model, x, features.flatten(1, 2), (8, 8)))


def test_a_constant_picture_has_one_patch_everywhere_if_positions_do_not_count(clip: Path, guide: Path):
    """Its guide is constant, so every patch is the mean of all values."""
    pixels = torch.full((1, 3, 32, 32), 0.5)
    net = dense(clip, method="guided", guide=str(guide))
    patches = answers(net, pixels=pixels, guide=torch.full((1, 8, 8, 3), 0.5))["patches"]
    assert (patches - patches[:, :1, :1]).abs().max() < 1e-5 * patches.abs().max()


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"method": "values", "guide": "GUIDE"}, "--guide is read by --dense guided alone"),
        ({"method": "guided", "guide": "GUIDE", "dinoiser": "LAYERS"}, "both give keys"),
    ],
)
def test_params_that_do_not_fit_each_other(
    clip: Path, guide: Path, dinoiser: Path, params: Mapping[str, str], says: str
):
    with pytest.raises(BadRequest, match=says):
        dense(clip, **given(params, guide, dinoiser))


@pytest.mark.parametrize("params", [{"method": "guided"}, {"method": "values", "dinoiser": "LAYERS"}])
def test_towers_that_do_not_fit(tiny_hf_clip: Path, tmp_path: Path, dinoiser: Path, params: dict[str, str]):
    files = given(params, dinoiser, dinoiser)
    with pytest.raises(BadRequest, match="reads the third block from the end; the tower has 2"):
        dense(tiny_hf_clip, **files)
    with pytest.raises(BadRequest, match=r"reads the blocks of a transformer, but .* take --dense values alone"):
        dense(openai_like.openai_resnet(tmp_path), **files)


def test_a_file_of_other_layers_is_refused(clip: Path, tmp_path: Path):
    with pytest.raises(UnknownCheckpoint, match=r"wide.pt: obj_proj.weight has the shape \[5, 48, 3, 3\]; expected"):
        dense(clip, method="values", dinoiser=str(layers(tmp_path / "wide.pt", 48)))
    even = layers(tmp_path / "even.pt", **{"obj_proj.weight": torch.zeros(5, WIDTH, 2, 2)})
    with pytest.raises(UnknownCheckpoint, match="expected a square of an odd side"):
        dense(clip, method="values", dinoiser=str(even))
    torch.save({"obj_proj.weight": torch.zeros(5, WIDTH, 3, 3)}, tmp_path / "half.pt")
    with pytest.raises(UnknownCheckpoint, match=r"half.pt lacks obj_proj.bias"):
        dense(clip, method="values", dinoiser=str(tmp_path / "half.pt"))
