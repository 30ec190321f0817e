"""CLIP's byte-pair tokenizer as a tokenizer.json, from the vocabulary that open_clip ships.

Source: Radford et al. 2021, section 2.4: lower-cased BPE of 49 152 merges, [SOS] text [EOS].
The bundle cleans a text before that; `CLEAN` is the `clean` of this tokenizer.
"""

from functools import cache
from typing import Literal

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from calmclip.export.checkpoints.files import require_package

CLEAN: Literal["lower"] = "lower"
# unlike in open_clip, the text "<end_of_text>" is read as letters: no text can write a special token
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@cache
def tokenizer_json() -> bytes:
    simple = require_package("open_clip.tokenizer", "the net open_clip").SimpleTokenizer()
    end = "<end_of_text>" if "<end_of_text>" in simple.encoder else "<|endoftext|>"
    start = "<start_of_text>" if "<start_of_text>" in simple.encoder else "<|startoftext|>"
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
    tokenizer = Tokenizer(
        models.BPE(vocab=simple.encoder, merges=merges, end_of_word_suffix="</w>", fuse_unk=False, unk_token=end)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, simple.encoder[start]), (end, simple.encoder[end])],
    )
    return tokenizer.to_str().encode()
