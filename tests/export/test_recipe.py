from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calmclip.export.nets import Net, Tower
from calmclip.export.recipe import load_recipe, recognise
from calmclip.models.bundle.manifest import Source, Tensor
from calmclip.models.errors import BadRequest, UnknownCheckpoint, UnknownName

TOWERS = {"image": Tower(torch.nn.Identity(), {}, {}, None, "none")}
SOURCE = Source(net="n", model="m", license="x")
NET = Net("n", SOURCE, ("raw",), TOWERS, {}, keep_float=True, bars={"max_megabytes": 35.0})


def test_defaults_come_from_the_net_then_the_file_then_the_flags(tmp_path: Path):
    file = tmp_path / "r.toml"
    file.write_text(
        'name = "from-file"\nkeep_float = false\n[bars]\nmin_text_cosine = 0.5\n[quantize.image]\nname = "none"\n'
    )
    plain = load_recipe("some/ViT B", "n", NET)
    assert (plain.name, plain.keep_float, plain.bars.max_megabytes) == ("vit-b", True, 35.0)
    mixed = load_recipe("x", "n", NET, file, name="from-flag", keep_float=None)
    assert (mixed.name, mixed.keep_float) == ("from-flag", False)
    assert (mixed.bars.min_text_cosine, mixed.bars.max_megabytes) == (0.5, 35.0)
    assert mixed.quantize["image"].name == "none"


def test_a_preset_quantizes_every_graph_that_the_file_does_not_name(tmp_path: Path):
    net = replace(NET, towers={"image": TOWERS["image"], "text": TOWERS["image"]})
    file = tmp_path / "r.toml"
    file.write_text('[quantize.text]\nname = "paper"\nparams = {weights = "mse"}\n')
    quantize = load_recipe("x", "n", net, file, preset="fast").quantize
    assert {role: (how.name, how.params) for role, how in quantize.items()} == {
        "image": ("fast", {}),
        "text": ("paper", {"weights": "mse"}),
    }
    file.write_text('preset = "papper"\n')
    with pytest.raises(UnknownName, match="did you mean 'paper'"):
        load_recipe("x", "n", net, file)


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("downloads/ViT-B-32.pt", "vit-b-32"),
        ("downloads/LaCLIP_1.5.ckpt", "laclip_1.5"),
        ("downloads/café-v1.0", "caf--v1.0"),  # a directory
    ],
)
def test_a_bundle_has_the_name_of_its_checkpoint_without_the_suffix(checkpoint: str, name: str):
    assert load_recipe(checkpoint, "n", NET).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae = 'x'", "nmae"),
        ("[bars]\nmin_image_cosinus = 1", "min_image_cosinus"),
        ("name = 'UPPER'", "name"),
        ("name = '" + "x" * 60 + "'", "name"),
        ("[quantize.imgae]\nname = 'none'", "did you mean 'image'"),
        ("[quantize.image]\nname = 'smoooth'", "did you mean 'smooth'"),
        ("[quantize.image]\nname = 'smooth'\nparams = {alpha = 5}", "alpha"),
        ("rewrites = ['sofmax']", "did you mean 'softmax'"),
        ("rewrites = ['soft_nms']", "attaches an op to a graph"),
        ("=", "cannot be read"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, message: str):
    file = tmp_path / "r.toml"
    file.write_text(text)
    with pytest.raises((BadRequest, UnknownName), match=message):
        load_recipe("x", "n", NET, file)


def test_checkpoints_are_recognised_by_their_content(tiny_hf_clip: Path, tiny_open_clip: Path, tmp_path: Path):
    assert recognise(str(tiny_hf_clip))[0] == "clip"
    assert recognise(str(tiny_open_clip))[0] == "clip"
    assert recognise("mini")[0] == "mini"
    with pytest.raises(UnknownCheckpoint, match=r"holds no file of weights; expected model\.safetensors"):
        recognise(str(tmp_path))
    save_file({"bert.pooler.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UnknownCheckpoint, match=r"no net recognises .* tensors include bert\.pooler\.weight"):
        recognise(str(tmp_path))
    with pytest.raises(UnknownCheckpoint, match="no directory and no built-in model"):
        recognise("vit-b-32")


def test_every_rule_that_swaps_is_on_unless_the_file_says_otherwise(tmp_path: Path):
    quantized = (
        "add", "attention", "average", "conv", "depthwise", "layer_norm", "linear", "linear_to_float", "lookup",
        "max_pool", "patches", "pointwise", "rows", "rows_linear", "stem",
    )  # fmt: skip
    swaps = ("clipped_softmax", *(f"quant_{name}" for name in quantized), "rotary_attention", "softmax")
    assert load_recipe("x", "n", NET).rewrites == swaps
    file = tmp_path / "r.toml"
    file.write_text("rewrites = []")
    assert load_recipe("x", "n", NET, file).rewrites == ()


def test_dimensions_are_ascending_prefixes_of_what_the_net_embeds(tmp_path: Path):
    file = tmp_path / "r.toml"
    file.write_text("dimensions = [2, 4]")
    vectors = {"image_embeds": Tensor(dtype="float32", shape=("B", 8))}
    net = replace(NET, tasks=("embed",), towers={"image": replace(TOWERS["image"], outputs=vectors)})
    assert load_recipe("x", "n", net, file).dimensions == (2, 4)
    assert load_recipe("x", "n", net, file, dimensions=(7,)).dimensions == (7,)
    for wrong in ((4, 2), (2, 2), (0, 2), (2, 8)):
        with pytest.raises(BadRequest, match="expected ascending numbers below 8"):
            load_recipe("x", "n", net, dimensions=wrong)
    with pytest.raises(BadRequest, match="n serves raw, not embed"):
        load_recipe("x", "n", NET, file)
