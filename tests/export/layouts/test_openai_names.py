"""Layouts in OpenAI's names. The oracles: open_clip's modules, torch.jit's own run of an archive, float64 by hand."""

from collections.abc import Callable
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


def by_onnx(net: Net, role: str, inputs: Tensor) -> np.ndarray:
    tower = net.towers[role]
    (name,) = tower.inputs
    return onnx_run(to_onnx(tower), threads=1)({name: inputs.numpy()})[f"{role}_embeds"]


def close(found, want: Tensor, bound: float = 2e-5) -> None:
    assert np.abs(np.asarray(found) - want.detach().float().numpy()).max() <= bound


class Jit(nn.Module):
    """OpenAI's CLIP as its .pt holds it: flat names, marks as numbers, a program."""

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
def test_the_published_archive_answers_as_torch_jit_runs_it(half: bool, tmp_path: Path):
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


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Net]:
    return openai_like.resnet_module(), load(str(openai_like.openai_resnet(tmp_path_factory.mktemp("rn"))))


def test_a_resnet_answers_as_open_clips_in_torch_and_as_a_graph_of_any_batch(resnet):
    clip, net = resnet
    with torch.no_grad():
        want = clip.encode_image(pixels(64, 5), normalize=True)
    close(embedded(net, "image", pixels(64, 5)), want)
    graph = to_onnx(net.towers["image"])
    run = onnx_run(graph, threads=1)
    close(run({"pixels": pixels(64, 5).numpy()})["image_embeds"], want)
    close(run({"pixels": pixels(64, 5)[:1].numpy()})["image_embeds"], want[:1])
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
    with torch.no_grad():
        close(embedded(net, "text", TEXTS), clip.encode_text(LONG, normalize=True))


def test_a_resnets_preprocessing_and_heads_come_from_its_pool(resnet):
    spec = resnet[1].towers["image"].preprocess
    assert (spec.size, spec.shortest, spec.resample) == ((64, 64), 64, "bicubic")


def test_an_open_clip_directory_of_a_resnet_is_the_same(resnet, tmp_path: Path):
    net = load(str(openai_like.open_clip_resnet(tmp_path / "rn")))
    for role, inputs in (("image", pixels(64)), ("text", TEXTS)):
        assert torch.equal(embedded(net, role, inputs), embedded(resnet[1], role, inputs))


@pytest.mark.parametrize(
    ("write", "module"),
    [
        (openai_like.cloob, openai_like.resnet_module),
        (openai_like.cloob_flat, openai_like.resnet_module),
        (openai_like.cloob_vit, openai_like.openai),
        (openai_like.cloob_vit_flat, openai_like.openai),
    ],
)
def test_cloob_is_its_towers_and_its_own_temperature(write: Callable, module: Callable, tmp_path: Path):
    net, clip = load(str(write(tmp_path))), module()
    side = net.towers["image"].preprocess.size[0]
    with torch.no_grad():
        close(embedded(net, "image", pixels(side)), clip.encode_image(pixels(side), normalize=True))
        close(embedded(net, "text", TEXTS), clip.encode_text(LONG, normalize=True))
    assert net.head.params["scale"] == pytest.approx(14.3)


def long_reference(state: dict[str, Tensor]) -> nn.Module:
    """open_clip's CLIP with the table made as Long-CLIP adds it: two masks, two tables."""
    clip = openai_like.openai(context=openai_like.CONTEXT)
    own = {name: tensor for name, tensor in state.items() if name != "positional_embedding_res"}
    keep = (torch.arange(openai_like.CONTEXT) < 20)[:, None]
    own["positional_embedding"] = own["positional_embedding"] * keep + state["positional_embedding_res"] * ~keep
    clip.load_state_dict(own)
    return clip


def test_long_clip_adds_its_two_tables(tmp_path: Path):
    net, clip = load(str(openai_like.long_clip(tmp_path))), long_reference(openai_like.long_clip_state())
    with torch.no_grad():
        close(embedded(net, "image", pixels(32)), clip.encode_image(pixels(32), normalize=True))
        want = clip.encode_text(TEXTS, normalize=True)
    close(embedded(net, "text", TEXTS), want)
    close(by_onnx(net, "text", TEXTS), want)
    assert net.towers["text"].preprocess.context == openai_like.CONTEXT


def test_two_tables_of_two_shapes_are_both_named(tmp_path: Path):
    state = openai_like.long_clip_state()
    state["positional_embedding_res"] = state["positional_embedding_res"][:-1]
    with pytest.raises(
        UnknownCheckpoint, match=r"positional_embedding \[40, 64\] and positional_embedding_res \[39, 64\]"
    ):
        load(str(openai_like.saved(state, tmp_path)))


