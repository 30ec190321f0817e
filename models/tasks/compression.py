"""A text -> whole sentences of it, chosen to stay near the vector of the whole within a budget of tokens.

The whole's vector is the mean of its windows' (`truncation`). The sum of the chosen sentences' vectors, each times a
power of its tokens (`POWERS`), stands for the vector of the shorter text. Sentences are added greedily: the one that
brings the sum nearest to the whole's vector, absolutely or for each of its tokens. A sentence that repeats the others
moves the sum little, so redundancy needs no term of its own. Then sentences are exchanged, added or removed one by one
as long as that helps. Each power and each rule gives a list; so do the first sentences. The texts of all lists are
embedded, and the one nearest to the whole is the answer, so it is never farther from it than the first sentences.

Source: the aim of Nano-Capsulator, Chuang et al. 2024 (arXiv 2402.18700): a shorter text with the meaning of the whole
and a hard limit on its length. There a language model writes it; here it is extracted, so it says nothing new. The
greedy choice over a sum of vectors: Kobayashi, Noguchi, Yatsuka 2015 (Summarization based on embedding distributions).
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from calmclip.models.errors import BadRequest, TextTooLong
from calmclip.models.flow import Array, Flow
from calmclip.models.preprocess.sentences import Span, sentences

LEAST_BUDGET, MOST_BUDGET = 8, 8192  # tokens
MOST_SENTENCES = 4096  # of one text: their vectors take 6 MiB with 384 numbers each
POWERS = (0.0, 0.5, 1.0)  # of a sentence's tokens, its weight in the sum
MOST_STEPS = 64  # of improvement
MOST_EXCHANGED = 256  # a longer list is left as it is: memory grows with chosen sentences x sentences
GAP = 2  # characters of the white space after a sentence that stay: a blank line, at most

Count = Callable[[str], int]
Embed = Callable[[Sequence[str]], Flow[Array]]


@dataclass(frozen=True)
class Compressed:
    """``text``: sentences of the whole, in order. ``tokens`` and ``tokens_before``: of this text and of the whole, with
    special tokens. ``cosine``: of their vectors. ``kept``: which of the ``sentences`` sentences. ``cut``: no sentence
    was within the budget, so the text is the first words of one."""

    text: str
    tokens: int
    tokens_before: int
    cosine: float
    kept: tuple[int, ...]
    sentences: int
    cut: bool = False

    @property
    def ratio(self) -> float:
        """Tokens after, as a part of the tokens before."""
        return self.tokens / self.tokens_before


def compressed(text: str, budget: int, count: Count, embed: Embed) -> Flow[tuple[Compressed, Array]]:
    """-> the shorter text, and its unit row, float32 [D].

    ``count``: the tokens of a text, with special tokens; `Compressed.tokens` never exceeds ``budget``. ``embed``: texts
    -> unit rows, those of a text above the context by windows. A text within the budget is returned as it is. Time
    grows with the tokens of the text, which are read twice, and with sentences x chosen ones x D. Raises `BadRequest`
    (a budget without room for a character), `TextTooLong` (too many sentences), and what ``embed`` raises.
    """
    before, spans = count(text), sentences(text)
    if before <= budget:
        row = (yield from embed([text]))[0]
        return Compressed(text, before, before, 1.0, tuple(range(len(spans))), len(spans)), row
    if len(spans) > MOST_SENTENCES:
        raise TextTooLong(f"the text has {len(spans)} sentences; at most {MOST_SENTENCES} are read. Split it.")
    pieces, special = [text[start:end] for start, end in spans], count("")
    lengths = np.array([count(piece) - special for piece in pieces])
    whole = (yield from embed([text]))[0]
    read = np.flatnonzero(lengths > 0)  # a tokenizer may know nothing of a sentence, such as a control character
    if not read.size:
        raise BadRequest(f"no sentence of the text ({text[:40]!r}…) has a token of this model; expected some words")
    rows = yield from embed([pieces[i] for i in read])
    lists = shortlists(rows, lengths[read], whole, budget - special, [pieces[i] for i in read])
    shorter: dict[str, list[int]] = {}
    for chosen in (read[places].tolist() for places in lists):
        while chosen and count(joined(text, spans, chosen)) > budget:  # joined, they may have other tokens
            chosen.pop()
        if chosen:
            shorter.setdefault(joined(text, spans, chosen), chosen)
    if cut := not shorter:
        nearest = int(read[(rows @ whole).argmax()])
        shorter[first_words(pieces[nearest], budget, count)] = [nearest]
    candidates = yield from embed([*shorter])
    cosines = candidates @ whole
    best = int(cosines.argmax())
    words, kept = [*shorter.items()][best]
    facts = (words, count(words), before, float(cosines[best]), tuple(sorted(kept)), len(spans), cut)
    return Compressed(*facts), candidates[best]


def check_budget(budget: int) -> None:
    """Of a request. Raises `BadRequest`."""
    if not LEAST_BUDGET <= budget <= MOST_BUDGET:
        raise BadRequest(f"budget is {budget}; expected {LEAST_BUDGET} to {MOST_BUDGET} tokens")


def shortlists(rows: Array, lengths: Array, whole: Array, room: int, pieces: Sequence[str]) -> list[list[int]]:
    """Lists of rows, in each the most useful first, except in the last one, which has the first rows.

    ``rows`` float32 [S, D], ``lengths`` int [S] tokens, ``whole`` [D], ``pieces``: the text of each row, of which no
    list has one twice. The lengths of a list sum to at most ``room``; it is empty if no row fits.
    """
    first = {piece: i for i, piece in reversed([*enumerate(pieces)])}
    single = np.array([first[piece] == i for i, piece in enumerate(pieces)], bool)
    lists = []
    for power in POWERS:
        sums = _Sum(rows * lengths[:, None] ** power, lengths, whole)
        lists += [sums.improved(sums.greedy(room, single, each), room, single) for each in (False, True)]
    order = np.flatnonzero(single)
    return [*lists, order[: np.searchsorted(lengths[order].cumsum(), room, side="right")].tolist()]


class _Sum:
    """Sums of rows and their cosines to ``whole``, from products alone: one row more or less takes S x D steps."""

    def __init__(self, rows: Array, lengths: Array, whole: Array) -> None:
        self.rows = rows.astype(np.float64)
        self.lengths = lengths
        self.near = self.rows @ whole.astype(np.float64)  # [S]
        self.squares = (self.rows**2).sum(axis=1)

    def greedy(self, room: int, free: Array, per_token: bool) -> list[int]:
        free = free.copy()
        chosen: list[int] = []
        total, score = np.zeros(self.rows.shape[1]), 0.0
        while (fits := np.flatnonzero(free & (self.lengths <= room))).size:
            cosines = self._cosines(float(self.near[chosen].sum()), total, fits)
            gains = (cosines - score) / self.lengths[fits] if per_token and chosen else cosines
            place = int(gains.argmax())
            best, score = int(fits[place]), float(cosines[place])
            chosen.append(best)
            free[best], room, total = False, room - int(self.lengths[best]), total + self.rows[best]
        return chosen

    def _cosines(self, near: float, total: Array, others: Array) -> Array:
        """Of ``total``, whose product with the whole is ``near``, and each of the other rows."""
        squares = total @ total + 2 * (self.rows[others] @ total) + self.squares[others]
        cosines: Array = (near + self.near[others]) / np.sqrt(np.maximum(squares, 1e-24))
        return cosines

    def improved(self, chosen: Sequence[int], room: int, free: Array) -> list[int]:
        """``chosen`` after the steps that bring the sum nearest to the whole: a row is exchanged, added or removed.

        A row of zeros of no length stands for none, so a step is always an exchange. Each takes C x S steps.
        """
        if not 0 < len(chosen) <= MOST_EXCHANGED:
            return [*chosen]
        none = len(self.rows)
        rows, near = np.vstack([self.rows, np.zeros_like(self.rows[:1])]), np.append(self.near, 0.0)
        squares, lengths, free = np.append(self.squares, 0.0), np.append(self.lengths, 0), np.append(free, True)
        places = [*chosen, none]
        free[[*chosen]] = False
        products = rows[places] @ rows.T  # [C, S]
        for _ in range(MOST_STEPS):
            total, left = rows[places].sum(axis=0), room - int(lengths[places].sum())
            each, square, product = rows @ total, float(total @ total), float(near[places].sum())
            without = square - 2 * each[places] + squares[places]  # [C]: the square of the sum without the row
            after = without[:, None] + 2 * (each - products) + squares
            cosines = (product - near[places][:, None] + near) / np.sqrt(np.maximum(after, 1e-24))
            cosines[~(free & (lengths <= left + lengths[places][:, None]))] = -np.inf
            if len(places) == 2:
                cosines[:, none] = -np.inf  # one row stays
            place, new = map(int, np.unravel_index(int(cosines.argmax()), cosines.shape))
            if cosines[place, new] <= product / np.sqrt(max(square, 1e-24)) + 1e-9:
                break
            old = places[place]
            free[old], free[new] = True, new == none
            if new == none:
                del places[place]
                products = np.delete(products, place, axis=0)
            else:
                places[place], products[place] = new, rows @ rows[new]
            if old == none:
                places.append(none)
                products = np.vstack([products, np.zeros_like(products[:1])])
        return [place for place in places if place != none]


def joined(text: str, spans: Sequence[Span], chosen: Sequence[int]) -> str:
    """The chosen sentences in order, each with the beginning of the white space that follows it in ``text``."""
    parts, order = [], sorted(chosen)
    for i in order:
        start, end = spans[i]
        gap = text[end : spans[i + 1][0]][:GAP] if i != order[-1] else ""
        parts.append(text[start:end] + gap)
    return "".join(parts)


def first_words(text: str, budget: int, count: Count) -> str:
    """As much of the beginning of ``text`` as ``budget`` tokens hold, up to the end of a word; without such an end, up
    to a character. Raises `BadRequest` if one character has more tokens."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    kept = _most(text, ends, budget, count)
    if kept is None:
        ends = [i for i in range(1, ends[0] if ends else 1) if not unicodedata.combining(text[i])]
        kept = _most(text, ends, budget, count)
    if kept is None:
        raise BadRequest(f"budget is {budget}; the character {text[:1]!r} alone has {count(text[:1])} tokens")
    return kept


def _most(text: str, ends: Sequence[int], budget: int, count: Count) -> str | None:
    """The longest beginning of ``text`` up to one of ``ends`` within the budget. It tries short ones first, because a
    text may be far longer."""
    most = 1
    while most < len(ends) and count(text[: ends[most - 1]]) <= budget:
        most *= 2
    number = bisect_right(ends[:most], budget, key=lambda end: count(text[:end]))
    while number and count(text[: ends[number - 1]]) > budget:  # tokens may join over an end
        number -= 1
    return text[: ends[number - 1]] if number else None
