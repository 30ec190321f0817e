"""perplexity and top1 of exported bundles, against the losses and answers of transformers."""

import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer

from calmclip.export.pipeline import build
from calmclip.export.recipe import load_recipe, recognise
from calmclip.export.training.data import word_pieces
from calmclip.models.errors import BadRequest
from calmclip.models.evals import measure
from calmclip.models.preprocess.masking import IGNORED, masked
from calmclip.models.runner import open_bundle
from tests import tiny

TEXTS = [
    "a photo of two red cats [SEP] a green dog",
    "blue dogs sit on a red cat",
    "a cat",
    "two green cats and a dog " * 9,
]


def exported(checkpoint, out):
    """The float bundle."""
    name, plugin = recognise(str(checkpoint))
    net = plugin.load(str(checkpoint))
    how = {role: {"name": "none"} for role in net.towers}
    recipe = load_recipe(str(checkpoint), name, net, name="tiny", keep_float=True, quantize=how)
    build(recipe, out, net=net)
    return open_bundle(out / "tiny-float")


def measured(name, runner, data, limit=None):
    return measure.named(measure.predict(name, runner, measure.read(name, data, limit=limit)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    return folder


def test_perplexity_of_masked_words_is_e_to_transformers_loss(data, tmp_path):
    tokenizer = word_pieces(TEXTS * 50, 300)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**size, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=24)
    model = tiny.spread(transformers.BertForMaskedLM(config)).eval()
    checkpoint = tmp_path / "bert"
    model.save_pretrained(checkpoint)
    padded = Tokenizer.from_str(tokenizer.to_str())  # many published tokenizers pad and truncate
    padded.enable_padding(pad_id=1, pad_token="[UNK]", length=64)
    padded.enable_truncation(6)
    padded.save(str(checkpoint / "tokenizer.json"))
    runner = exported(checkpoint, tmp_path / "out")
    figures = measured("perplexity", runner, data)
    loss, tokens = 0.0, 0
    for number, text in enumerate(TEXTS):
        ids = tokenizer.encode(text).ids
        ids = ids if len(ids) <= 24 else [*ids[:23], ids[-1]]  # cut, with [SEP] at the end
        fed, targets = masked(np.array([ids]), np.random.default_rng(number), 4, tokenizer.get_vocab_size(), [0, 2, 3])
        with torch.inference_mode():
            logits = model(torch.from_numpy(fed)).logits.double()
        each = torch.nn.functional.cross_entropy(
            logits[0], torch.from_numpy(targets)[0], ignore_index=IGNORED, reduction="sum"
        )
        loss, tokens = loss + float(each), tokens + int((targets != IGNORED).sum())
    assert figures["tokens"] == tokens > 4
    assert figures["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    (data / "red").mkdir()
    Image.new("RGB", (8, 8)).save(data / "red" / "a.png")
    with pytest.raises(BadRequest, match="top1 needs a classifier"):
        measured("top1", runner, data)


def test_perplexity_of_next_words_is_e_to_transformers_loss(data, tiny_opt, tmp_path):
    model = transformers.OPTForCausalLM.from_pretrained(tiny_opt).eval()
    figures = measured("perplexity", exported(tiny_opt, tmp_path), data, 2)
    tokenizer = Tokenizer.from_file(str(tiny_opt / "tokenizer.json"))
    losses, counts = [], []
    for text in TEXTS[:2]:
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.inference_mode():
            losses.append(float(model(ids, labels=ids).loss))
        counts.append(ids.shape[1] - 1)
    assert figures["tokens"] == sum(counts)
    assert figures["perplexity"] == pytest.approx(math.exp(np.average(losses, weights=counts)), rel=1e-4)


def test_top1_counts_the_right_answers_of_transformers(tiny_vit, tmp_path):
    model = transformers.ViTForImageClassification.from_pretrained(tiny_vit).eval()
    processor = transformers.ViTImageProcessor.from_pretrained(tiny_vit)
    runner = exported(tiny_vit, tmp_path / "out")
    labels, draw, right = runner.bundle.classifier.labels, np.random.default_rng(0), 0
    for number in range(8):
        name = labels[number % len(labels)]
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(draw.integers(0, 256, (40, 30, 3), np.uint8))
        picture.save(tmp_path / "data" / name / f"{number}.png")
        with torch.inference_mode():
            answer = int(model(**processor(picture, return_tensors="pt")).logits.argmax())
        right += labels[answer] == name
    figures = measured("top1", runner, tmp_path / "data")
    assert (figures["top1"], figures["pictures"], figures["labels"]) == (100 * right / 8, 8, len(labels))
    (tmp_path / "data" / "zebra").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "zebra" / "a.png")
    with pytest.raises(BadRequest, match="the class 'zebra' is none of the"):
        measured("top1", runner, tmp_path / "data")
    (tmp_path / "texts.txt").write_text("a cat\n")
    with pytest.raises(BadRequest, match="has no graph mlm or lm; perplexity needs a language model"):
        measured("perplexity", runner, tmp_path)
