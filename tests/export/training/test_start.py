"""A trained net is written; transformers and export read it and answer the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models

from calmclip.export.nets import NETS
from calmclip.export.towers.transformer import Attention
from calmclip.export.training.loop import train
from calmclip.export.training.settings import training
from calmclip.export.training.start import student
from calmclip.export.training.write import write
from calmclip.models.errors import BadRequest
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
            answers, expected = made.task.module(batch[0], torch.ones_like(batch[0])), theirs(batch[0]).logits
        elif objective == "contrastive":
            ids = batch[1]
            answers = made.task.module(*batch)
            expected = theirs(input_ids=ids, pixel_values=batch[0]).logits_per_image
        else:
            answers, expected = made.task.module(batch[0]), theirs(batch[0]).logits
    assert torch.allclose(answers, expected, atol=2e-5)


@pytest.mark.parametrize("gate", ["linear", "mlp", "all_heads", "per_head", "mlp_mean"])
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


def test_a_penalty_is_of_the_outputs_of_transformers_feed_forward_networks(data, tmp_path):
    trained("mlm", data, tmp_path / "start")
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "start").eval()
    squares = []
    for layer in theirs.bert.encoder.layer:
        layer.output.dense.register_forward_hook(lambda *run: squares.append(run[2].double().square().mean()))
    settings = given("mlm", data, start=tmp_path / "start", penalty=0.5)
    made = student(settings, tmp_path / "out")
    batch = made.task.batch(np.random.default_rng(0))
    loss = made.task.loss(batch)
    plain = made.task.task.loss(batch)
    with torch.inference_mode():
        theirs(batch[0])
    assert float((loss - plain).detach()) == pytest.approx(0.5 * float(sum(squares)) / 2, rel=1e-4)
    torch.autograd.backward(loss)
    last = [p.grad for name, p in made.task.module.named_parameters() if name.endswith("mlp.down.bias")]
    assert len(last) == 2
    assert all(gradient is not None for gradient in last)
    assert train(made.task, settings, tmp_path / "out")["perplexity"] > 1
    assert not {*made.task.measure()} - {"perplexity"}


@pytest.mark.parametrize("gate", ["linear", "mlp", "all_heads", "per_head", "linear_mean"])
def test_a_gate_that_is_put_into_a_trained_net_leaves_it_as_it_was(gate, data, tmp_path):
    checkpoint = tiny.hf_clip(tmp_path / "clip")
    settings = given("contrastive", data, start=checkpoint, gate=gate, gate_start=0.25)
    made = student(settings, tmp_path / "out")
    theirs = transformers.CLIPModel.from_pretrained(checkpoint).eval()
    batch = made.task.batch(np.random.default_rng(0))
    with torch.inference_mode():
        expected = theirs(input_ids=batch[1], pixel_values=batch[0]).logits_per_image
        answers = made.task.module(*batch)
    assert torch.allclose(answers, expected, atol=2e-5)
    assert made.attention.gate_scale == 4.0
    write(made, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["attn_gate_scale"] == config["vision_config"]["attn_gate_scale"] == 4.0


def test_a_gate_that_reads_the_words_to_predict_is_refused(data):
    with pytest.raises(BadRequest, match="the gate mlp_mean averages over all tokens of a text, also those that clm"):
        given("clm", data, gate="mlp_mean")


def test_a_checkpoint_of_another_kind_is_refused(data, tmp_path):
    checkpoint = tiny.hf_clip(tmp_path / "clip")
    with pytest.raises(BadRequest, match="is a net of the kind clip; mlm trains the kind bert"):
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
    ("more", "message"),
    [
        ({"text": None}, "mlm needs text"),
        ({"width": 18, "heads": 4}, "width 18 is no multiple of the 4 heads"),
        ({"side": 15}, "side 15 is no multiple of the patch, 8"),
        ({"softmax": "clipped(0.5:1)"}, "softmax is 'clipped"),
        ({"gate": "big"}, "gate: Input should be"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(more, message, data):
    with pytest.raises(BadRequest, match=message.replace("(", r"\(")):
        given("mlm", data, **more)


def test_a_start_of_a_training_that_was_never_saved_is_made_anew(data, tmp_path):
    student(given("mlm", data, width=8, seed=3), tmp_path)  # interrupted before its first line
    trained("mlm", data, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == SIZE["width"]


def test_a_training_goes_on_from_the_start_that_it_had(data, tmp_path):
    trained("mlm", data, tmp_path)
    before = (tmp_path / "start" / "model.safetensors").stat()
    trained("mlm", data, tmp_path)
    assert (tmp_path / "start" / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


def test_what_a_checkpoint_left_of_its_own_training_is_no_part_of_the_next(data, tmp_path):
    trained("mlm", data, tmp_path / "one")
    trained("mlm", data, tmp_path / "two", start=tmp_path / "one", steps=3, every=3)
    log = [json.loads(line) for line in (tmp_path / "two" / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [3]
    assert not (tmp_path / "two" / "start").exists()


def test_a_checkpoint_is_not_trained_into_its_own_directory(data, tmp_path):
    checkpoint = tiny.hf_clip(tmp_path / "clip")
    with pytest.raises(BadRequest, match="choose another --out"):
        student(given("contrastive", data, start=checkpoint), tmp_path / "other" / ".." / "clip")


def _said_before(checkpoint: Path, **keys) -> Path:
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    return checkpoint


@pytest.mark.parametrize(
    "before", [{"attn_softmax": "clipped(-0.5:1)"}, {"alpha": 4, "max_seq_length": 8}], ids=["softmax", "alpha"]
)
@pytest.mark.parametrize("softmax", ["vanilla", "clipped(-0.01:1)"])
def test_the_config_says_the_softmax_of_the_training_alone(before, softmax, data, tmp_path):
    trained("mlm", data, tmp_path / "one")
    checkpoint = _said_before(tmp_path / "one", **before)
    made = trained("mlm", data, tmp_path / "two", start=checkpoint, softmax=softmax)
    (layer, *_) = [module for module in NETS.get("bert").load(str(tmp_path / "two")).towers["mlm"].module.modules()
                   if isinstance(module, Attention)]  # fmt: skip
    assert str(layer.softmax) == str(made.attention.softmax) == softmax


def test_the_softmax_of_a_checkpoint_is_not_dropped_unasked(data, tmp_path):
    trained("mlm", data, tmp_path / "one", softmax="clipped(-0.01:1)")
    with pytest.raises(BadRequest, match=r"has the softmax clipped\(-0.01:1\); set --softmax"):
        student(given("mlm", data, start=tmp_path / "one"), tmp_path / "two")


def test_contrastive_trains_what_can_be_written(data, tmp_path):
    checkpoint = tiny.open_clip(tmp_path / "clip")
    with pytest.raises(BadRequest, match="contrastive trains a Hugging Face CLIP directory"):
        student(given("contrastive", data, start=checkpoint), tmp_path / "out")


def test_the_config_of_a_clip_may_leave_its_towers_out(data, tmp_path):
    made = student(given("contrastive", data, start=tiny.hf_clip(tmp_path / "clip"), gate="linear"), tmp_path / "out")
    _said_before(tmp_path / "clip", text_config=None)
    write(made, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["attn_gate_scale"] == 2.0


def test_a_tokenizer_in_other_files_than_tokenizer_json_is_enough(data, tmp_path):
    checkpoint = tiny.hf_clip(tmp_path / "clip")
    told = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vocab.json").write_text(json.dumps({**told["vocab"], "<|startoftext|>": 598, "<|endoftext|>": 599}))
    (checkpoint / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in told["merges"]))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    student(given("contrastive", data, start=checkpoint), tmp_path / "out")


def test_a_tokenizer_without_its_unknown_token_is_refused(data, tmp_path):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).save(str(tmp_path / "words.json"))
    settings = training(objective="mlm", text=data / "texts.txt", tokenizer=tmp_path / "words.json", **SIZE)
    with pytest.raises(BadRequest, match=r"words\.json: its WordLevel model has no token '\[UNK\]' in its vocabulary"):
        student(settings, tmp_path / "out")


def test_rows_are_full_though_the_tokenizer_cuts_and_pads(data, tmp_path):
    trained("mlm", data, tmp_path / "one")
    words = Tokenizer.from_file(str(tmp_path / "one" / "tokenizer.json"))
    words.enable_padding(pad_id=0, length=40)
    words.enable_truncation(3)
    words.save(str(tmp_path / "one" / "tokenizer.json"))
    made = student(given("mlm", data, start=tmp_path / "one"), tmp_path / "two")
    assert not (made.task.rows == 0).any()
    assert len(made.task.rows) + len(made.task.held_out) > 60  # 160 texts of 8 tokens, 14 a row


@pytest.mark.parametrize(
    ("objective", "count", "more", "message"),
    [
        ("mlm", 3, {}, "1 rows of 16 tokens are too few to hold out 1"),
        ("classes", 0, {"held_out": 0.99}, "12 pictures are too few to hold out 12"),
    ],
)
def test_what_is_held_out_leaves_something(objective, count, more, message, data, tmp_path):
    (tmp_path / "few.txt").write_text("\n".join(SENTENCES[:count]))
    more = {**more, "text": tmp_path / "few.txt"} if count else more
    with pytest.raises(BadRequest, match=message):
        student(given(objective, data, **more), tmp_path / "out")


def test_something_is_asked_for_of_the_smallest_batch(data, tmp_path):
    made = student(given("mlm", data, batch=1, masked=1e-9), tmp_path)
    assert made.task.loss(made.task.batch(np.random.default_rng(0))).isfinite()
