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
from calmclip.models.preprocess.truncation import LEAST_STRIDE, Truncation

CACHED_TEXTS = 4096  # the cache of tokens holds this many texts, because labels repeat
CACHED_PROMPTS = 64  # of which the number of tokens is kept
CACHED_CHARACTERS = 256  # longer texts are not cached
MAX_CHARACTERS = 100_000  # limits the time of a tokenizer: a second for a few million characters


T = TypeVar("T")
HOLE = "{}"  # the place of the text in a prompt that has words behind it


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


def prompted(prompt: str, text: str) -> str:
    """``text`` in the place of `HOLE` in ``prompt``, or behind a prompt without one."""
    before, _, after = prompt.partition(HOLE)
    return f"{before}{text}{after}"


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
        self.truncation = Truncation.of(spec.truncate)
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
        self._prompt_tokens = lru_cache(CACHED_PROMPTS)(self._count_prompt)

    def prepare(self, texts: Sequence[str], prompt: str = "") -> dict[str, Array]:
        """The graph's feeds of all ``texts``, see `padded`. Raises as `tokens`."""
        rows = [self.tokens(text, index, prompt) for index, text in enumerate(texts)]
        return self.padded(rows, self.prompt_tokens(prompt))

    def padded(self, rows: Sequence[Sequence[int]], skipped: int = 0) -> dict[str, Array]:
        """The graph's feeds: ids int64 [B, T], and mask int64 [B, T] (1 = a token) if the graph takes one. The input
        `pooled` is the mask without the first ``skipped`` tokens of each row."""
        width = self.spec.width(max(map(len, rows), default=1))
        ids = np.full((len(rows), width), self.spec.pad_id, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        feeds = {self.spec.ids: ids} | ({self.spec.mask: mask} if self.spec.mask else {})
        if self.spec.pooled:
            feeds[self.spec.pooled] = mask * (np.arange(width) >= skipped)
        return feeds

    def count(self, text: str) -> int:
        """The number of tokens of ``text`` with special tokens, without a limit. Raises as `encode`."""
        return len(self.encode(text))

    def prompt_tokens(self, prompt: str) -> int:
        """The number of tokens of ``prompt`` before a text, with special ones before it. As sentence-transformers does,
        the prompt alone is counted, without a special token after it."""
        before = prompt.partition(HOLE)[0]
        return self._prompt_tokens(before) if before else 0

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of ``text`` with special tokens, without a limit. Raises `BadRequest` if the tokenizer refuses it."""
        return self._cached(text) if len(text) <= CACHED_CHARACTERS else self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, without special ones."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def tokens(self, text: str, index: int = 0, prompt: str = "") -> Sequence[int]:
        """The ids of ``prompt`` and ``text`` as one text, at most `context` of them; ``index`` names the text in an
        error.

        Raises as `fitting`, but not for a text that is too long if the bundle cuts it.
        """
        if self.truncation.method == "end":
            return self.cut(text, index, prompt)
        return self.fitting(text, index, prompt)

    def cut(self, text: str, index: int = 0, prompt: str = "") -> Sequence[int]:
        """The ids as by `checked`, at most `context` of them: words of ``prompt`` behind the text stay. Raises as
        `checked`, and `BadRequest` for a prompt that leaves no room."""
        row = self.checked(text, index, prompt)
        if len(row) <= self.spec.context:
            return row
        last = self._behind(text, prompt)
        if HOLE in prompt and (around := self.prompt_tokens(prompt) + last) >= self.spec.context:
            raise BadRequest(
                f"the prompt has {around} tokens around the text, and this model reads at most {self.spec.context}; "
                "name a shorter prompt"
            )
        return [*row[: self.spec.context - last], *row[-last:]]

    def fitting(self, text: str, index: int = 0, prompt: str = "") -> Sequence[int]:
        """As `checked`. Raises also `TextTooLong` with the count of tokens and the limit."""
        row = self.checked(text, index, prompt)
        if len(row) > self.spec.context:
            raise TextTooLong(
                f"text {index} ({text[:40]!r}…) has {len(row)} tokens; "
                f"this model reads at most {self.spec.context}. Shorten it, or choose `truncate`."
            )
        return row

    def checked(self, text: str, index: int = 0, prompt: str = "") -> Sequence[int]:
        """The ids of ``prompt`` and ``text`` as one text, any number of them; ``index`` names the text in an error.

        Raises `TextTooLong` for more than `MAX_CHARACTERS`; `BadRequest` for a text that is empty, is not Unicode (a
        lone surrogate), or has no token; and as `encode`.
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
        row, skipped = self.encode(prompted(prompt, text)), self.prompt_tokens(prompt) if self.spec.pooled else 0
        if skipped >= self.spec.context:
            raise BadRequest(
                f"the prompt has {skipped} tokens, and this model reads at most {self.spec.context}; a text needs room "
                "after it, so name a shorter prompt"
            )
        if len(row) <= skipped:
            raise BadRequest(f"text {index} ({text[:40]!r}) has no token of this model; expected some words")
        return row

    def windows(self, text: str, stride: int | None = None, prompt: str = "") -> list[Sequence[int]]:
        """Rows of at most `context` ids that cover ``text``; each has the words of ``prompt``, and the special tokens
        that begin and end a text.

        ``stride``: see `Truncation`. Raises `BadRequest` for a stride above the tokens of a window or below an eighth
        of them, or for a prompt that leaves no room; and as `encode`.
        """
        _, encoding = self._encoded(prompted(prompt, text))
        ids, special = encoding.ids, encoding.special_tokens_mask
        first = next((place for place, mark in enumerate(special) if not mark), len(ids))
        first = max(first, self.prompt_tokens(prompt))
        last = len(ids) - next((place for place, mark in enumerate(special[::-1]) if not mark), 0)
        last = min(last, len(ids) - self._behind(text, prompt)) if HOLE in prompt else last
        head, words, tail = ids[:first], ids[first:last], ids[last:]
        size = self.spec.context - len(head) - len(tail)
        if size < 1:
            raise BadRequest(
                f"each window begins and ends with {len(head) + len(tail)} tokens, and this model reads at most "
                f"{self.spec.context}; name a shorter prompt, or another `truncate`"
            )
        step, least = size if stride is None else stride, max(1, size // LEAST_STRIDE)
        if not least <= step <= size:
            raise BadRequest(f"stride is {stride}; expected {least} to {size} tokens")
        ends = range(size, len(words) + step, step)  # the last window ends at or after the last word
        return [[*head, *words[end - size : end], *tail] for end in ends]

    def located(self, text: str) -> Located:
        """The ids of ``text`` as by `tokens`, with their places. Raises as `tokens`."""
        ids = self.tokens(text)
        cleaned, encoding = self._encoded(text)
        return Located(cleaned, ids, self.kept(encoding.offsets))

    @cached_property
    def ids(self) -> int:
        """One more than the largest id of a token."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def kept(self, row: Sequence[T]) -> Sequence[T]:
        """What `context` tokens leave of a row: a row that is too long keeps its last entry."""
        return row if len(row) <= self.spec.context else [*row[: self.spec.context - 1], row[-1]]

    def _behind(self, text: str, prompt: str) -> int:
        """The number of tokens that are kept behind a text that is cut: those of the words of ``prompt`` there, and
        special ones; at least the last."""
        after = prompt.partition(HOLE)[2]
        if not after:
            return 1
        cleaned, encoding = self._encoded(prompted(prompt, text))
        start = len(cleaned) - len(after)
        return len(encoding.ids) - next(i for i, (_, end) in enumerate(encoding.offsets) if end > start)

    def _count_prompt(self, prompt: str) -> int:
        special: Sequence[int] = self._encoded(prompt)[1].special_tokens_mask
        return len(special) - (special[-1] if special else 0)

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
