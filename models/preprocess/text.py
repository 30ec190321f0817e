"""Strings -> int64 [B, T] ids and mask, from the bundle's tokenizer.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordLevel, WordPiece

from calmclip.models.bundle.manifest import TextPreprocess
from calmclip.models.errors import BadRequest, BundleInvalid, TextTooLong
from calmclip.models.flow import Array
from calmclip.models.preprocess.clean import CLEANERS

CACHED_TEXTS = 4096  # the cache of tokens holds this many texts, because labels repeat
CACHED_CHARACTERS = 256  # longer texts are not cached
MAX_CHARACTERS = 100_000  # limits the time of a tokenizer: a second for a few million characters


T = TypeVar("T")


def check_unknown_token(tokenizer: Tokenizer) -> None:
    """Raises ValueError for word pieces or words without their unknown token: the library refuses every other word.

    Byte pairs and Unigram may need no such token, because they may know every byte.
    """
    model = tokenizer.model
    if isinstance(model, WordPiece | WordLevel) and model.token_to_id(model.unk_token) is None:
        raise ValueError(
            f"its {type(model).__name__} model has no token {model.unk_token!r} in its vocabulary, which stands for "
            "unknown words; add it to `vocab`, or name another token of `vocab` as `unk_token`"
        )


@dataclass(frozen=True)
class Located:
    """``text``: as the tokenizer sees it, cleaned. ``offsets``: of each id, start and end in characters of ``text``;
    equal for a special token."""

    text: str
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


class TextPreparer:
    """Runs a `TextPreprocess`. Several threads may share it. Raises `BundleInvalid` for a tokenizer of no use."""

    def __init__(self, spec: TextPreprocess, directory: Path) -> None:
        self.spec = spec
        path = directory / spec.tokenizer
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleInvalid(f"{path} is not a tokenizer of the `tokenizers` library: {error}") from None
        try:
            check_unknown_token(self._tokenizer)
        except ValueError as error:
            raise BundleInvalid(f"{path}: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._cached = lru_cache(CACHED_TEXTS)(self._encode)

    def prepare(self, texts: Sequence[str]) -> dict[str, Array]:
        """The graph's feeds of all ``texts``, see `padded`. Raises as `tokens`."""
        return self.padded([self.tokens(text, index) for index, text in enumerate(texts)])

    def padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Array]:
        """The graph's feeds: ids int64 [B, T], and mask int64 [B, T] (1 = a token) if the graph takes one."""
        width = self.spec.width(max(map(len, rows), default=1))
        ids = np.full((len(rows), width), self.spec.pad_id, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        return {self.spec.ids: ids} | ({self.spec.mask: mask} if self.spec.mask else {})

    def count(self, text: str) -> int:
        """The number of tokens of ``text`` with special tokens, without a limit. Raises as `encode`."""
        return len(self.encode(text))

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of ``text`` with special tokens, without a limit. Raises `BadRequest` if the tokenizer refuses it."""
        return self._cached(text) if len(text) <= CACHED_CHARACTERS else self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, without special ones."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def tokens(self, text: str, index: int = 0) -> Sequence[int]:
        """The ids of ``text``, at most `context` of them; ``index`` names the text in an error.

        Raises `TextTooLong` with the count of tokens and the limit, unless the bundle truncates; `BadRequest`
        for a text that is empty, is not Unicode (a lone surrogate), or has no token; and as `encode`.
        """
        if not text.strip():
            raise BadRequest(f"text {index} is empty; expected some words")
        if len(text) > MAX_CHARACTERS:
            raise TextTooLong(
                f"text {index} has {len(text)} characters; at most {MAX_CHARACTERS} are read. Shorten it."
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest(f"text {index} holds a lone surrogate and is not Unicode text") from None
        row = self.encode(text)
        if not row:
            raise BadRequest(f"text {index} ({text[:40]!r}) has no token of this model; expected some words")
        if len(row) <= self.spec.context or self.spec.truncate:
            return self._kept(row)
        raise TextTooLong(
            f"text {index} ({text[:40]!r}…) has {len(row)} tokens; "
            f"this model reads at most {self.spec.context}. Shorten it."
        )

    def located(self, text: str) -> Located:
        """The ids of ``text`` as by `tokens`, with their places. Raises as `tokens`."""
        ids = self.tokens(text)
        cleaned, encoding = self._encoded(text)
        return Located(cleaned, ids, self._kept(encoding.offsets))

    @cached_property
    def ids(self) -> int:
        """One more than the largest id of a token."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def _kept(self, row: Sequence[T]) -> Sequence[T]:
        """What `context` tokens leave of a row: a row that is too long keeps its last entry."""
        return row if len(row) <= self.spec.context else [*row[: self.spec.context - 1], row[-1]]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._encoded(text)[1].ids)

    def _encoded(self, text: str) -> tuple[str, Encoding]:
        """The cleaned text, and the tokenizer's answer."""
        if self.spec.clean:
            text = CLEANERS[self.spec.clean](text)
        try:
            return text, self._tokenizer.encode(text)
        except Exception as error:  # the library raises bare Exception
            raise BadRequest(
                f"the tokenizer cannot encode {text[:40]!r} ({error}). It needs a token for what it does not know; use "
                "other words, or export with a tokenizer.json that has one."
            ) from None
