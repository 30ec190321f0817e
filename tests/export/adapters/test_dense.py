"""The graph `dense` of a ViT, a ResNet and convolutions. Oracles: the definitions, written with the modules of the
libraries that the checkpoints come from, and identities with the vector of the whole picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from calmclip.export import flags, parity
from calmclip.export.adapters import Adapt
from calmclip.export.checkpoints import Weights
from calmclip.export.gates import GateKind
from calmclip.export.nets import Net
from calmclip.export.nets.common import dense_map
from calmclip.export.nets.common.region_detector import BACKGROUND, SCORES, detect_graph
from calmclip.export.pipeline import load
from calmclip.export.towers import Style
from calmclip.export.towers.dense import DenseTransformer
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Plugin
from calmclip.models.errors import BadRequest
from tests import towers
from tests.tiny_layouts import openai_like, references, trunks


def dense(checkpoint: Path, *before: Adapt, **params: bool) -> Net:
    return load(
        "clip", str(checkpoint), Weights(), [*before, Adapt(name="dense", params={"method": "values", **params})]
    )


def graph(net: Net, pixels: Tensor) -> Tensor:
    """The answer of the traced graph."""
    run = parity.onnx_run(to_onnx(net.towers["dense"]))
    return torch.from_numpy(run({"pixels": pixels.numpy()})["patches"])


def pictures(net: Net) -> Tensor:
    return torch.randn(
        2, 3, *net.towers["dense"].inputs["pixels"].shape[2:], generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("bare", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_transformers_patches_are_the_values_of_its_last_block(tiny_hf_clip: Path, bare: bool):
    net = dense(tiny_hf_clip, bare=bare)
    pixels = pictures(net)
    clip = transformers.CLIPModel.from_pretrained(tiny_hf_clip).eval()
    with torch.inference_mode():
        x = clip.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        last = clip.vision_model.encoder.layers[-1]
        v = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x)))
        if not bare:
            v = v + x
            v = v + last.mlp(last.layer_norm2(v))
        patches = clip.visual_projection(clip.vision_model.post_layernorm(v))[:, 1:].reshape(2, 4, 4, 16)
    assert (graph(net, pixels) - patches).abs().max() < 1e-4 * patches.abs().max()


@pytest.mark.slow
def test_a_resnets_cells_are_the_pools_answers_to_one_cell(tmp_path: Path):
    """Oracle: the value and output layers of open_clip's pool, on the map that its hook shows."""
    net = dense(openai_like.openai_resnet(tmp_path))
    pixels = pictures(net)
    visual = openai_like.resnet_module().visual
    seen: list[Tensor] = []
    visual.attnpool.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        visual(pixels)
        pool, (features,) = visual.attnpool, seen
        cells = features.flatten(2).permute(2, 0, 1) + pool.positional_embedding[1:, None]  # [h w, B, W]
        want = pool.c_proj(pool.v_proj(cells)).transpose(0, 1).reshape(2, 2, 2, 16)
    patches = graph(net, pixels)
    assert (patches - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.slow
def test_the_mean_of_convolutions_cells_is_the_pictures_vector(tmp_path: Path):
    """FastViT: the library's own vector before it is normalized."""
    checkpoint = trunks.open_clip_timm_custom_text(tmp_path)
    net = dense(checkpoint)
    reference, pixels = references.REFERENCES["open_clip_timm_custom_text"](checkpoint), pictures(net)
    with torch.inference_mode():
        want = reference.image(pixels)
    patches = graph(net, pixels)
    assert net.towers["dense"].outputs["patches"].shape == ("B", *patches.shape[1:])
    assert patches.shape[1] > 1
    assert F.cosine_similarity(patches.mean((1, 2)), want).min() > 1 - 1e-6


def test_a_graph_that_shows_a_part_is_scaled_to_show_the_whole_picture(tiny_hf_clip: Path):
    net = dense(tiny_hf_clip)
    image, whole = net.towers["image"].preprocess, net.towers["dense"].preprocess
    assert (image.resize, whole.resize, whole.size) == ("shortest", "letterbox", image.size)
    assert (whole.mean, whole.std, whole.resample) == (image.mean, image.std, image.resample)
    assert abs(whole.pad - 255 * np.mean(image.mean)) <= 0.5


def test_the_graphs_weights_are_those_of_the_image_graph(tmp_path: Path):
    """A bundle stores equal bytes once: all matrices of the map's convolutions but the values are in both graphs."""
    net = dense(openai_like.openai_resnet(tmp_path))
    weights = [{t.numpy().tobytes() for t in net.towers[role].module.parameters() if t.ndim == 4} for role in net.towers
               if role != "text"]  # fmt: skip
    assert weights[0] == weights[1]
    assert len(weights[0]) > 10


def test_nothing_follows_it(tiny_hf_clip: Path):
    stretch = Adapt(name="stretch", params={"tokens": 60})
    assert dense(tiny_hf_clip, stretch).adapters == ("stretch", "dense")
    with pytest.raises(BadRequest, match="stretch follows dense, which must come last"):
        load("clip", str(tiny_hf_clip), Weights(), [Adapt(name="dense", params={"method": "values"}), stretch])


def test_a_tower_without_cells_is_refused(tmp_path: Path):
    with pytest.raises(BadRequest, match=r"dense does not apply to .*expected an image tower"):
        dense(trunks.eva02(tmp_path))


def test_its_options(tiny_hf_clip: Path):
    typed = [flags.Typed("dense", {"method": "values"}), flags.Typed("dense", {"bare": True}, first=False)]
    (adapter,) = flags.merged((), typed)
    assert adapter.params == {"method": "values", "bare": True}
    options = {option.option: option for option in flags.declared() if option.name == "dense"}
    assert [*options] == ["--dense", "--bare"]
    assert options["--bare"].switch


def test_the_background_is_embedded_by_the_net(tiny_hf_clip: Path):
    net = dense(tiny_hf_clip)
    assert net.tasks[-1] == "detect"
    held = {tensor.name: tensor for tensor in net.built["detect"].model.graph.initializer}
    rows = np.frombuffer(held["background"].raw_data, np.float32).reshape(len(BACKGROUND), 16)
    clip = transformers.CLIPModel.from_pretrained(tiny_hf_clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_hf_clip)
    with torch.inference_mode():
        for phrase, row in zip(BACKGROUND, rows, strict=True):
            want = F.normalize(clip.get_text_features(**tokenizer([phrase], return_tensors="pt")).pooler_output)
            assert torch.cosine_similarity(want, torch.from_numpy(row.copy())[None]).item() > 1 - 1e-5


@pytest.mark.parametrize("head", SCORES)
def test_scores_are_the_heads_probabilities_times_objectness(head: str):
    random = np.random.default_rng(0)
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in random.standard_normal((3, 6, 8))]
    regions, texts, background = (rows.astype(np.float32) for rows in units)
    constants = {"scale": np.float32(7)}
    constants |= {"bias": np.float32(-2)} if head == "sigmoid" else {"background": background, "axis": np.array([1])}
    built = detect_graph(Plugin(name=head), 8, {name: np.asarray(value) for name, value in constants.items()})
    objectness = random.random((1, 6)).astype(np.float32)
    boxes = np.array([[[i, 0, i + 1, 1] for i in range(6)]], np.float32)
    feeds = {"class_embeds": regions[None], "boxes": boxes, "objectness": objectness, "text_embeds": texts[:2],
             "min_score": np.zeros(1, np.float32)}  # fmt: skip
    answer = parity.onnx_run(built.model)(feeds)
    exact = [rows.astype(np.float64) for rows in (regions, texts[:2], background)]
    if head == "sigmoid":
        pairs = 1 / (1 + np.exp(-(7 * exact[0] @ exact[1].T - 2)))
    else:
        powers = np.exp(7 * exact[0] @ np.concatenate(exact[1:]).T)
        pairs = powers[:, :2] / powers.sum(axis=1, keepdims=True)
    pairs *= objectness[0][:, None]
    assert answer["candidate_scores"] == pytest.approx(np.sort(pairs.ravel())[::-1], abs=1e-6)