def moe_block(state: dict[str, Tensor], prefix: str, x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """y = x + sum_k p_k expert_k(ln_2(x)), p = softmax(gate), the two best renormalised. Float64, token by token."""
    own = {name.removeprefix(prefix): tensor.double() for name, tensor in state.items() if name.startswith(prefix)}
    width = x.shape[-1]
    normed = F.layer_norm(x, (width,), own["ln_1.weight"], own["ln_1.bias"])
    qkv = F.linear(normed, own["attn.in_proj_weight"], own["attn.in_proj_bias"]).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, 64)).transpose(1, 2) for part in qkv)
    logits = q @ k.mT / 8 + (0 if mask is None else mask)
    mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    x = x + F.linear(mixed, own["attn.out_proj.weight"], own["attn.out_proj.bias"])
    normed = F.layer_norm(x, (width,), own["ln_2.weight"], own["ln_2.bias"])

    def mlp(token: Tensor, name: str) -> Tensor:
        up = F.linear(token, own[f"{name}.c_fc.weight"], own[f"{name}.c_fc.bias"])
        return F.linear(up * torch.sigmoid(1.702 * up), own[f"{name}.c_proj.weight"], own[f"{name}.c_proj.bias"])

    if "gate.weight" not in own:
        return x + mlp(normed, "mlp")
    found = x.clone()
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            p = F.linear(normed[b, t], own["gate.weight"]).softmax(-1)
            best = p.argsort(descending=True)[:2]
            for e in best:
                found[b, t] += p[e] / p[best].sum() * mlp(normed[b, t], f"experts.{e}")
    return found


