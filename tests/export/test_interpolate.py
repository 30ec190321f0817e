"""Weights between two checkpoints. Oracles: bits, torch.lerp in float64, transformers, open_clip, numpy's sort."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from calmclip.export import interpolate, interpolate_cli, zero_shot
from calmclip.export.adapters.mix import mix
from calmclip.export.checkpoints import Checkpoint
from calmclip.export.interpolate import Ends, alphas, open_ends, pruned, write
from calmclip.export.layouts import Layout, Rule
from calmclip.models.cli import main
from calmclip.models.errors import BadRequest, UnknownCheckpoint
from tests import tiny

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


@pytest.fixture(scope="module")
def kin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its blocks differ from those of `tiny.hf_clip`, and its scale is 4 times that."""
    directory = tiny.hf_clip_kin(tmp_path_factory.mktemp("kin") / "kin", part="layers.")
    file = directory / "model.safetensors"
    state = load_file(file)
    state["logit_scale"] = state["logit_scale"] + np.log(4)
    save_file(state, file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each colour, with noisy pictures of it."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for number in range(6):
            noisy = np.clip(random.normal(colour, 60, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name / f"{number}.png")
    return folder


def cast(checkpoint: Path, to: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(checkpoint, to)
    state = load_file(to / "model.safetensors")
    save_file({n: t.to(dtype) for n, t in state.items()}, to / "model.safetensors", metadata={"format": "pt"})
    return to


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else bits(tensor[None])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:1:.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        (".2:1:.3", [0.2, 0.5, 0.8]),
        ("1,0,.5", [0, 0.5, 1]),
        ("0.3", [0.3]),
    ],
)
def test_alphas_are_the_decimals_that_are_typed(text: str, expected: list[float]):
    assert alphas(text) == tuple(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:1", "no list of alphas"), ("0:1:0", "STEP > 0"), ("0:nan:.1", "no list of alphas"), ("a", "no list"),
        ("0,1.5", "alpha is 1.5"), ("-.5:1:.5", "alpha is -0.5"), ("", "no list"), ("0:1:1e-9", "at most 1001"),
    ],
)  # fmt: skip
def test_other_alphas_are_refused(text: str, message: str):
    with pytest.raises(BadRequest, match=message):
        alphas(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_ends_have_the_bits_of_the_checkpoints_and_the_middle_is_their_mean(
    dtype: torch.dtype, tiny_hf_clip: Path, kin: Path, tmp_path: Path
):
    paths = [cast(path, tmp_path / str(i), dtype) for i, path in enumerate((tiny_hf_clip, kin))]
    ends = open_ends(str(paths[0]), str(paths[1]))
    for alpha in (0, 0.25, 1):
        write(ends, ends.at(alpha), tmp_path / f"alpha-{alpha}", "")
    sides = [load_file(path / "model.safetensors") for path in paths]
    written = {alpha: load_file(tmp_path / f"alpha-{alpha}/model.safetensors") for alpha in (0, 0.25, 1)}
    for alpha, side in ((0, sides[0]), (1, sides[1])):
        assert {n: (t.dtype, bits(t)) for n, t in written[alpha].items()} == {
            n: (dtype, bits(t)) for n, t in side.items()
        }
    for name, tensor in written[0.25].items():
        middle = torch.lerp(sides[0][name].double(), sides[1][name].double(), 0.25)
        assert tensor.dtype == dtype
        assert torch.allclose(tensor.double(), middle, rtol=torch.finfo(dtype).eps, atol=1e-7), name
    assert sorted(p.name for p in (tmp_path / "alpha-0").iterdir()) == sorted(p.name for p in tiny_hf_clip.iterdir())


def test_the_scale_between_two_is_their_geometric_mean(tiny_hf_clip: Path, kin: Path):
    """One scale is 4 times the other, so the scale at 1/2 is 2 times it, and at 1/4 the root of 2."""
    ends = open_ends(str(tiny_hf_clip), str(kin))
    scales = [zero_shot.scale(ends.load(ends.at(alpha))) for alpha in (0, 0.25, 0.5, 1)]
    assert np.divide(scales, scales[0]) == pytest.approx([1, 2**0.5, 2, 4], rel=1e-5)


def test_the_logits_of_a_linear_model_are_interpolated_linearly():
    random = torch.Generator().manual_seed(0)
    a, b = ({"w": torch.randn(5, 7, generator=random)} for _ in range(2))
    x = torch.randn(7, 3, generator=random)
    for alpha in (0, 0.3, 0.5, 1):
        expected = (1 - alpha) * (a["w"] @ x) + alpha * (b["w"] @ x)
        assert torch.allclose(mix(a, b, alpha, "")["w"] @ x, expected, atol=1e-5)


def test_transformers_reads_a_written_checkpoint_and_computes_our_logits(
    tiny_hf_clip: Path, kin: Path, pictures: Path, tmp_path: Path
):
    from transformers import CLIPModel

    ends = open_ends(str(tiny_hf_clip), str(kin))
    write(ends, ends.at(0.4), tmp_path / "mixed", "")
    net = ends.load(ends.at(0.4))
    data = zero_shot.read("colours", pictures, net, ("a {}", "a photo of {}"))
    reference = CLIPModel.from_pretrained(tmp_path / "mixed").eval()
    with torch.no_grad():
        out = reference(input_ids=data.tokens[0], pixel_values=data.pixels)
    texts = torch.nn.functional.normalize(out.text_embeds.unflatten(0, (3, 2)).mean(1), dim=-1)
    logits = reference.logit_scale.exp() * out.image_embeds @ texts.T
    scored = zero_shot.score(net, data)
    assert data.truth.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert data.labels == ("blue", "green", "red")
    assert scored.right.tolist() == (logits.argmax(1) == data.truth).tolist()
    assert scored.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, data.truth).item(), rel=1e-4)


