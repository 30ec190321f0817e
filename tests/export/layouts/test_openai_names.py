"""Layouts with OpenAI's names. Oracles: open_clip's modules, an archive run by torch.jit, float64 by hand.

`tests/families/test_layouts.py` compares the towers of each layout; these tests are specific to a layout.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calmclip.export.checkpoints import Weights
from calmclip.export.nets import Net
from calmclip.export.nets.clip import load
from calmclip.export.parity import onnx_run
from calmclip.export.trace import to_onnx
from calmclip.models.errors import UnknownCheckpoint
from tests.tiny_layouts import openai_like
from tests.tiny_layouts.references import moe_reference

TEXTS = torch.zeros(3, 40, dtype=torch.int64)
for row, length in enumerate((3, 9, 38)):
    TEXTS[row, 0] = 49406
    TEXTS[row, 1 : length - 1] = torch.arange(100, 100 + length - 2) * (row + 1)
    TEXTS[row, length - 1] = 49407
LONG = F.pad(TEXTS, (0, 77 - 40))


def pixels(side: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(3))


def embedded(net: Net, role: str, inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        return net.towers[role].module(inputs)


def close(embeds, want: Tensor, bound: float = 2e-5) -> None:
    assert np.abs(np.asarray(embeds) - want.detach().float().numpy()).max() <= bound


class Jit(nn.Module):
    """The content of OpenAI's .pt: flat names, settings as tensors, a program."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        for name, part in clip.named_children():
            setattr(self, name, part)
        for name, parameter in clip.named_parameters(recurse=False):
            setattr(self, name, parameter)
        for name, value in openai_like.MARKS.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x = self.token_embedding(text) + self.positional_embedding
        x = self.ln_final(self.transformer(x, attn_mask=torch.full((77, 77), -torch.inf).triu(1)))
        x = x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection
        return F.normalize(self.visual(image), dim=-1), F.normalize(x, dim=-1)


