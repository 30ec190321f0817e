"""Edits of weights. Oracles: golden vector A.5, formulas, exact bits, open_clip with edited weights."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from calmclip.export import flags, pipeline
from calmclip.export.adapters import Adapt, tensors
from calmclip.export.adapters.mix import mix, mix_heads
from calmclip.export.adapters.stretch import stretch
from calmclip.export.checkpoints import Weights
from calmclip.export.nets import NETS, Net
from calmclip.export.recipe import load_adapters, load_recipe
from calmclip.models.bundle.manifest import Plugin
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from tests import tiny
from tests.tiny_layouts import bert, openai_like

RAMP = torch.arange(77.0)[:, None].expand(77, 3).contiguous()


def test_a_stretched_ramp_is_a_slower_ramp():
    """new[20 + m] = 20 + m / 4; the last is 76.75 (golden vector A.5)."""
    new = stretch(RAMP, 248)
    want = torch.cat([torch.arange(20.0), 20 + torch.arange(228.0) / 4])
    assert torch.equal(new, want[:, None].expand(248, 3))
    assert new[-1, 0] == 76.75


def test_a_stretch_is_the_papers_formula_on_any_table():
    table = torch.randn(77, 5, generator=torch.Generator().manual_seed(0))
    new = stretch(table, 248)
    p = table.double()
    assert torch.equal(new[:20], table[:20])
    for i in range(56):
        for j in range(4):
            assert torch.allclose(new[20 + 4 * i + j].double(), ((4 - j) * p[20 + i] + j * p[21 + i]) / 4, atol=1e-7)
    for j in range(4):
        assert torch.allclose(new[244 + j].double(), p[76] + j * (p[76] - p[75]) / 4, atol=1e-7)


def test_stretch_changes_neither_its_argument_nor_a_table_of_that_length():
    before = RAMP.clone()
    stretch(RAMP, 248)
    assert torch.equal(RAMP, before)
    assert torch.equal(stretch(RAMP, 77), before)


@pytest.mark.parametrize("context", [2, 20, 76, 78, 200, 247])
def test_a_stretch_by_no_whole_ratio_names_the_possible_lengths(context: int):
    with pytest.raises(BadRequest, match="134, 191, 248"):
        stretch(RAMP, context)


@pytest.mark.parametrize("rows", [10, 20, 21])
def test_a_table_too_short_to_stretch(rows: int):
    with pytest.raises(BadRequest, match=f"of {rows} positions"):
        stretch(torch.ones(rows, 2), 248)


def test_a_mix_at_0_or_1_equals_one_side_bit_by_bit():
    """Also -0.0, and a number that a product would round to 0."""
    base = {"w": torch.tensor([-0.0, 1e-45, 3.0, 1 / 3]), "n": torch.tensor(7)}
    other = {"w": torch.tensor([0.0, -1e-45, -0.0, 7.7]), "n": torch.tensor(9)}
    heads = [Plugin(name="cosine", params={"scale": scale}) for scale in (100.00000762939453, 14.285714149475098)]
    for alpha, side, head in ((0.0, base, heads[0]), (1.0, other, heads[1])):
        mixed = mix(base, other, alpha, "other.pt")
        assert mixed["w"].numpy().tobytes() == side["w"].numpy().tobytes()
        assert mixed["n"] == 7
        assert mix_heads(*heads, alpha, "other.pt") == head


def test_a_mix_is_linear_and_the_temperature_geometric():
    """exp of the mean of logarithms is the root of the product."""
    assert mix({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}, 0.25, "")["w"].tolist() == [1.5, 1.0]
    base, other = (Plugin(name="sigmoid", params={"scale": s, "bias": b}) for s, b in ((100.0, -10.0), (25.0, -8.0)))
    assert mix_heads(base, other, 0.5, "").params == pytest.approx({"scale": 50.0, "bias": -9.0})
    with pytest.raises(UnknownCheckpoint, match=r"x\.pt is scored by the head cosine; the base by sigmoid"):
        mix_heads(base, Plugin(name="cosine", params={"scale": 1.0}), 0.5, "x.pt")


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_alpha_outside_0_to_1_is_refused(alpha: float):
    with pytest.raises(BadRequest, match="from 0 to 1"):
        mix({}, {}, alpha, "")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.ones(3), "b": torch.ones(2)}, r"x\.pt: a has the shape \[3\]; the base's is \[2\]"),
        ({"a": torch.ones(2)}, r"x\.pt lacks b"),
        ({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(1)}, r"x\.pt holds c"),
    ],
)
def test_a_mix_of_other_tensors_names_the_tensor(other: dict, message: str):
    with pytest.raises(UnknownCheckpoint, match=message):
        mix({"a": torch.ones(2), "b": torch.ones(2)}, other, 0.5, "x.pt")


# through the net, on files


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.openai(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned() -> torch.nn.Module:
    return openai_like.openai(seed=7)


def load(checkpoint: Path, **params_by_name: dict[str, object]) -> Net:
    """The net with these adapters, in their order."""
    adapters = [Adapt(name=name, params=params) for name, params in params_by_name.items()]
    return pipeline.load("clip", str(checkpoint), Weights(), adapters)


PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[49406, 320, 1125, 539, 49407], [49406, 5, 6, 49407, 0]])


def vectors(net, role: str) -> torch.Tensor:
    with torch.inference_mode():
        return net.towers[role].module(PIXELS if role == "image" else IDS)


def visual(module: torch.nn.Module, prefix: str = "visual.") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in module.visual.state_dict().items()}


def every(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())


def bare(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return visual(module, "")


def wrapped(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {"state_dict": {f"module.{name}": tensor for name, tensor in visual(module).items()}}


def hugging_face(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The names of CLIPVisionModelWithProjection."""
    names = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
    }
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
             "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    state = {}
    for name, tensor in module.visual.state_dict().items():
        if name == "proj":
            state["visual_projection.weight"] = tensor.T.contiguous()
        elif ".in_proj_" in name:
            _, _, i, _, last = name.split(".", 4)
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                kind = last.removeprefix("in_proj_")
                state[f"vision_model.encoder.layers.{i}.self_attn.{part}_proj.{kind}"] = piece.contiguous()
        elif name.startswith("transformer."):
            _, _, i, tail = name.split(".", 3)
            layer, _, kind = tail.rpartition(".")
            state[f"vision_model.encoder.layers.{i}.{inner[layer]}.{kind}"] = tensor
        else:
            new = names.get(name) or name.replace("ln_pre", "pre_layrnorm").replace("ln_post", "post_layernorm")
            state[f"vision_model.{new}"] = tensor
    return state


