"""Ids of 500 texts, as the service makes them, against the tokenizers of open_clip and transformers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import ftfy
import pytest
import transformers
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from calmclip.export.layouts import _clip_bpe
from calmclip.export.nets.clip import load
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.preprocess.text import TextPreparer
from tests.strings import MOJIBAKE, STRINGS
from tests.tiny_layouts import bert

CONTEXT = 77
TEXTS = [text for text in STRINGS if text.strip()]


def test_there_are_five_hundred_texts():
    assert len(STRINGS) == len(set(STRINGS)) == 500
    assert len(TEXTS) > 495


def prepare(directory: Path, tokenizer: bytes, **spec) -> Iterator[list[int]]:  # type: ignore[no-untyped-def]
    """Ids of each of `TEXTS`, cut to the context as a bundle does that truncates."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_bytes(tokenizer)
    preparer = TextPreparer(TextPreprocess(context=CONTEXT, truncate=True, **spec), directory)
    return (preparer.prepare([text])["ids"][0].tolist() for text in TEXTS)


def differing(found: Iterator[list[int]], want: Callable[[str], list[int]]) -> list[str]:
    return [text for text, ids in zip(TEXTS, found, strict=True) if ids != want(text)]


def test_clips_own_is_open_clips_but_for_the_repair_of_mojibake(tmp_path: Path):
    reference = SimpleTokenizer()

    def want(text: str) -> list[int]:
        ids = reference([text])[0].tolist()
        return ids[: ids.index(reference.eot_token_id) + 1]

    found = differing(prepare(tmp_path, _clip_bpe.tokenizer_json(), clean=_clip_bpe.CLEAN), want)
    broken = [text for text in TEXTS if ftfy.fix_text(text) != ftfy.fix_text(text, fix_encoding=False)]
    assert set(found) <= set(broken)
    assert len(found) <= len(MOJIBAKE)


def test_without_cleaning_clips_own_is_that_of_transformers(tmp_path: Path):
    """On the same vocabulary, its two special tokens under transformers' names."""
    simple = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in simple.encoder.items()}
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
    reference = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)

    def want(text: str) -> list[int]:
        return reference(text, truncation=True, max_length=CONTEXT)["input_ids"]

    assert differing(prepare(tmp_path, _clip_bpe.tokenizer_json()), want) == []


@pytest.mark.parametrize("name", ["chinese_clip", "hf_chinese_clip", "altclip"])
def test_those_of_berts_kind_are_transformers(name: str, tmp_path: Path):
    checkpoint = getattr(bert, name)(tmp_path / name)
    net = load(str(checkpoint))
    if name == "chinese_clip":  # its longest word has 200 characters, which no setting of transformers' says
        reference = transformers.BertTokenizer(str(checkpoint / "vocab.txt"))
        reference.backend_tokenizer.model.max_input_chars_per_word = 200
    else:
        reference = transformers.AutoTokenizer.from_pretrained(checkpoint)

    def want(text: str) -> list[int]:
        return reference(text, truncation=True, max_length=CONTEXT)["input_ids"]

    assert differing(prepare(tmp_path, net.files["tokenizer.json"]), want) == []


def test_open_clips_wrapper_of_xlmr_cleans_first(tmp_path: Path):
    checkpoint = bert.open_clip_bert(tmp_path / "oc")
    net = load(str(checkpoint))
    reference = HFTokenizer(str(checkpoint), context_length=CONTEXT)

    def want(text: str) -> list[int]:
        ids = reference([text])[0].tolist()
        return ids[: ids.index(2) + 1]

    found = differing(prepare(tmp_path, net.files["tokenizer.json"], clean=net.towers["text"].preprocess.clean), want)
    broken = [text for text in TEXTS if ftfy.fix_text(text) != ftfy.fix_text(text, fix_encoding=False)]
    assert set(found) <= set(broken)
