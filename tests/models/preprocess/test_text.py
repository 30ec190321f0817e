"""Ids and masks against tokenizers of transformers with the same tiny vocabularies; and texts that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizerFast, CLIPTokenizerFast

from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import BadRequest, BundleInvalid, TextTooLong
from calmclip.models.preprocess.text import MAX_CHARACTERS, TextPreparer

SENTENCES = ["a photo of a cat.", "Two  DOGS\ton the beach!", "cat", "naïve café", "一只猫", "🐈 cat", "it's a cat's"]
WORDS = "a photo of cat dog ##s two on the beach . ! naive cafe ' it s 一 只 猫"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()]
CLS, SEP = 2, 3

Make = Callable[..., TextPreparer]


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return tokenizer


@pytest.fixture(scope="module")
def clip_bpe(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizerFast:
    """CLIP's tokenizer with the 256 bytes, their word-final forms and eight merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        tuple(pair.split()) for pair in ("c a", "ca t</w>", "d o", "do g", "dog s</w>", "t h", "th e</w>", "o n</w>")
    ]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizerFast(vocab=vocabulary, merges=merges)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def preparer(tokenizer: Any, **spec: Any) -> TextPreparer:
        (tmp_path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        return TextPreparer(TextPreprocess(**spec), tmp_path)

    return preparer


def test_wordpiece_equals_berts(make: Make):
    bert = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(PIECES)})
    expected = bert(SENTENCES, padding=True, return_tensors="np")
    feeds = make(wordpiece(), context=64, mask="mask").prepare(SENTENCES)
    assert np.array_equal(feeds["ids"], expected["input_ids"])
    assert np.array_equal(feeds["mask"], expected["attention_mask"])
    assert {array.dtype for array in feeds.values()} == {np.dtype(np.int64)}


def test_byte_pairs_equal_clips(make: Make, clip_bpe: CLIPTokenizerFast):
    end = clip_bpe.eos_token_id
    expected = clip_bpe(SENTENCES, padding="max_length", max_length=77, return_tensors="np")["input_ids"]
    feeds = make(clip_bpe.backend_tokenizer, context=77, pad="context", pad_id=end).prepare(SENTENCES)
    assert feeds.keys() == {"ids"}  # exactly the graph's inputs
    assert feeds["ids"].shape == (len(SENTENCES), 77)
    assert np.array_equal(feeds["ids"], expected)


def test_a_cut_text_keeps_its_last_token(make: Make, clip_bpe: CLIPTokenizerFast):
    text = "the cat on the dogs " * 9
    expected = clip_bpe([text], truncation=True, max_length=16, return_tensors="np")["input_ids"]
    preparer = make(clip_bpe.backend_tokenizer, context=16, truncate=True)
    assert np.array_equal(preparer.prepare([text])["ids"], expected)
    assert expected[0, -1] == clip_bpe.eos_token_id
    assert make(wordpiece(), context=9).count("two dogs") == 5  # [CLS] two dog ##s [SEP]
    assert preparer.count(text) == 47  # 9 x (the, cat, on, the, dogs) and the two ends, without a limit
    assert make(wordpiece(), context=1, truncate=True).prepare(["a cat"])["ids"].tolist() == [[SEP]]