def test_two_maps_are_compared_by_the_means_of_windows():
    """5 x 7 cells: windows of 2 x 3, at four heights and five places each."""
    patches = np.arange(2 * 5 * 7 * 3, dtype=np.float32).reshape(2, 5, 7, 3) ** 2
    rows = dense_map.summary({"patches": patches})["regions"]
    want = [patches[:, y : y + 2, x : x + 3].mean(axis=(1, 2)) for y in range(4) for x in range(5)]
    assert rows == pytest.approx(np.stack(want, axis=1))


def test_a_gate_multiplies_a_patchs_own_value():
    """Half of each head's value is half of the bare map, without a norm and without the output layer's bias."""

    def patches(gate: GateKind) -> Tensor:
        torch.manual_seed(0)
        state = {name: t for name, t in towers.state_of("vit", gate).items() if not name.startswith("norm_post")}
        state["blocks.1.attn.out.bias"] = torch.zeros(towers.WIDTH)
        image = VisionTransformer(state, Style(heads=towers.HEADS, pool="cls"))
        image.load_state_dict(state)
        tower = DenseTransformer(image, "values", True, (4, 4)).eval()
        image.blocks[0].attn.gate = None  # so that the input of the last block is that of a tower without gates
        tower.fold()
        with torch.inference_mode():
            result: Tensor = tower(torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
        return result

    assert (patches("none") / 2 - patches("linear")).abs().max() < 1e-5