@pytest.mark.parametrize("names", [visual, every, bare, wrapped, hugging_face])
def test_over_reads_an_image_tower_with_any_names(names, base: Path, tuned, tmp_path: Path):
    torch.save(names(tuned), tmp_path / "tuned.pth")
    net = load(base, over={"checkpoint": tmp_path / "tuned.pth"})
    with torch.no_grad():
        want = F.normalize(tuned.encode_image(PIXELS), dim=-1)
    assert torch.allclose(vectors(net, "image"), want, atol=2e-5)
    assert torch.equal(vectors(net, "text"), vectors(load(base), "text"))
    assert len(net.source.weights["over/tuned.pth"]) == 64
    assert "image tower of tuned.pth" in net.source.notes


def test_over_without_a_projection_keeps_that_of_the_base(base: Path, tuned, tmp_path: Path):
    state = visual(tuned)
    del state["visual.proj"]
    torch.save(state, tmp_path / "tuned.pth")
    net = load(base, over={"checkpoint": tmp_path / "tuned.pth"})
    mixed = openai_like.openai(seed=7)
    mixed.visual.proj = tiny.openai_module().visual.proj
    with torch.no_grad():
        assert torch.allclose(vectors(net, "image"), F.normalize(mixed.encode_image(PIXELS), dim=-1), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("visual.ln_post.weight", lambda t: None, r"tuned\.pth lacks visual\.ln_post\.weight"),
        ("visual.positional_embedding", lambda t: t[:-3], r"visual\.positional_embedding has the shape \[14, 128\]"),
        ("visual.transformer.resblocks.1.mlp.c_fc.bias", lambda t: t[:-1], r"1\.mlp\.c_fc\.bias has the shape"),
        ("visual.extra.weight", lambda t: torch.ones(1), r"visual\.extra\.weight"),
    ],
)
def test_an_image_tower_that_does_not_fit_is_named(name: str, change, message: str, base: Path, tuned, tmp_path: Path):
    state = visual(tuned)
    new = change(state.get(name))
    state = {k: t for k, t in state.items() if k != name} | ({} if new is None else {name: new})
    torch.save(state, tmp_path / "tuned.pth")
    with pytest.raises(UnknownCheckpoint, match=message):
        load(base, over={"checkpoint": tmp_path / "tuned.pth"})


def test_the_tensors_of_a_net_that_is_folded_or_whose_towers_have_no_names_cannot_be_edited(base: Path):
    plugin = NETS.get("clip")
    net = plugin.unfolded(str(base))
    assert {name.split(".")[0] for name in tensors(net)} == {"image", "text"}
    nameless = {role: replace(tower, prefix="") for role, tower in net.towers.items()}
    for changed in (plugin.load(str(base)), replace(net, towers=nameless)):
        with pytest.raises(BadRequest, match="does not keep the tensors"):
            tensors(changed)


def test_over_refuses_a_file_without_an_image_tower(base: Path, tmp_path: Path):
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "bert.pt")
    with pytest.raises(UnknownCheckpoint, match=r"bert\.pt holds no image tower"):
        load(base, over={"checkpoint": tmp_path / "bert.pt"})


