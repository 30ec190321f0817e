"""The service's ids of 500 texts. The oracles are the tokenizers of open_clip and transformers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ftfy
import pytest
import transformers
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from calmclip.export.layouts.common import clip_bpe
from calmclip.export.nets.clip import load
from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.preprocess.text import TextPreparer
from tests.strings import MOJIBAKE, STRINGS
from tests.tiny_layouts import bert

CONTEXT = 77
TEXTS = [text for text in STRINGS if text.strip()]
BROKEN = {text for text in TEXTS if ftfy.fix_text(text) != ftfy.fix_text(text, fix_encoding=False)}


def test_there_are_five_hundred_texts():
    assert len(STRINGS) == len(set(STRINGS)) == 500
    assert len(TEXTS) > 495


def prepare(directory: Path, tokenizer: bytes, **spec) -> Iterator[list[int]]:  # type: ignore[no-untyped-def]
    """The ids of each of `TEXTS`, truncated to the context."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_bytes(tokenizer)
    preparer = TextPreparer(TextPreprocess(context=CONTEXT, truncate=True, **spec), directory)
    return (preparer.prepare([text])["ids"][0].tolist() for text in TEXTS)


def differing(rows: Iterator[list[int]], want: Callable[[str], list[int]]) -> list[str]:
    """-> the texts whose ids differ."""
    return [text for text, ids in zip(TEXTS, rows, strict=True) if ids != want(text)]


def by_open_clip(reference: Any, end: int) -> Callable[[str], list[int]]:
    """``end``: the id of the last token; padding follows it."""

    def ids(text: str) -> list[int]:
        row = reference([text])[0].tolist()
        return row[: row.index(end) + 1]

    return ids


def by_transformers(reference: Any) -> Callable[[str], list[int]]:
    return lambda text: reference(text, truncation=True, max_length=CONTEXT)["input_ids"]


def test_clips_tokenizer_equals_open_clips_except_the_repair_of_mojibake(tmp_path: Path):
    want = by_open_clip(SimpleTokenizer(), SimpleTokenizer().eot_token_id)
    texts = differing(prepare(tmp_path, clip_bpe.tokenizer_json(), clean=clip_bpe.CLEAN), want)
    assert set(texts) <= BROKEN
    assert len(texts) <= len(MOJIBAKE)


def test_without_cleaning_clips_tokenizer_equals_that_of_transformers(tmp_path: Path):
    """With the same vocabulary, and with transformers' names of the two special tokens."""
    simple = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in simple.encoder.items()}
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
    reference = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    assert differing(prepare(tmp_path, clip_bpe.tokenizer_json()), by_transformers(reference)) == []


@pytest.mark.parametrize("name", ["chinese_clip", "hf_chinese_clip", "altclip"])
def test_tokenizers_like_berts_equal_those_of_transformers(name: str, tmp_path: Path):
    checkpoint = getattr(bert, name)(tmp_path / name)
    net = load(str(checkpoint))
    if name == "chinese_clip":  # words of up to 200 characters; transformers has no setting for it
        reference = transformers.BertTokenizer(str(checkpoint / "vocab.txt"))
        reference.backend_tokenizer.model.max_input_chars_per_word = 200
    else:
        reference = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert differing(prepare(tmp_path, net.files["tokenizer.json"]), by_transformers(reference)) == []


def test_open_clips_wrapper_of_xlmr_cleans_first(tmp_path: Path):
    checkpoint = bert.open_clip_bert(tmp_path / "oc")
    net = load(str(checkpoint))
    want = by_open_clip(HFTokenizer(str(checkpoint), context_length=CONTEXT), 2)
    texts = differing(prepare(tmp_path, net.files["tokenizer.json"], clean=net.towers["text"].preprocess.clean), want)
    assert set(texts) <= BROKEN
