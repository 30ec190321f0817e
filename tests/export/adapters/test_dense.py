"""The graph `dense` of a ViT, a ResNet and convolutions. Oracles: the definitions, written with the modules of the
libraries that the checkpoints come from, and identities with the vector of the whole picture."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
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
from calmclip.export.pipeline import build, load
from calmclip.export.recipe import Recipe
from calmclip.export.samples import pictures as pictures_that_ship
from calmclip.export.towers import Style
from calmclip.export.towers.dense import ClassToken, DenseTransformer, Positions
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.trace import to_onnx
from calmclip.models.bundle.manifest import Plugin
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Call, Flow
from calmclip.models.runner import Runner, open_bundle
from calmclip.models.tasks.features import prepared
from tests import towers
from tests.tiny_layouts import openai_like, references, trunks


def dense(checkpoint: Path, *before: Adapt, **params: Any) -> Net:
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
    """Oracle: the value and output layers of open_clip's pool, on the map that its convolutions give, with positions
    that torch enlarges."""
    net = dense(openai_like.openai_resnet(tmp_path), size="96x128")
    pixels = pictures(net)
    visual = openai_like.resnet_module().visual
    with torch.inference_mode():
        features = visual.stem(pixels)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            features = layer(features)
        pool = visual.attnpool
        table = pool.positional_embedding[1:].T.reshape(1, -1, 2, 2)
        cells = features + F.interpolate(table, (3, 4), mode="bicubic", align_corners=False)
        want = pool.c_proj(pool.v_proj(cells.permute(0, 2, 3, 1)))
    patches = graph(net, pixels)
    assert (patches - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.slow
def test_the_mean_of_convolutions_cells_is_the_pictures_vector(tmp_path: Path):
    """FastViT: the library's own vector before it is normalized. Its convolutions take any multiple of 32 pixels."""
    checkpoint = trunks.open_clip_timm_custom_text(tmp_path)
    net = dense(checkpoint, size="96x160")
    reference, pixels = references.REFERENCES["open_clip_timm_custom_text"](checkpoint), pictures(net)
    with torch.inference_mode():
        want = reference.image(pixels)
    patches = graph(net, pixels)
    assert net.towers["dense"].outputs["patches"].shape == ("B", *patches.shape[1:])
    assert patches.shape[1:3] == (3, 5)
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


@pytest.mark.slow
@pytest.mark.parametrize(("method", "fused"), [("values", 1), ("self", 1), ("vv", 3)])
def test_int8_keeps_the_patches_and_fuses_attention(tiny_hf_clip: Path, tmp_path: Path, method: str, fused: int):
    """Random weights. A tower of two blocks: the last block's own attention is not read by a map, each of `vv` is one
    more. The probabilities of `self` are summed over heads, so no operator holds them."""
    params: dict[str, Any] = {"method": method, "size": "48x64", **({} if method == "values" else {"blocks": 2})}
    recipe = Recipe(
        checkpoint=str(tiny_hf_clip),
        net="clip",
        name=method,
        adapters=(Adapt(name="dense", params=params),),
        keep_float=True,
    )
    int8, floats = (open_bundle(sealed.directory) for sealed in build(recipe, tmp_path))

    def patches(runner: Runner, picture: Path) -> Array:
        def flow() -> Flow[Array]:
            feeds, _ = yield from prepared(runner.bundle, picture, "dense")
            return (yield Call("dense", feeds))["patches"].reshape(48, -1)

        return runner.run(flow())

    pairs = [(patches(int8, picture), patches(floats, picture)) for picture in pictures_that_ship()[:4]]
    a, b = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.mean() > 0.995
    assert cosines.min() > 0.98
    graph = onnx.load(int8.bundle.directory / int8.bundle.manifest.graphs["dense"].file, load_external_data=False)
    assert sum(node.op_type == "QuantAttention" for node in graph.graph.node) == fused


@pytest.mark.slow
def test_the_image_graph_stays_as_it_is(tiny_hf_clip: Path):
    """Bit for bit, with the tensors that it holds."""
    plain = load("clip", str(tiny_hf_clip), Weights())
    both = dense(tiny_hf_clip, method="self", blocks=2, size="64")
    assert to_onnx(both.towers["image"]) == to_onnx(plain.towers["image"])


def test_methods_for_blocks_do_not_fit_convolutions(tmp_path: Path):
    with pytest.raises(
        BadRequest, match=r"dense self reads the blocks .* pools a map of convolutions; take --dense val"
    ):
        dense(openai_like.openai_resnet(tmp_path), method="self")


def test_nothing_follows_it(tiny_hf_clip: Path):
    stretch = Adapt(name="stretch", params={"tokens": 60})
    assert dense(tiny_hf_clip, stretch).adapters == ("stretch", "dense")
    with pytest.raises(BadRequest, match="stretch follows dense, which must come last"):
        load("clip", str(tiny_hf_clip), Weights(), [Adapt(name="dense", params={"method": "values"}), stretch])


def test_a_tower_without_cells_is_refused(tmp_path: Path):
    with pytest.raises(BadRequest, match=r"dense does not apply to .*queries that see all patches .*expected an image"):
        dense(openai_like.grain(tmp_path))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"size": "40x36"}, "--dense-size: 36 is no multiple of 8, the pixels of a cell; take 32 or 40"),
        ({"size": "4104"}, r"--dense-size: .*size \(4104, 4104\) is not within 1 to"),
        ({"size": "big"}, r"--dense-size"),
        ({"blocks": 1}, "--dense-blocks is 1, but values reads the last block; leave it out"),
        ({"method": "vv", "bare": True}, "--bare: vv never reads the last block's feed-forward; leave it out"),
        ({"method": "vv", "blocks": 3}, "--dense-blocks is 3; expected at most 2, the blocks of the tower"),
    ],
)
def test_params_that_do_not_fit_the_tower(tiny_hf_clip: Path, params: dict[str, Any], message: str):
    with pytest.raises(BadRequest, match=message):
        dense(tiny_hf_clip, **params)


def test_a_map_of_another_size(tiny_hf_clip: Path):
    tower = dense(tiny_hf_clip, size="48x64").towers["dense"]
    assert tower.preprocess.size == (48, 64)
    assert tower.inputs["pixels"].shape == ("B", 3, 48, 64)
    assert tower.outputs["patches"].shape == ("B", 6, 8, 16)
    assert tower.module(torch.zeros(1, 3, 48, 64)).shape == (1, 6, 8, 16)


def test_its_options(tiny_hf_clip: Path):
    typed = [flags.Typed("dense", {"method": "values"}), flags.Typed("dense", {"bare": True}, first=False)]
    (adapter,) = flags.merged((), typed)
    assert adapter.params == {"method": "values", "bare": True}
    options = {option.option: option for option in flags.declared() if option.name == "dense"}
    assert [*options] == [
        "--dense",
        "--dense-blocks",
        "--dense-size",
        "--dense-positions",
        "--bare",
        "--dinoiser",
        "--guide",
        "--guide-norm",
    ]
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
        tower = DenseTransformer(ClassToken(image, Positions((4, 4), (4, 4))), "values", 1, True, (4, 4)).eval()
        image.blocks[0].attn.gate = None  # so that the input of the last block is that of a tower without gates
        tower.fold()
        with torch.inference_mode():
            result: Tensor = tower(torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
        return result

    assert (patches("none") / 2 - patches("linear")).abs().max() < 1e-5