@pytest.mark.slow
def test_open_clip_reads_a_written_checkpoint_and_computes_our_vectors(tiny_open_clip: Path, tmp_path: Path):
    from open_clip.model import CLIP

    other = tmp_path / "other"
    shutil.copytree(tiny_open_clip, other)
    state = load_file(other / "open_clip_model.safetensors")
    state = {n: t + 0.1 * torch.randn_like(t) if "resblocks" in n else t for n, t in state.items()}
    save_file(state, other / "open_clip_model.safetensors")
    ends = open_ends(str(tiny_open_clip), str(other))
    write(ends, ends.at(0.5), tmp_path / "mixed", "")
    config = json.loads((tmp_path / "mixed/open_clip_config.json").read_text())["model_cfg"]
    reference = CLIP(**config).eval()
    reference.load_state_dict(load_file(tmp_path / "mixed/open_clip_model.safetensors"))
    net, pixels = ends.load(ends.at(0.5)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = reference.encode_image(pixels, normalize=True)
        assert torch.allclose(net.towers["image"].module(pixels), expected, atol=1e-5)


def changed(path: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(path, to)
    save_file(change(load_file(path / "model.safetensors")), to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_checkpoints_that_do_not_belong_together_are_refused_with_the_tensor(
    tiny_hf_clip: Path, tiny_vit: Path, tiny_open_clip: Path, tmp_path: Path
):
    name, base = "vision_model.pre_layrnorm.weight", str(tiny_hf_clip)
    less = changed(tiny_hf_clip, tmp_path / "less", lambda s: {n: t for n, t in s.items() if n != name})
    with pytest.raises(UnknownCheckpoint, match=f"lacks {name}"):
        open_ends(base, str(less))
    more = changed(tiny_hf_clip, tmp_path / "more", lambda s: s | {"extra.weight": torch.ones(1)})
    with pytest.raises(UnknownCheckpoint, match=r"holds extra\.weight"):
        open_ends(base, str(more))
    wide = changed(tiny_hf_clip, tmp_path / "wide", lambda s: s | {name: torch.ones(33)})
    with pytest.raises(UnknownCheckpoint, match=rf"{name} has the shape \[33\]; the base's is \[32\]"):
        open_ends(base, str(wide))
    gelu = tiny.changed(tiny_hf_clip, tmp_path / "gelu", vision_config={"hidden_act": "gelu"})
    with pytest.raises(BadRequest, match=r"image has style\.activation = gelu; tiny-hf-clip has quick_gelu"):
        open_ends(base, str(gelu))
    clipped = tiny.changed(tiny_hf_clip, tmp_path / "clipped", text_config={"attn_softmax": "clipped(-0.025:1)"})
    with pytest.raises(BadRequest, match=r"text has style\.attention = .*gamma=-0\.025"):
        open_ends(base, str(clipped))
    with pytest.raises(BadRequest, match="kind vit; expected two checkpoints of the CLIP family"):
        open_ends(base, str(tiny_vit))
    with pytest.raises(BadRequest, match=r"layout hf_clip, .* open_clip; expected one layout"):
        open_ends(base, str(tiny_open_clip))
    with pytest.raises(BadRequest, match="mini is a net of the kind mini"):
        open_ends("mini", base)


def test_factors_of_a_product_are_not_mixed():
    """A layout that stores W = U diag(s), as CLIP-SVD: another s is mixed as W is; another U and s are not."""
    layout = Layout(
        "toy", (), (Rule("u", "u"), Rule("s", "s"), Rule("logit_scale", "logit_scale")),
        after_read=lambda state: {"w": state["u"] * state["s"], "logit_scale": state["logit_scale"]},
    )  # fmt: skip
    base = {"u": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "s": torch.tensor([1.0, 2.0]), "logit_scale": torch.ones(())}
    values = base | {"s": 3 * base["s"]}

    def ends(other: dict[str, torch.Tensor]) -> Ends:
        return Ends(*(Checkpoint(Path(n), state) for n, state in (("a", base), ("b", other))), layout, None)  # type: ignore[arg-type]

    interpolate._check_linear(ends(values))
    with pytest.raises(BadRequest, match="w is a product of tensors that differ between a and b"):
        interpolate._check_linear(ends(values | {"u": base["u"].flip(0)}))


def test_a_layer_has_the_tensors_under_its_name_alone():
    """blocks.1 has none of blocks.10."""
    names = ["t.blocks.1.w", "t.blocks.10.w", "t.cls", "t.cls_other", "dropped"]
    layout = Layout("toy", (), (Rule("t.{rest}", "text.{rest}"), Rule("dropped", "")))
    state = dict.fromkeys(names, torch.ones(1))
    ends = Ends(*(Checkpoint(Path(name), state) for name in "ab"), layout, None)  # type: ignore[arg-type]
    assert ends.layer_of(["text.blocks.1", "text.cls"]) == {"t.blocks.1.w": "text.blocks.1", "t.cls": "text.cls"}
    with pytest.raises(BadRequest, match=r"toy stores text\.blocks\.2 inside of other tensors"):
        interpolate.require_stored(ends, ["text.cls", "text.blocks.2"])


def test_pictures_of_a_limit_are_evenly_spaced():
    assert zero_shot.spaced(10, 4) == [0, 2, 5, 7]
    assert zero_shot.spaced(3, 5) == zero_shot.spaced(3, None) == [0, 1, 2]


def test_pruning_keeps_exactly_the_largest_part_of_each_layers_changes():
    random = torch.Generator().manual_seed(0)
    base = {n: torch.randn(shape, generator=random) for n, shape in (("l.w", (6, 7)), ("l.b", (6,)), ("o.w", (4,)))}
    base["l.n"] = torch.tensor(3)
    tuned = {n: t + torch.randn(t.shape, generator=random) if t.ndim else t + 1 for n, t in base.items()}
    layer_of = {"l.w": "l", "l.b": "l", "l.n": "l"}
    kept = pruned(base, tuned, layer_of, 0.33)
    change = np.concatenate([(tuned[n].double() - base[n].double()).abs().flatten().numpy() for n in ("l.b", "l.w")])
    is_new = np.concatenate([(kept[n] == tuned[n]).flatten().numpy() for n in ("l.b", "l.w")])
    is_old = np.concatenate([(kept[n] == base[n]).flatten().numpy() for n in ("l.b", "l.w")])
    assert is_new.sum() == round(0.33 * 48) == 16
    assert (is_new ^ is_old).all()
    assert set(np.flatnonzero(is_new)) == set(np.argsort(-change)[:16])
    assert torch.equal(kept["o.w"], tuned["o.w"])
    assert kept["l.n"] == 4
    for part, side in ((0, base), (1, tuned)):
        whole = pruned(base, tuned, layer_of, part)
        assert all(bits(whole[n]) == bits(side[n]) for n in ("l.w", "l.b"))
        assert bits(whole["o.w"]) == bits(tuned["o.w"])
    with pytest.raises(BadRequest, match=r"part to keep is 1\.2"):
        pruned(base, tuned, layer_of, 1.2)


def test_an_interrupt_leaves_nothing_and_a_checkpoint_is_not_replaced_unasked(
    tiny_hf_clip: Path, kin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ends = open_ends(str(tiny_hf_clip), str(kin))
    write(ends, ends.at(0), tmp_path / "out", "")
    with pytest.raises(BadRequest, match="out exists; choose another --out, or add --replace"):
        write(ends, ends.at(1), tmp_path / "out", "")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(BadRequest, match="mine is no checkpoint"):
        write(ends, ends.at(1), tmp_path / "mine", "", over=True)

    def interrupted(*args: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(interpolate, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(ends, ends.at(1), tmp_path / "out", "", over=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]
    before = load_file(tiny_hf_clip / "model.safetensors")
    assert all(bits(t) == bits(before[n]) for n, t in load_file(tmp_path / "out/model.safetensors").items())


def test_the_verb_measures_writes_and_draws(
    tiny_hf_clip: Path, kin: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plot = tmp_path / "path.png"
    call = ["interpolate", str(tiny_hf_clip), str(kin), "--alphas", "0,.5,1", "--out", str(tmp_path / "out")]
    sets = ["--data", f"one={pictures}", "--data", f"few={pictures}", "--template", "a {}"]
    assert main([*call, *sets, "--plot", str(plot), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    ends = open_ends(str(tiny_hf_clip), str(kin))
    data = zero_shot.read("one", pictures, ends.net, ("a {}",))
    for row, alpha in zip(answer["rows"], (0, 0.5, 1), strict=True):
        score = zero_shot.score(ends.load(load_file(f"{row['checkpoint']}/model.safetensors")), data)
        assert row["alpha"] == alpha
        for name in ("one", "few"):
            assert row["data"][name]["accuracy"] == pytest.approx(score.accuracy)
            assert row["data"][name]["loss"] == pytest.approx(score.loss, rel=1e-5)
    losses = [row["data"]["one"]["loss"] for row in answer["rows"]]
    expected = max(0, losses[1] - (losses[0] + losses[2]) / 2)
    assert answer["barrier"]["one"] == pytest.approx(expected)
    assert answer["rows"][2]["data"]["one"]["less_last_95"] == [0, 0]
    with Image.open(plot) as drawn:
        assert drawn.format == "PNG"
    assert interpolate_cli._differences([zero_shot.Score(np.array([True]), 0.0)]) == [None]  # of one picture
    assert main(call) == 2
    assert "alpha-0 exists" in capsys.readouterr().err
    assert main([*call[:-2], *sets[2:]]) == 0
    out = capsys.readouterr().out
    assert f"{losses[1]:.3f}" in out
    assert "barrier on few" in out


def test_calls_that_say_too_little_are_refused_with_one_sentence(
    tiny_hf_clip: Path, kin: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pair = [str(tiny_hf_clip), str(kin)]
    (tmp_path / "one/only").mkdir(parents=True)
    shutil.copyfile(pictures / "red/0.png", tmp_path / "one/only/0.png")
    calls = {
        ("interpolate", *pair): "expected --data DIR to measure",
        ("interpolate", *pair, "--out", "x", "--plot", "y.png"): "add --data DIR",
        ("interpolate", *pair, "--data", str(tmp_path / "absent")): "absent is no directory; expected labels.json",
        ("interpolate", *pair, "--data", str(tmp_path / "one")): "label 'only' alone; expected two",
        ("interpolate", *pair, "--data", "a", "--data", "b/a"): "two data sets are called a",
        ("interpolate", *pair, "--data", str(pictures), "--template", "a photo"): "'a photo' has no {} for the label",
        ("sharpness", *pair): "expected --data DIR",
        ("sharpness", *pair, "--data", str(pictures), "--prune", ".1"): "belong together",
        ("sharpness", *pair, "--data", str(pictures), "--rho", "-1"): "rho",
        ("sharpness", *pair, "--data", str(pictures), "--layers", "image.head"): "no layer is called 'image.head'",
    }
    for call, message in calls.items():
        assert main([*call]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_every_layout_is_read_again_and_computes_the_same(checkpoint: Callable[[str], Path], tmp_path: Path):
    from calmclip.export.nets import NETS, ready
    from tests.tiny_layouts.checkpoints import CHECKPOINTS

    for name in CHECKPOINTS:
        path = checkpoint(name)
        if name == "open_clip_siglip":  # a model of the installed timm that this process registers
            continue
        ends = open_ends(str(path), str(path))
        write(ends, ends.at(0.5), tmp_path / name, "")
        before, after = ready(ends.load(ends.at(0.5))), NETS.get("clip").load(str(tmp_path / name))
        pixels = torch.randn(2, 3, *after.towers["image"].preprocess.size)
        with torch.inference_mode():
            vectors = [net.towers["image"].module(pixels) for net in (before, after)]
        assert torch.allclose(*vectors, atol=1e-5), name
        assert before.classifier == after.classifier