def test_a_mix_of_files_is_the_model_of_mixed_weights(base: Path, tuned, tmp_path: Path):
    torch.save({**tuned.state_dict(), "logit_scale": torch.tensor(50.0).log()}, tmp_path / "tuned.pt")
    net = load(base, mix={"checkpoint": tmp_path / "tuned.pt", "alpha": 0.3})
    clip, before, after = openai_like.openai(), tiny.openai_module().state_dict(), tuned.state_dict()
    clip.load_state_dict({name: torch.lerp(tensor, after[name], 0.3) for name, tensor in before.items()})
    with torch.no_grad():
        assert torch.allclose(vectors(net, "image"), F.normalize(clip.encode_image(PIXELS), dim=-1), atol=2e-5)
        text = clip.encode_text(F.pad(IDS, (0, 72)), normalize=True)
    assert torch.allclose(vectors(net, "text"), text, atol=2e-5)
    assert len(net.source.weights["mix/tuned.pt"]) == 64
    assert "0.3 of tuned.pt mixed in" in net.source.notes
    assert net.classifier.head.params["scale"] == pytest.approx((1 / 0.07) ** 0.7 * 50**0.3)


def test_a_stretched_model_reads_longer_texts_and_embeds_short_ones_identically(base: Path):
    """The first 20 positions stay."""
    plain, long = load(base), load(base, stretch={"tokens": 248})
    assert torch.equal(vectors(plain, "text"), vectors(long, "text"))
    assert long.towers["text"].preprocess.context == 248
    ids = torch.full((1, 248), 320).index_fill(1, torch.tensor([247]), 49407)
    assert long.towers["text"].module(ids).isfinite().all()
    assert "stretched from 77 to 248" in long.source.notes


def test_a_recipe_names_files_without_their_folder(base: Path, tmp_path: Path):
    file = tmp_path / "recipe.toml"
    file.write_text(
        f'[[adapters]]\nname = "mix"\nparams = {{checkpoint = "{tmp_path}/tuned.pt", alpha = 0.25}}\n'
        '[[adapters]]\nname = "stretch"\nparams = {tokens = 248}\n'
    )
    typed = [flags.Typed("stretch", {"tokens": "476"}), flags.Typed("mix", {"alpha": "0.75"}, first=False)]
    adapters = flags.merged(load_adapters(file), typed)
    assert [adapter.params for adapter in adapters] == [
        {"checkpoint": f"{tmp_path}/tuned.pt", "alpha": 0.75},
        {"tokens": 248},
        {"tokens": 476},
    ]
    public = load_recipe(str(base), "clip", load(base), adapters=adapters[:2]).public()
    assert public["adapters"][0] == {"name": "mix", "params": {"checkpoint": "tuned.pt", "alpha": 0.75}}
    assert str(tmp_path) not in str(public)


@pytest.mark.parametrize(
    "flags", [["--alpha", "0.5"], ["--mix", "x.pt"], ["--mix", "x.pt", "--alpha", "1.5"], ["--stretch", "90"]]
)
def test_incomplete_options_are_an_error_of_one_line(flags: list[str], base: Path, capsys):
    assert main(["recipe", str(base), "--activation", "quick_gelu", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("net", "flags", "message"),
    [
        ("hf", ["--activation", "gelu"], "activation 'gelu' does not apply to .*, Hugging Face CLIP; leave it out"),
        ("hf", ["--experts", "routed"], "experts 'routed' does not apply to .*, Hugging Face CLIP; leave it out"),
        ("openai", ["--experts", "dense", "--activation", "gelu"], "experts 'dense' does not apply"),
        ("owl", ["--stretch", "28"], "a table of 16 positions cannot become 28; it can become none"),
        ("owl", ["--over", "x.pt"], "over does not apply to .*: expected a net of the kind clip, not owl"),
        ("owl", ["--activation", "gelu"], "OWL-ViT states its own activation"),
        ("bert", ["--stretch", "1004"], "stretch: the text tower is a BERT"),  # 20 + 2 (512 - 20)
    ],
)
def test_an_option_without_effect_is_refused(
    net: str, flags: list[str], message: str, base: Path, tiny_hf_clip: Path, tiny_owl: Path, tmp_path: Path, capsys
):
    directories = {"hf": tiny_hf_clip, "owl": tiny_owl, "openai": base}
    checkpoint = directories.get(net) or bert.chinese_clip(tmp_path)
    assert main(["recipe", str(checkpoint), *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_command_line_takes_edits(base: Path, tuned, tmp_path: Path, capsys):
    torch.save(tuned.state_dict(), tmp_path / "t.pt")
    more = ["--activation", "quick_gelu", "--alpha", "0.5", "--mix", str(tmp_path / "t.pt"), "--stretch", "134"]
    assert main(["recipe", str(base), *more]) == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out)["adapters"] == [
        {"name": "mix", "params": {"checkpoint": str(tmp_path / "t.pt"), "alpha": 0.5}},
        {"name": "stretch", "params": {"tokens": 134}},
    ]
    (tmp_path / "r.toml").write_text(out)
    assert main(["recipe", str(base), "--recipe", str(tmp_path / "r.toml")]) == 0
    assert capsys.readouterr().out == out