def test_padding_and_truncation_of_the_file_are_ignored(make: Make):
    """A tokenizer.json often has settings for both; those of the manifest apply."""
    tokenizer = wordpiece()
    tokenizer.enable_padding(length=50, pad_id=9)
    tokenizer.enable_truncation(3)
    feeds = make(tokenizer, context=8, mask="mask", pad_id=0).prepare(["a cat", "two dogs on the beach"])
    # [CLS] a cat [SEP]; [CLS] two dog ##s on the beach [SEP]
    assert feeds["ids"].tolist() == [[2, 4, 7, 3, 0, 0, 0, 0], [2, 10, 8, 9, 11, 12, 13, 3]]
    assert feeds["mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1] * 8]


def test_a_batch_is_as_wide_as_its_longest_or_as_the_context(make: Make):
    assert make(wordpiece(), context=9).prepare(["a", "a cat"])["ids"].shape == (2, 4)
    padded = make(wordpiece(), context=9, pad="context", pad_id=5).prepare(["a"])["ids"]
    assert padded.tolist() == [[2, 4, 3, 5, 5, 5, 5, 5, 5]]


def test_widths_are_rounded_up_to_a_multiple_but_never_over_the_context(make: Make):
    """[CLS], n words, [SEP]: n + 2 tokens. The width is the next multiple of 4, at most 9."""
    preparer = make(wordpiece(), context=9, multiple=4, mask="mask", pad_id=5)
    for tokens, width in ((3, 4), (4, 4), (5, 8), (8, 8), (9, 9)):
        feeds = preparer.prepare([" ".join(["cat"] * (tokens - 2)), "a"])
        assert feeds["ids"].shape == feeds["mask"].shape == (2, width), tokens
        assert feeds["mask"].sum(axis=1).tolist() == [tokens, 3]
        assert feeds["ids"][1].tolist() == [2, 4, 3] + [5] * (width - 3)
    assert make(wordpiece(), context=9, multiple=16).prepare(["a"])["ids"].shape == (1, 9)


def test_a_fixed_width_has_no_multiple():
    with pytest.raises(ValidationError, match="`multiple` must be 1; it is 8"):
        TextPreprocess(context=77, pad="context", multiple=8)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        TextPreprocess(context=77, multiple=0)


def test_a_text_over_the_context_is_refused_with_both_numbers(make: Make):
    preparer = make(wordpiece(), context=5)
    assert preparer.prepare(["a photo of"])["ids"].shape == (1, 5)
    with pytest.raises(TextTooLong, match=r"text 1 \('a photo of a cat'…\) has 7 tokens; this model reads at most 5"):
        preparer.prepare(["a", "a photo of a cat"])


def test_a_very_long_text_is_refused_before_tokenization(make: Make):
    for truncate in (True, False):
        with pytest.raises(TextTooLong, match=f"{MAX_CHARACTERS + 1} characters; at most {MAX_CHARACTERS}"):
            make(wordpiece(), context=5, truncate=truncate).prepare(["a" * (MAX_CHARACTERS + 1)])


@pytest.mark.parametrize("model", [models.WordPiece, models.WordLevel])
def test_words_without_their_unknown_token_are_refused_when_the_bundle_opens(make: Make, model: Any):
    """transformers and tokenizers open such a file and fail at the first unknown word: "Missing [UNK] token"."""
    without = Tokenizer(model({"cat": 0, "[OTHER]": 1}, unk_token="[UNK]"))
    without.add_special_tokens(["[UNK]"])  # the library asks the vocabulary alone
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        without.encode("dog")
    expected = r"tokenizer\.json: its Word\w+ model has no token '\[UNK\]' in its vocabulary, .* add it to `vocab`"
    with pytest.raises(BundleInvalid, match=expected):
        make(without, context=5)
    assert make(Tokenizer(model({"cat": 0, "[OTHER]": 1}, unk_token="[OTHER]")), context=5).encode("dog") == (1,)


def test_a_text_that_byte_pairs_and_unigram_cannot_encode_is_refused_by_name(make: Make):
    """They may have no unknown token. Byte pairs then drop what they do not know; if they name a token that is absent,
    and in a Unigram, the library raises."""
    letters = {letter: place for place, letter in enumerate("cat")}
    assert make(Tokenizer(models.BPE(letters, [])), context=9).encode("cart") == (0, 1, 2)
    unigram = make(Tokenizer(models.Unigram([("cat", -1.0)])), context=9)
    for preparer in (make(Tokenizer(models.BPE(letters, [], unk_token="[UNK]")), context=9), unigram):
        for read in (preparer.count, preparer.tokens, lambda text, p=preparer: p.prepare([text])):
            with pytest.raises(BadRequest, match=r"(?i)cannot encode 'a dog' \(.*unk.*\)\. It needs a token"):
                read("a dog")


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u3000"])
def test_an_empty_text_is_refused(make: Make, text: str):
    with pytest.raises(BadRequest, match="text 1 is empty; expected some words"):
        make(wordpiece(), context=5).prepare(["a", text])


def test_a_lone_surrogate_is_refused(make: Make):
    with pytest.raises(BadRequest, match="text 0 holds a lone surrogate and is not Unicode text"):
        make(wordpiece(), context=5).prepare([json.loads('"cat \\ud83d"')])


def test_a_text_without_tokens_is_refused(make: Make):
    """Its mask would be zero, and attention over no token is NaN."""
    bare = wordpiece()
    bare.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(BadRequest, match="has no token of this model"):
        make(bare, context=5, mask="mask").prepare(["\x00\u200b"])


STRANGE = ["cat\0dog", "\x00", "🐈‍⬛👩🏽‍🚀", "ﷺ", "e\u0301" * 20, "\u202egnidaer", "a\u0300" * 30, "\U0010ffff"]


@pytest.mark.parametrize("text", STRANGE)
def test_strange_texts_are_read_as_transformers_reads_them(make: Make, clip_bpe: CLIPTokenizerFast, text: str):
    feeds = make(clip_bpe.backend_tokenizer, context=500).prepare([text])
    assert feeds["ids"].tolist() == [clip_bpe(text)["input_ids"]]


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(BundleInvalid, match=r"tokenizer\.json is not a tokenizer"):
        TextPreparer(TextPreprocess(context=5), tmp_path)


def test_the_tokens_of_a_prompt_are_not_pooled(make: Make):
    """By hand: [CLS] and the two words of the prompt are left out, the text and [SEP] are pooled."""
    preparer = make(wordpiece(), context=8, mask="mask", pooled="pooled", prompts={"query": "photo of "})
    feeds = preparer.prepare(["a cat", "dog"], "photo of ")
    words = [[PIECES.index(word) for word in row.split()] for row in ("photo of a cat", "photo of dog")]
    assert feeds["ids"].tolist() == [[CLS, *words[0], SEP], [CLS, *words[1], SEP, 0]]
    assert feeds["mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert feeds["pooled"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert np.array_equal(preparer.prepare(["a cat"])["pooled"], [[1, 1, 1, 1]])
    assert feeds["pooled"].dtype == np.int64


def test_a_prompt_that_leaves_no_room_for_the_text_is_refused(make: Make):
    bare = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.normalizer = normalizers.Strip()
    preparer = make(bare, context=2, mask="mask", pooled="pooled", truncate=True)
    assert preparer.prepare(["b"], "a ")["pooled"].tolist() == [[0, 1]]
    with pytest.raises(BadRequest, match="the prompt has 2 tokens, and this model reads at most 2"):
        preparer.prepare(["b"], "a a ")


def test_a_prompt_around_the_text_stays_whole_when_the_text_is_cut(make: Make):
    """By hand, [CLS] photo of … on the [SEP]: the words on both sides stay, also of windows."""
    prompt = "photo of {} on the"
    around = lambda *cats: [2, 5, 6, *cats, 11, 12, 3]  # noqa: E731
    assert make(wordpiece(), context=16).prepare(["a cat"], prompt)["ids"].tolist() == [around(4, 7)]
    preparer = make(wordpiece(), context=8, truncate=True)
    assert preparer.tokens("a cat on the beach", prompt=prompt) == around(4, 7)
    windows = preparer.windows("a cat on the beach", prompt=prompt)
    assert windows == [around(4, 7), around(11, 12), around(13)]
    with pytest.raises(BadRequest, match="6 tokens around the text, and this model reads at most 6"):
        make(wordpiece(), context=6, truncate=True).tokens("a cat", prompt=prompt)
    with pytest.raises(TextTooLong, match="has 11 tokens"):
        make(wordpiece(), context=8).tokens("a cat on the beach", prompt=prompt)


def test_a_prompt_around_the_text_is_not_left_out_of_a_mean():
    with pytest.raises(ValidationError, match=r"the prompt 'x' has \{\}; with `pooled` every prompt stands before"):
        TextPreprocess(context=9, pooled="pooled", prompts={"x": "photo of {}"})


def test_an_unknown_default_prompt_is_refused():
    with pytest.raises(ValidationError, match="prompt is 'query'; expected one of"):
        TextPreprocess(context=4, prompt="query", prompts={"document": ""})
    assert TextPreprocess(context=4, prompt="document", prompts={"document": "d: "}).prompt_text() == "d: "


def test_windows_cover_the_text_and_each_begins_and_ends_as_a_text(make: Make):
    """[CLS] + 7 words + [SEP] in a context of 5: windows of 3 words."""
    preparer = make(wordpiece(), context=5)
    text = "a photo of cat dog two on"
    words = list(preparer.encode(text)[1:-1])
    assert preparer.windows(text) == [[CLS, *words[i : i + 3], SEP] for i in (0, 3, 6)]
    assert preparer.windows(text, 2) == [[CLS, *words[i : i + 3], SEP] for i in (0, 2, 4)]
    assert preparer.windows(text, 1) == [[CLS, *words[i : i + 3], SEP] for i in range(5)]
    assert preparer.windows("cat") == [list(preparer.encode("cat"))]
    for stride in (0, 4):
        with pytest.raises(BadRequest, match=f"stride is {stride}; expected 1 to 3 tokens"):
            preparer.windows(text, stride)


def test_a_stride_may_be_an_eighth_of_a_window_and_no_less(make: Make):
    preparer = make(wordpiece(), context=18)
    text = "cat dog " * 40
    assert len(preparer.windows(text, 2)) == 33  # (80 - 16) / 2 + 1
    with pytest.raises(BadRequest, match="stride is 1; expected 2 to 16 tokens"):
        preparer.windows(text, 1)


def test_a_special_token_in_the_text_is_a_word_of_a_window(make: Make):
    preparer = make(wordpiece(), context=4)
    assert preparer.windows("[SEP] cat [CLS] dog") == [[CLS, SEP, *preparer.encode("cat")[1:2], SEP],
                                                       [CLS, CLS, *preparer.encode("dog")[1:2], SEP]]  # fmt: skip


def test_every_window_begins_with_the_prompt(make: Make):
    preparer = make(wordpiece(), context=6)
    text, words = "cat dog two on", preparer.encode("cat dog two on")[1:-1]
    prompt = [CLS, *preparer.encode("a photo ")[1:-1]]
    assert preparer.windows(text, None, "a photo ") == [[*prompt, *words[:2], SEP], [*prompt, *words[2:], SEP]]
    with pytest.raises(BadRequest, match="each window begins and ends with 6 tokens, and this model reads at most 6"):
        preparer.windows(text, None, "a photo of cat ")