@pytest.mark.parametrize("half", [False, True])
def test_the_published_archive_equals_torch_jit(half: bool, tmp_path: Path):
    clip = openai_like.openai()
    with torch.no_grad():
        if half:  # as published: matrices and convolutions in float16
            for part in clip.modules():
                if isinstance(part, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
                    part.half()
        wide = Jit(clip).float().eval()
        program = torch.jit.trace(wide, (pixels(32, 2), LONG[:2]), check_trace=False)
    if half:
        program.half()
    program.save(str(tmp_path / "ViT.pt"))
    net = load(str(tmp_path / "ViT.pt"))
    with torch.no_grad():
        images, texts = torch.jit.load(str(tmp_path / "ViT.pt")).float()(pixels(32), LONG)
    close(embedded(net, "image", pixels(32)), images)
    close(embedded(net, "text", TEXTS), texts)
    assert net.source.notes.startswith("layout openai: ")


def test_the_graph_of_a_resnet_takes_any_batch_and_its_size_comes_from_its_pool(tmp_path: Path):
    net, inputs = load(str(openai_like.openai_resnet(tmp_path))), pixels(64, 5)
    graph = to_onnx(net.towers["image"])
    run = onnx_run(graph, threads=1)
    with torch.no_grad():
        want = openai_like.resnet_module().encode_image(inputs, normalize=True)
    for batch in (5, 1):
        close(run({"pixels": inputs[:batch].numpy()})["image_embeds"], want[:batch])
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
    spec = net.towers["image"].preprocess
    assert (spec.size, spec.shortest, spec.resample) == ((64, 64), 64, "bicubic")


@pytest.mark.parametrize("name", ["cloob", "cloob_flat", "cloob_vit", "cloob_vit_flat"])
def test_cloob_has_another_temperature(name: str, tmp_path: Path):
    net = load(str(getattr(openai_like, name)(tmp_path)))
    assert net.classifier.head.params["scale"] == pytest.approx(14.3)


def test_tables_of_different_shapes_are_both_named(tmp_path: Path):
    state = openai_like.long_clip_state()
    state["positional_embedding_res"] = state["positional_embedding_res"][:-1]
    with pytest.raises(
        UnknownCheckpoint, match=r"positional_embedding \[40, 64\] and positional_embedding_res \[39, 64\]"
    ):
        load(str(openai_like.saved(state, tmp_path)))


@pytest.mark.slow
def test_routed_experts_equal_the_paper_and_their_graph_takes_any_batch_and_length(tmp_path: Path):
    """The second block has experts; the first has none."""
    state = openai_like.clip_moe_state()
    net = load(str(openai_like.saved(state, tmp_path)), Weights(experts="routed"))
    images, texts = moe_reference(state, pixels(32), TEXTS)
    close(embedded(net, "image", pixels(32)), images)
    close(embedded(net, "text", TEXTS), texts)
    run = onnx_run(to_onnx(net.towers["text"]), threads=1)
    close(run({"ids": TEXTS.numpy()})["text_embeds"], texts)
    close(run({"ids": TEXTS[:1, :3].numpy()})["text_embeds"], texts[:1])
    assert net.towers["text"].preprocess.context == openai_like.CONTEXT


def test_equal_experts_are_the_dense_model(tmp_path: Path):
    state, plain = openai_like.clip_moe_state(first=0), openai_like.long_clip_state()
    for name in state:
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            state[name] = plain[f"{before}.mlp.{after.partition('.')[2]}"]
    for way in ("dense", "routed"):
        mixed = load(str(openai_like.saved(state, tmp_path)), Weights(experts=way))
        net = load(str(openai_like.saved(plain, tmp_path, "plain.pt")))
        for role, inputs in (("image", pixels(32)), ("text", TEXTS)):
            close(embedded(mixed, role, inputs), embedded(net, role, inputs), 5e-6)


@pytest.mark.parametrize(("scale", "rank"), [(1.0, None), (1.7, 20)])
def test_factored_weights_are_merged(scale: float, rank: int | None, tmp_path: Path):
    """CLIP-SVD's layer is fc_U (s fc_V x). open_clip's module gets the product, computed in float64."""
    state = openai_like.svd_state(scale, rank)
    net, clip = load(str(openai_like.saved(state, tmp_path))), openai_like.openai()
    for name, parameter in clip.named_parameters():
        layer = name.removesuffix(".weight").removesuffix(".in_proj_weight").replace("attn.out_proj", "attn.proj")
        parts = [f"{layer}.{letter}_proj" for letter in "qkv"] if name.endswith("in_proj_weight") else [layer]
        if f"{parts[0]}.vector_S" in state:
            factors = [
                [state[f"{p}.{of}"].double() for of in ("fc_U.weight", "vector_S", "fc_V.weight")] for p in parts
            ]
            parameter.data = torch.cat([u * s @ v for u, s, v in factors]).float()
    with torch.no_grad():
        close(embedded(net, "image", pixels(32)), clip.encode_image(pixels(32), normalize=True))
        close(embedded(net, "text", TEXTS), clip.encode_text(LONG, normalize=True))
    assert "merged" in net.source.notes


def test_factors_that_do_not_fit_together_are_named(tmp_path: Path):
    state = openai_like.svd_state()
    name = "visual.transformer.resblocks.1.mlp.c_fc.vector_S"
    state[name] = state[name][:, :-1]
    with pytest.raises(UnknownCheckpoint, match=r"c_fc\.fc_U\.weight \[512, 128\], .*c_fc\.vector_S \[127\]"):
        load(str(openai_like.saved(state, tmp_path)))


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (384, 12)])
def test_slip_heads_without_norms_of_q_and_k_are_64_wide_except_at_width_384(width, heads, tmp_path: Path):
    reference = openai_like.Slip(qk_norm=False, width=width, heads=heads)
    net = load(str(openai_like.saved(reference.state(), tmp_path)))
    with torch.no_grad():
        close(embedded(net, "image", pixels(32)), reference.encode_image(pixels(32)))
        close(embedded(net, "text", TEXTS), reference.encode_text(LONG))


def test_slip_prepares_pictures_by_the_defaults_of_torchvision(tmp_path: Path):
    spec = load(str(openai_like.slip(tmp_path))).towers["image"].preprocess
    assert (spec.resample, spec.shortest, spec.size) == ("bilinear", 32, (32, 32))
    assert spec.mean == pytest.approx((0.485, 0.456, 0.406))
    assert spec.std == pytest.approx((0.229, 0.224, 0.225))


def test_tensors_for_training_are_ignored(tmp_path: Path):
    state = openai_like.Slip(qk_norm=False, heads=1).state()
    plain = load(str(openai_like.saved(state, tmp_path, "plain.pt")))
    extra = {f"visual_ema.{n.removeprefix('visual.')}": t + 1 for n, t in state.items() if n.startswith("visual.")}
    extra |= {
        f"transformer_e.{n.removeprefix('transformer.')}": t for n, t in state.items() if n.startswith("transformer.")
    }
    extra |= {name: torch.ones(3, 2) for name in (
        "image_projection_e", "text_projection_e", "image_mlp.layer1.weight", "image_mlp.bn1.running_var",
        "im_proj_byol.0.weight", "im_proj_byol_e.1.bias", "im_pred_byol.3.weight",
    )}  # fmt: skip
    extended = load(str(openai_like.saved(state | extra, tmp_path, "aclip.pt")))
    for role, inputs in (("image", pixels(32)), ("text", TEXTS)):
        assert torch.equal(embedded(plain, role, inputs), embedded(extended, role, inputs))


def test_grain_resizes_pictures_to_a_square(tmp_path: Path):
    net = load(str(openai_like.grain(tmp_path)))
    spec = net.towers["image"].preprocess
    assert (spec.resize, spec.shortest, spec.resample) == ("exact", None, "bicubic")
    assert "its objectness is 1" in net.source.notes
