"""Pruned patches. Oracle: the rule with explicit loops, on the attention and the layers of transformers' CLIP."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from calmclip.export import flags, parity, pipeline, rewrites, samples
from calmclip.export.adapters import Adapt
from calmclip.export.checkpoints import Weights
from calmclip.export.nets import Net
from calmclip.export.quantizers import QUANTIZERS
from calmclip.export.towers import Style, prune
from calmclip.export.towers.image import VisionTransformer
from calmclip.export.trace import example, to_onnx
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest
from calmclip.models.ops.library import find
from calmclip.models.runner import open_bundle
from tests import tiny, towers
from tests.tiny_layouts import siglip

KEEP, AFTER, LAYERS, SIDE = 0.5, 2, 4, 14  # a grid of 14 x 14 patches has the paper's 7 x 7 cells


@pytest.fixture(scope="module")
def fourteen(tiny_hf_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prune") / "fourteen"
    shutil.copytree(tiny_hf_clip, folder)
    config = transformers.CLIPConfig.from_pretrained(folder)
    vision = config.vision_config
    vision.image_size, vision.patch_size, vision.num_hidden_layers = 2 * SIDE, 2, LAYERS
    torch.manual_seed(0)
    tiny.spread(transformers.CLIPModel(config)).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    sizes = {"size": {"shortest_edge": 2 * SIDE}, "crop_size": {"height": 2 * SIDE, "width": 2 * SIDE}}
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
    return folder


@pytest.fixture(scope="module")
def graphs(fourteen: Path) -> dict[str, onnx.ModelProto]:
    nets = {"plain": pipeline.load("clip", str(fourteen), Weights()), "pruned": pruned(fourteen)}
    return {name: to_onnx(net.towers["image"]) for name, net in nets.items()}


def pruned(checkpoint: Path, keep: float = KEEP, after: int | None = AFTER, *more: Adapt) -> Net:
    adapters = [Adapt(name="prune", params={"keep": keep, "after": after}), *more]
    return pipeline.load("clip", str(checkpoint), Weights(), adapters)


def pictures(rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, 2 * SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(1))


def by_definition(checkpoint: Path, pixels: Tensor, keep: float) -> tuple[Tensor, list[set[int]]]:
    """Unit vectors, and the kept cells of each row, one row at a time."""
    clip = transformers.CLIPModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    vision, vectors, cells = clip.vision_model, [], []
    for picture in pixels:
        with torch.inference_mode():
            seen = vision(pixel_values=picture[None], output_hidden_states=True, output_attentions=True)
            attention, x = seen.attentions[AFTER - 1][0], seen.hidden_states[AFTER]
            scores = [0.0] * 49
            for head in attention.double():
                for patch in range(SIDE * SIDE):
                    row, column = divmod(patch, SIDE)
                    scores[row // 2 * 7 + column // 2] += float(head[0, 1 + patch]) / len(attention) / 4
            best = sorted(range(49), key=lambda cell: -scores[cell])[: min(int(keep * 49) + 1, 49)]
            tokens = [0]
            for row in range(SIDE):
                for column in range(SIDE):
                    if row // 2 * 7 + column // 2 in best:
                        tokens.append(1 + row * SIDE + column)
            x = x[:, tokens]
            for layer in vision.encoder.layers[AFTER:]:
                x = layer(x, attention_mask=None)
                x = x[0] if isinstance(x, tuple) else x
            vectors.append(F.normalize(clip.visual_projection(vision.post_layernorm(x[:, 0]))))
        cells.append(set(best))
    return torch.cat(vectors), cells


@pytest.mark.parametrize("keep", [KEEP, pytest.param(0.1, marks=pytest.mark.slow)])
def test_the_kept_patches_are_those_of_the_definition_row_by_row(
    keep: float, fourteen: Path, graphs: dict[str, onnx.ModelProto]
):
    pixels = pictures()
    want, cells = by_definition(fourteen, pixels, keep)
    assert cells[0] != cells[1] != cells[2]  # each row has its own
    run = parity.onnx_run(graphs["pruned"] if keep == KEEP else to_onnx(pruned(fourteen, keep).towers["image"]))
    together = run({"pixels": pixels.numpy()})["image_embeds"]
    assert np.abs(together - want.numpy()).max() < 1e-4
    alone = [run({"pixels": pixels[i : i + 1].numpy()})["image_embeds"] for i in range(len(pixels))]
    assert np.abs(together - np.concatenate(alone)).max() < 1e-6
    whole = parity.onnx_run(graphs["plain"])({"pixels": pixels.numpy()})["image_embeds"]
    assert np.abs(whole - want.numpy()).max() > 1e-2  # so the bound above tells them apart


def test_int8_keeps_every_fused_operator_and_stays_near_float(graphs: dict[str, onnx.ModelProto]):
    counts, answers = {}, {}
    for name, model in graphs.items():
        quantizer = QUANTIZERS.get("fast")
        params, feeds = quantizer.params(), [{"pixels": row[None].numpy()} for row in pictures(8)]
        ranges = quantizer.observe(model, feeds, params)
        applied = rewrites.apply(quantizer.quantize(model, ranges, params), rewrites.swaps())
        counts[name] = Counter({rule: count for rule, count in applied.counts.items() if count})
        answers[name] = parity.compare(parity.onnx_run(model), parity.onnx_run(applied.model, library=find()), feeds)
    # q of the class token, k of all tokens, and their softmax
    assert counts["pruned"] - counts["plain"] == {"softmax": 1, "quant_linear_to_float": 2}
    assert not counts["plain"] - counts["pruned"]
    assert counts["plain"]["quant_attention"]
    assert answers["pruned"]["image_embeds"]["cosine"] > 0.98


def test_keeping_all_cells_changes_nothing(tiny_hf_clip: Path):
    plain = pipeline.load("clip", str(tiny_hf_clip), Weights()).towers["image"]
    for keep in (1.0, 0.97):  # int(.97 * 16) + 1 = 16
        net = pruned(tiny_hf_clip, keep, 1)
        tower = net.towers["image"]
        assert str(tower.module) == str(plain.module)
        assert tower.promises == plain.promises
        with torch.inference_mode():
            assert torch.equal(*(each.module(*example(each)) for each in (tower, plain)))
        assert "prune" not in net.source.notes


def test_the_scores_are_the_blocks_own_attention_with_norms_of_q_and_k():
    torch.manual_seed(0)
    state = towers.state_of("vit")
    for norm in ("q_norm", "k_norm"):
        for part in ("weight", "bias"):
            state[f"blocks.0.attn.{norm}.{part}"] = torch.randn(towers.WIDTH // towers.HEADS)
    image = VisionTransformer(state, Style(heads=towers.HEADS, pool="cls"))
    image.load_state_dict(state)
    image.pruning = prune.Pruning((4, 4), 3, after=1)
    image.requires_grad_(False).fold()
    attention, seen = image.blocks[0].attn, []
    read = image.blocks[0].read(image.tokens(torch.randn(2, 3, 16, 16)))
    scores = image.pruning.scores(attention, read)

    def remembered(logits: Tensor) -> Tensor:
        seen.append(logits.softmax(-1))
        return seen[-1]

    attention.softmax = remembered
    attention(read)
    assert torch.allclose(scores, seen[0].mean(1)[:, 0, 1:], atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "side"),
    [((14, 14), 2), ((7, 7), 1), ((16, 16), 2), ((24, 24), 3), ((28, 28), 4), ((4, 4), 1), ((37, 37), 1), ((14, 21), 1),
     ((14, 28), 2)],
)  # fmt: skip
def test_a_cell_is_the_largest_square_that_leaves_seven_on_a_side(grid: tuple[int, int], side: int):
    assert prune.cell_side(grid) == side


@pytest.mark.parametrize(("keep", "kept"), [(0.5, 25), (0.001, 1), (0.98, 49), (0.97, 48), (1.0, 49)])
def test_how_many_cells_of_the_paper_stay(keep: float, kept: int):
    assert prune.kept_cells(keep, 49) == kept


def test_a_map_beside_a_pruned_tower_is_the_whole_one(tiny_hf_clip: Path):
    dense = Adapt(name="dense", params={"method": "values"})
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nets = pruned(tiny_hf_clip, 0.5, 1, dense), pipeline.load("clip", str(tiny_hf_clip), Weights(), [dense])
    with torch.inference_mode():
        patches = [net.towers["dense"].module(pixels) for net in nets]
        vectors = [net.towers["image"].module(pixels) for net in nets]
    assert torch.equal(*patches)
    assert not torch.allclose(*vectors, atol=1e-3)


def test_it_refuses_what_has_no_class_token_and_a_block_that_none_follows(tiny_hf_clip: Path, tmp_path: Path):
    with pytest.raises(BadRequest, match=r"prune does not apply to .*expected .* with a class token"):
        pruned(siglip.hf_siglip(tmp_path))
    with pytest.raises(BadRequest, match=r"--prune-after is 2; expected 1 to 1, because the tower has 2 blocks"):
        pruned(tiny_hf_clip, 0.5, 2)
    with pytest.raises(BadRequest, match="pruned already"):
        pruned(tiny_hf_clip, 0.5, 1, Adapt(name="prune", params={"keep": 0.5}))
    with pytest.raises(BadRequest, match=r"keep \(--prune\): Input should be greater than 0"):
        pruned(tiny_hf_clip, 0.0, 1)


def test_a_classifier_of_pictures_is_pruned_too(tiny_vit: Path):
    net = pipeline.load("vit", str(tiny_vit), Weights(), [Adapt(name="prune", params={"keep": 0.5})])
    assert net.facts["prune"]["cells"] == [9, 16]
    assert 0.5 < net.facts["prune"]["cosine"] < 1
    assert net.towers["logits"].module.pruning.tokens == 10


def test_its_options():
    (adapter,) = flags.merged((), [flags.Typed("prune", {"keep": "0.5"}), flags.Typed("prune", {"after": "4"}, False)])
    assert adapter.params == {"keep": 0.5, "after": 4}


@pytest.mark.slow
def test_report_and_show_say_what_pruning_costs(tiny_hf_clip: Path, tmp_path: Path, capsys):
    """The cosine of the report is that of the two float bundles' vectors on the same pictures."""
    common = ["export", str(tiny_hf_clip), "--out", str(tmp_path), "--keep-float", "--json", "--name"]
    assert main([*common, "part", "--prune", "0.5"]) == 0
    told = SimpleNamespace(**json.loads(capsys.readouterr().out))
    assert main([*common, "whole"]) == 0
    facts = told.adapters["prune"]
    assert told.adapter_times["prune"]["torch_speed"] > 0
    assert (facts["after"], facts["cells"], facts["tokens"]) == (1, [9, 16], [10, 17])
    # width 32, MLP 64, vectors 16; so small a tower loses: 7 tokens less in the last block cost less than k of 17
    last = {n: n * 2 * 32**2 + 2 * 32**2 + 2 * n * 32 + 2 * 32 * 64 for n in (10, 17)}
    rest = 16 * 192 * 32 + 17 * (4 * 32**2 + 2 * 32 * 64) + 2 * 17**2 * 32 + 32 * 16
    choice = 17 * 32**2 + 32**2 + 17 * 32
    assert facts["macs_saved"] == pytest.approx(1 - (rest + choice + last[10]) / (rest + last[17]), abs=1e-5)
    rows = [open_bundle(tmp_path / f"{name}-float").embed(images=samples.pictures()) for name in ("part", "whole")]
    cosines = (rows[0].astype(np.float64) * rows[1]).sum(axis=1)
    assert facts["inputs"] == len(cosines)
    assert facts["cosine"] == pytest.approx(cosines.mean(), abs=2e-5)
    assert facts["cosine_min"] == pytest.approx(cosines.min(), abs=2e-5)
    capsys.readouterr()
    assert main(["show", "part-int8", "--bundles", str(tmp_path)]) == 0
    assert (
        f"adapter  prune: after 1, cells 9 of 16, tokens 10 of 17, cosine {facts['cosine']}" in capsys.readouterr().out
    )
