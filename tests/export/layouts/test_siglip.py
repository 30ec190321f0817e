"""The oracles are the tokenizers of transformers and open_clip. `test_libraries` has their processors and models.

tests/data/siglip/ids.json contains the ids of `SiglipTokenizer` for 500 strings, because that class needs the package
sentencepiece.
"""

import json
import math
import shutil
from pathlib import Path

import open_clip
import pytest
import transformers
from tokenizers import Tokenizer

from calmclip.export.layouts.common import siglip_tokenizer
from calmclip.export.nets.clip import load
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import TextTooLong, UnknownCheckpoint
from calmclip.models.preprocess.text import TextPreparer
from tests.tiny import changed
from tests.tiny_layouts import siglip

KNOWN = siglip.KNOWN


def test_the_head_is_a_sigmoid_with_the_checkpoint_scale_and_bias(checkpoint):
    head = load(str(checkpoint("hf_siglip"))).classifier.head
    assert (head.name, head.params["scale"], head.params["bias"]) == ("sigmoid", pytest.approx(math.exp(2.3)), -9.0)


def test_siglips_ids_are_those_of_its_reference_on_500_strings():
    tokenizer = siglip_tokenizer.sentencepiece(siglip.DATA / "spiece.model")
    strings = KNOWN["strings"]
    assert len(strings) == 500
    assert {text: tokenizer.encode(text).ids for text in strings} == dict(zip(strings, KNOWN["ids"], strict=True))


def test_siglip_2s_ids_are_those_of_its_reference_on_500_strings(checkpoint):
    reference = transformers.Siglip2Tokenizer.from_pretrained(checkpoint("hf_siglip2"))
    tokenizer = Tokenizer.from_str(load(str(checkpoint("hf_siglip2"))).files["tokenizer.json"].decode())
    for text in KNOWN["strings"]:
        assert tokenizer.encode(text).ids == reference(text)["input_ids"], text


def test_open_clips_ids_are_those_of_its_reference_on_500_strings(checkpoint):
    reference = open_clip.get_tokenizer(f"local-dir:{checkpoint('open_clip_siglip')}")
    tokenizer = Tokenizer.from_str(load(str(checkpoint("open_clip_siglip"))).files["tokenizer.json"].decode())
    for text in KNOWN["strings"]:
        if reference.clean_fn(text) != open_clip.tokenizer.canonicalize_text(text):
            continue  # open_clip repairs its Unicode or its HTML first
        ids = tokenizer.encode(text).ids
        ids = ids if len(ids) <= siglip.CONTEXT else [*ids[: siglip.CONTEXT - 1], ids[-1]]
        assert [*ids, *[1] * (siglip.CONTEXT - len(ids))] == reference([text])[0].tolist(), text


@pytest.mark.parametrize("name", ["hf_siglip", "hf_siglip2"])
def test_a_long_text_is_an_error_or_truncated_as_the_bundle_says(name: str, checkpoint, tmp_path: Path):
    net = load(str(checkpoint(name)))
    (tmp_path / "tokenizer.json").write_bytes(net.files["tokenizer.json"])
    spec = net.towers["text"].preprocess
    assert isinstance(spec, TextPreprocess)
    long = max(KNOWN["strings"], key=len)
    with pytest.raises(TextTooLong, match="reads at most 64"):
        TextPreparer(spec, tmp_path).prepare([long])
    cut = TextPreparer(spec.model_copy(update={"truncate": True}), tmp_path).prepare([long])["ids"][0].tolist()
    if name == "hf_siglip":
        ids = KNOWN["ids"][KNOWN["strings"].index(long)]
        assert cut == [*ids[:63], 1]
    else:
        assert cut == siglip.reference_tokenizer(checkpoint(name))([long])[0].tolist()


def test_a_naflex_checkpoint_is_refused_by_name(tmp_path: Path):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.Siglip2Config(
        text_config={**tower, "vocab_size": 300, **ids}, vision_config={**tower, "num_patches": 16, "patch_size": 8}
    )
    transformers.Siglip2Model(config).save_pretrained(tmp_path)
    with pytest.raises(UnknownCheckpoint, match=r"NaFlex kind \(model_type siglip2\)"):
        load(str(tmp_path))


def test_an_unsupported_tokenizer_is_named(checkpoint, tmp_path: Path):
    padded_left = changed(checkpoint("hf_siglip2"), tmp_path / "left", "tokenizer_config.json", padding_side="left")
    with pytest.raises(UnknownCheckpoint, match="padding_side is 'left'"):
        load(str(padded_left))
    other = shutil.copytree(checkpoint("hf_siglip"), tmp_path / "pad")
    (other / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<nowhere>"}}))
    with pytest.raises(UnknownCheckpoint, match="pad_token '<nowhere>'"):
        load(str(other))
    broken = shutil.copytree(checkpoint("hf_siglip"), tmp_path / "broken")
    (broken / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(UnknownCheckpoint, match=r"spiece\.model is no SentencePiece model"):
        load(str(broken))