def moe_reference(state: dict[str, Tensor], images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    wide = {name: tensor.double() for name, tensor in state.items()}
    x = F.conv2d(images.double(), wide["visual.conv1.weight"], stride=8).flatten(2).mT
    x = (
        torch.cat([wide["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
        + wide["visual.positional_embedding"]
    )
    x = F.layer_norm(x, x.shape[-1:], wide["visual.ln_pre.weight"], wide["visual.ln_pre.bias"])
    for i in range(2):
        x = moe_block(state, f"visual.transformer.resblocks.{i}.", x, 2, None)
    x = F.layer_norm(x[:, 0], x.shape[-1:], wide["visual.ln_post.weight"], wide["visual.ln_post.bias"])
    first = F.normalize(x @ wide["visual.proj"], dim=-1)
    table = torch.cat([wide["positional_embedding"][:20], wide["positional_embedding_res"][20:]])
    x = wide["token_embedding.weight"][ids] + table
    mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)
    for i in range(2):
        x = moe_block(state, f"transformer.resblocks.{i}.", x, 1, mask)
    x = F.layer_norm(x, x.shape[-1:], wide["ln_final.weight"], wide["ln_final.bias"])
    x = x[torch.arange(len(x)), ids.argmax(-1)] @ wide["text_projection"]
    return first, F.normalize(x, dim=-1)


def test_experts_answer_as_the_paper_has_it_dense_and_routed(tmp_path: Path):
    """The first block is a plain one, the second of experts."""
    state = openai_like.clip_moe_state()
    file = openai_like.saved(state, tmp_path)
    images, texts = moe_reference(state, pixels(32), TEXTS)
    dense, routed = load(str(file)), load(str(file), Weights(experts="routed"))
    for net in (dense, routed):
        close(embedded(net, "image", pixels(32)), images)
        close(embedded(net, "text", TEXTS), texts)
    assert dense.towers["text"].preprocess.context == openai_like.CONTEXT


def test_routed_experts_are_a_graph_of_any_batch_and_length(tmp_path: Path):
    state = openai_like.clip_moe_state()
    net = load(str(openai_like.saved(state, tmp_path)), Weights(experts="routed"))
    _, texts = moe_reference(state, pixels(32), TEXTS)
    run = onnx_run(to_onnx(net.towers["text"]), threads=1)
    close(run({"ids": TEXTS.numpy()})["text_embeds"], texts)
    close(run({"ids": TEXTS[:1, :3].numpy()})["text_embeds"], texts[:1])


def test_experts_that_are_all_alike_are_the_dense_model(tmp_path: Path):
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


class Factored(nn.Module):
    """CLIP-SVD's layer: fc_V, times s, fc_U and its bias."""

    def __init__(self, state: dict[str, Tensor], name: str) -> None:
        super().__init__()
        self.parts = [
            state[f"{name}.{part}"].double() for part in ("fc_V.weight", "vector_S", "fc_U.weight", "fc_U.bias")
        ]

    def forward(self, x: Tensor) -> Tensor:
        v, s, u, bias = self.parts
        return F.linear(F.linear(x, v) * s, u, bias)


def svd_block(state: dict[str, Tensor], prefix: str, x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    def layer(name: str, x: Tensor) -> Tensor:
        return Factored(state, prefix + name)(x)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *(state[f"{prefix}{name}.{p}"].double() for p in ("weight", "bias")))

    normed = norm("ln_1", x)
    q, k, v = (layer(f"attn.{one}_proj", normed).unflatten(-1, (heads, 64)).transpose(1, 2) for one in "qkv")
    logits = q @ k.mT / 8 + (0 if mask is None else mask)
    x = x + layer("attn.proj", (logits.softmax(-1) @ v).transpose(1, 2).flatten(-2))
    up = layer("mlp.c_fc", norm("ln_2", x))
    return x + layer("mlp.c_proj", up * torch.sigmoid(1.702 * up))


@pytest.mark.parametrize(("scale", "rank"), [(1.0, None), (1.7, 20)])
def test_factored_weights_merged_answer_as_the_factored_layers(scale: float, rank: int | None, tmp_path: Path):
    state = openai_like.svd_state(scale, rank)
    net = load(str(openai_like.saved(state, tmp_path)))
    wide = {name: tensor.double() for name, tensor in state.items()}
    x = wide["token_embedding.weight"][LONG] + wide["positional_embedding"]
    mask = torch.full((77, 77), -torch.inf, dtype=torch.float64).triu(1)
    for i in range(2):
        x = svd_block(state, f"transformer.resblocks.{i}.", x, 1, mask)
    x = F.layer_norm(x, x.shape[-1:], wide["ln_final.weight"], wide["ln_final.bias"])
    want = F.normalize(x[torch.arange(3), LONG.argmax(-1)] @ wide["text_projection"], dim=-1)
    close(embedded(net, "text", TEXTS), want)


def test_singular_values_that_were_not_touched_give_the_weights_back(tmp_path: Path):
    net = load(str(openai_like.saved(openai_like.svd_state(), tmp_path)))
    clip = openai_like.openai()
    with torch.no_grad():
        close(embedded(net, "image", pixels(32)), clip.encode_image(pixels(32), normalize=True))
    assert "merged" in net.source.notes


def test_factors_that_do_not_go_together_are_named(tmp_path: Path):
    state = openai_like.svd_state()
    name = "visual.transformer.resblocks.1.mlp.c_fc.vector_S"
    state[name] = state[name][:, :-1]
    with pytest.raises(UnknownCheckpoint, match=r"c_fc\.fc_U\.weight \[512, 128\], .*c_fc\.vector_S \[127\]"):
        load(str(openai_like.saved(state, tmp_path)))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_slip_is_timms_vit_and_open_clips_text(qk_norm: bool, tmp_path: Path):
    """With norms of q and k the heads are read from them; without, they are 64 wide."""
    reference = openai_like.Slip(qk_norm=qk_norm, heads=2 if qk_norm else 1)
    net = load(str(openai_like.saved(reference.state(), tmp_path)))
    with torch.no_grad():
        images, texts = reference.encode_image(pixels(32)), reference.encode_text(LONG)
    close(embedded(net, "image", pixels(32)), images)
    close(embedded(net, "text", TEXTS), texts)
    if qk_norm:
        close(by_onnx(net, "image", pixels(32)), images)


def test_a_slip_vit_of_384_has_12_heads(tmp_path: Path):
    reference = openai_like.Slip(qk_norm=False, width=384, heads=12)
    net = load(str(openai_like.saved(reference.state(), tmp_path)))
    with torch.no_grad():
        close(embedded(net, "image", pixels(32)), reference.encode_image(pixels(32)))


def test_slip_sees_pictures_as_torchvision_does_by_default(tmp_path: Path):
    spec = load(str(openai_like.slip(tmp_path))).towers["image"].preprocess
    assert (spec.resample, spec.shortest, spec.size) == ("bilinear", 32, (32, 32))
    assert spec.mean == pytest.approx((0.485, 0.456, 0.406))
    assert spec.std == pytest.approx((0.229, 0.224, 0.225))


def test_what_a_clip_keeps_for_its_training_is_left_out(tmp_path: Path):
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
    whole = load(str(openai_like.saved(state | extra, tmp_path, "aclip.pt")))
    for role, inputs in (("image", pixels(32)), ("text", TEXTS)):
        assert torch.equal(embedded(plain, role, inputs), embedded(whole, role, inputs))


def test_grain_answers_by_the_pictures_query(tmp_path: Path):
    net = load(str(openai_like.grain(tmp_path)))
    backbone, decoder = openai_like.Slip(qk_norm=True), openai_like.Decoder()
    with torch.no_grad():
        want = F.normalize(decoder(backbone.visual.forward_features(pixels(32))), dim=-1)
        close(embedded(net, "text", TEXTS), backbone.encode_text(LONG))
    close(embedded(net, "image", pixels(32)), want)
    close(by_onnx(net, "image", pixels(32)), want)
    spec = net.towers["image"].preprocess
    assert (spec.resize, spec.shortest, spec.resample) == ("exact", None, "bicubic")
    assert "regions are not" in net.source.notes
