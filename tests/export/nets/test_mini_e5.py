"""The encoder of many languages, from a small file of its format. Oracles: transformers, and all segmentations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from calmclip.export.nets.mini import e5, minilm, parameters, sentences
from calmclip.export.nets.mini.modules import tensors
from calmclip.models.errors import WeightsMissing
from tests import tiny_e5

SCORES = dict(tiny_e5.PIECES)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("e5") / "e5-small-q4.bin"
    tiny_e5.write(path)
    return path


@pytest.fixture(scope="module")
def encoder(file: Path) -> e5.Encoder:
    return e5.read(file)


def test_tensors_are_those_that_were_written(tmp_path: Path):
    written = tiny_e5.write(tmp_path / "e5", layers=1)
    kept = np.isin(np.arange(16), (0, 1, 2, 3, 7, 13))  # as bits of whole bytes: longer than the pieces
    encoder = e5.read(tmp_path / "e5", kept)
    assert encoder.pieces == ("<s>", "<pad>", "</s>", "<unk>", "g", "ü")
    assert encoder.scores.tolist() == [0, 0, 0, 0, -4, -8]
    layer = "encoder.layer.0."
    names = {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.type": "embeddings.token_type_embeddings.weight",
        "emb.ln.b": "embeddings.LayerNorm.bias",
        "l0.ao.w": f"{layer}attention.output.dense.weight",
        "l0.fi.b": f"{layer}intermediate.dense.bias",
        "l0.fo.w": f"{layer}output.dense.weight",
        "l0.oln.w": f"{layer}output.LayerNorm.weight",
    }
    for ours, theirs in names.items():
        expected = written[ours][[0, 1, 2, 3, 7, 13]] if ours == "emb.word" else written[ours]
        np.testing.assert_array_equal(encoder.state[theirs], expected.astype(np.float32), err_msg=ours)


def test_the_network_is_transformers_bert(encoder: e5.Encoder):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=len(encoder.pieces), hidden_size=384, num_hidden_layers=2, intermediate_size=1536, type_vocab_size=2
    )
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    theirs.load_state_dict(tensors(encoder.state))
    ours = minilm.from_state(tensors(encoder.state), 2)
    ids = torch.tensor([[0, 5, 7, 9, 2], [0, 11, 2, 1, 1]])
    mask = (ids != 1).long()
    with torch.inference_mode():
        states = theirs(ids, attention_mask=mask).last_hidden_state
        expected = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        assert torch.allclose(ours(ids, mask), expected, atol=2e-5)
    projected = {"text_weight": np.eye(384, dtype=np.float32), "text_centre": np.zeros(384, np.float32)}
    arrays = parameters.text(projected, parameters.minilm(encoder.state, 2))
    rows = sentences.embed(arrays, e5.tokenizer_json(encoder), ["a", "狗"])  # numpy, float64
    tokenizer = Tokenizer.from_str(e5.tokenizer_json(encoder).decode())
    with torch.inference_mode():
        state = ours(torch.tensor([tokenizer.encode("狗").ids]))
    assert np.allclose(rows[1], torch.nn.functional.normalize(state, dim=-1)[0], atol=1e-5)


def segmentations(text: str) -> list[list[str]]:
    if not text:
        return [[]]
    ends = [end for end in range(1, len(text) + 1) if text[:end] in SCORES or end == 1]
    return [[text[:end], *rest] for end in ends for rest in segmentations(text[end:])]


def best(text: str) -> list[str]:
    """Of all segmentations the one of the highest score; an unknown character costs ten more than the worst piece."""
    unknown = min(SCORES.values()) - 10
    return max(segmentations(text), key=lambda pieces: sum(SCORES.get(piece, unknown) for piece in pieces))


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("a dogs", "▁a▁dogs"),
        ("a\tdog  dog \u200b dog", "▁a▁dog▁dog▁dog"),  # runs of spaces, and marks without a width
        ("Hund\x07", "▁Hund"),  # a control
        ("u\u0308", "▁ü"),  # NFKC
        ("一只狗", "▁一只狗"),
        ("aQg", "▁aQg"),  # an unknown letter
    ],
)
def test_the_tokenizer_finds_the_best_segmentation(encoder: e5.Encoder, text: str, normalized: str):
    tokens = Tokenizer.from_str(e5.tokenizer_json(encoder).decode()).encode(text)
    expected = [piece if piece in SCORES else "<unk>" for piece in best(normalized)]
    pieces = [encoder.pieces[number] for number in tokens.ids]
    assert pieces == ["<s>", *expected, "</s>"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"E5S2" + data[4:], "begins with b'E5S2'"),
        (lambda data: data[:5000], "offset|bytes|buffer|ends after"),
        (lambda data: data[:8] + b"\x00\x02\x00\x00" + data[12:], "widths 512 and 1536"),
        (lambda data: data.replace(b"l1.fo.w", b"l1.fo.x"), "l1.fo.w"),
    ],
)
def test_another_format_is_refused(file: Path, tmp_path: Path, change, message: str):
    (tmp_path / "e5").write_bytes(change(file.read_bytes()))
    with pytest.raises(WeightsMissing, match=message) as raised:
        e5.read(tmp_path / "e5")
    assert "Install that version again" in str(raised.value)


def test_pieces_of_another_vocabulary_are_refused(file: Path):
    for kept in (np.ones(13, bool), np.arange(14) > 0, np.ones(16, bool)):  # too few, without <s>, too many
        with pytest.raises(WeightsMissing, match="pieces were chosen from 14"):
            e5.read(file, kept)


def test_the_tokenizer_keeps_its_file_small_and_plain(encoder: e5.Encoder):
    data = json.loads(e5.tokenizer_json(encoder))
    assert (data["model"]["type"], data["model"]["unk_id"], data["truncation"]) == ("Unigram", 3, None)
    assert len(data["model"]["vocab"]) == len(tiny_e5.PIECES)
