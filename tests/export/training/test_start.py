"""A net that is trained a little, written, and read by transformers and by export: the same answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from export.nets import NETS
from export.training.loop import train
from export.training.settings import training
from export.training.start import student
from export.training.write import write
from models.errors import BadRequest
from tests import tiny

SIZE = {"layers": 2, "width": 16, "heads": 2, "length": 16, "words": 300, "side": 16, "patch": 8}
SIZE |= {"steps": 4, "every": 4, "batch": 4, "warmup": 1, "rate": 0.01}
SENTENCES = [
    f"a photo of {n} {colour} {thing}s." for n in ("two", "a") for colour in ("red", "blue") for thing in ("cat", "dog")
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """texts.txt; pictures of two classes in folders; captions of all of them."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "texts.txt").write_text("\n".join(SENTENCES * 20))
    draw, captions = np.random.default_rng(0), {}
    for name, base in (("dark", 40), ("light", 200)):
        (folder / name).mkdir()
        for i in range(6):
            pixels = np.clip(base + draw.integers(-40, 40, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
            captions[f"{name}/{i}.png"] = [f"a {name} photo", f"{name} noise"]
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def given(objective: str, data: Path, **more):
    what = {
        "mlm": {"text": data / "texts.txt"}, "clm": {"text": data / "texts.txt"}, "classes": {"pictures": data},
        "contrastive": {"pictures": data, "captions": data / "captions.json"},
    }[objective]  # fmt: skip
    return training(objective=objective, **{**SIZE, **what, **more})


def trained(objective: str, data: Path, out: Path, **more):
    settings = given(objective, data, **more)
    made = student(settings, out)
    train(made.task, settings, out)
    write(made, out)
    return made


CLASSES = {
    "mlm": "BertForMaskedLM",
    "clm": "OPTForCausalLM",
    "classes": "ViTForImageClassification",
    "contrastive": "CLIPModel",
}


@pytest.mark.parametrize("objective", CLASSES)
def test_transformers_reads_what_was_trained_and_answers_the_same(objective, data, tmp_path):
    made = trained(objective, data, tmp_path)
    theirs = getattr(transformers, CLASSES[objective]).from_pretrained(tmp_path).eval()
    batch = made.task.batch(np.random.default_rng(0))
    with torch.inference_mode():
        if objective == "mlm":
            found, expected = made.task.module(batch[0], torch.ones_like(batch[0])), theirs(batch[0]).logits
        elif objective == "contrastive":
            ids = batch[1]
            found = made.task.module(*batch)
            expected = theirs(input_ids=ids, pixel_values=batch[0]).logits_per_image
        else:
            found, expected = made.task.module(batch[0]), theirs(batch[0]).logits
    assert torch.allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("gate", ["linear", "mlp", "all_heads", "per_head"])
@pytest.mark.parametrize("objective", ["mlm", "contrastive"])
def test_export_reads_gates_and_clipping_as_they_were_trained(objective, gate, data, tmp_path):
    made = trained(objective, data, tmp_path, gate=gate, softmax="clipped(-0.03:1)")
    batch = made.task.batch(np.random.default_rng(0))
    name, roles = {"mlm": ("bert", ("mlm",)), "contrastive": ("clip", ("image", "text"))}[objective]
    towers = NETS.get(name).load(str(tmp_path)).towers
    with torch.inference_mode():
        if objective == "mlm":
            feeds = (batch[0], torch.ones_like(batch[0]))
            assert torch.allclose(towers["mlm"].module(*feeds), made.task.module(*feeds), atol=2e-5)
            return
        pair = made.task.module.eval()
        for role, feeds in zip(roles, (batch[:1], batch[1:]), strict=True):
            assert torch.allclose(towers[role].module(*feeds), getattr(pair, role)(*feeds), atol=2e-5)


@pytest.mark.parametrize("gate", ["linear", "mlp", "all_heads", "per_head"])
def test_a_gate_that_is_put_into_a_trained_net_leaves_it_as_it_was(gate, data, tmp_path):
    checkpoint = tiny.hf_clip(tmp_path / "clip")
    settings = given("contrastive", data, start=checkpoint, gate=gate, gate_start=0.25)
    made = student(settings, tmp_path / "out")
    theirs = transformers.CLIPModel.from_pretrained(checkpoint).eval()
    batch = made.task.batch(np.random.default_rng(0))
    with torch.inference_mode():
        expected = theirs(input_ids=batch[1], pixel_values=batch[0]).logits_per_image
        found = made.task.module(*batch)
    assert torch.allclose(found, expected, atol=2e-5)
    assert made.attention.gate_scale == 4.0
    write(made, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["attn_gate_scale"] == config["vision_config"]["attn_gate_scale"] == 4.0


def test_a_checkpoint_of_another_kind_is_refused(data, tmp_path):
    checkpoint = tiny.hf_clip(tmp_path / "clip")
    with pytest.raises(BadRequest, match="is a net of the kind clip; mlm trains bert"):
        student(given("mlm", data, start=checkpoint), tmp_path / "out")


def test_a_gate_does_not_become_another(data, tmp_path):
    trained("mlm", data, tmp_path / "one", gate="linear")
    with pytest.raises(BadRequest, match="has the gate linear; it cannot become mlp"):
        student(given("mlm", data, start=tmp_path / "one", gate="mlp"), tmp_path / "two")


def test_the_classes_must_be_those_of_the_net(data, tmp_path):
    trained("classes", data, tmp_path / "one")
    for name in ("a", "b"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "other" / name / "x.png")
    with pytest.raises(BadRequest, match="has the classes a, b"):
        student(given("classes", tmp_path / "other", start=tmp_path / "one"), tmp_path / "two")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"text": None}, "mlm needs text"),
        ({"width": 18, "heads": 4}, "width 18 is no multiple of the 4 heads"),
        ({"side": 15}, "side 15 is no multiple of the patch, 8"),
        ({"softmax": "clipped(0.5:1)"}, "softmax is 'clipped"),
        ({"gate": "big"}, "gate: Input should be"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(more, said, data):
    with pytest.raises(BadRequest, match=said.replace("(", r"\(")):
        given("mlm", data, **more)
