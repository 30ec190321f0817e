"""The words of a caption, with their places in it, and the words that carry no content of a picture.

Source: Unicode Standard Annex 29, section 4 (word boundaries), simplified: a word is a run of letters, marks and
digits; a hyphen, an apostrophe, a full stop or a middle dot between two of these belongs to it ("T-shirt", "dog's",
"3.5"); a Han, Hiragana or Thai-like character, whose script writes no spaces, is a word of its own; so is a symbol such
as an emoji. Punctuation and spaces are no words.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

_JOINS = frozenset("-'.\N{RIGHT SINGLE QUOTATION MARK}\N{MIDDLE DOT}\N{HYPHEN}\N{NON-BREAKING HYPHEN}")
_GLUE = frozenset("\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}\N{VARIATION SELECTOR-16}")
# scripts without spaces between words: first and last code point
_ALONE = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x309F),  # Hiragana
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, compatibility
    (0x20000, 0x3FFFF),  # Han, the other extensions
)

# The closed classes of English: articles, pronouns, prepositions, conjunctions, auxiliaries and particles. A language
# gets no new words of these classes. For other languages there is no list, so any word of theirs may be flagged. Words
# of open classes are absent: nouns, verbs, adjectives, numbers.
_CLOSED = """
a an the this that these those each every either neither both all any some no none other another such same own
i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
ourselves they them their theirs themselves who whom whose which what one ones someone something anyone anything
everyone everything nothing
of in on at by for with without from to into onto upon off out over under above below beneath beside besides
between among amongst behind before after during through throughout across along alongside against around about
near toward towards inside outside within beyond past past up down via per as than like
and or but nor so yet if while whilst when where because since until unless although though whether
is am are was were be been being isn't aren't wasn't weren't do does did doing don't doesn't didn't has have had
having can could will would shall should may might must can't cannot couldn't won't wouldn't
not n't there here then also too very just only even still again away back together while s
"""
FUNCTION_WORDS = frozenset(_CLOSED.split())


@dataclass(frozen=True, slots=True)
class Span:
    """``start`` and ``end``: offsets in characters (code points) of the caption, which holds ``text`` between them."""

    text: str
    start: int
    end: int

    @property
    def has_content(self) -> bool:
        """Whether it may be wrong of a picture: it is no function word."""
        return self.text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'") not in FUNCTION_WORDS


def words(caption: str) -> tuple[Span, ...]:
    """The words in their order; they do not overlap. Empty for a text without any."""
    return tuple(Span(caption[start:end], start, end) for start, end in _spans(caption))


def _spans(text: str) -> Iterator[tuple[int, int]]:
    place, end = 0, len(text)
    while place < end:
        start, kind = place, _kind(text[place])
        place += 1
        if not kind or kind == "mark":
            continue
        while place < end and _goes_on(text, place, kind):
            place += 1
        yield start, place


def _goes_on(text: str, place: int, kind: str) -> bool:
    """Whether the character at ``place`` belongs to the word of this kind before it."""
    following = _kind(text[place])
    if following == "mark" or following == "run" == kind:
        return True
    if following == "symbol":
        return kind == "symbol" and text[place - 1] == "\N{ZERO WIDTH JOINER}"
    return kind == "run" and text[place] in _JOINS and _kind(text[place + 1 : place + 2]) == "run"


def _kind(character: str) -> str:
    """ "run": part of a word; "alone": a word of its own; "symbol"; "mark": belongs to what is before it; or ""."""
    category = unicodedata.category(character) if character else "-"
    if category[0] == "M" or character in _GLUE or category == "Sk":
        return "mark"
    if category[0] in "LN":
        code = ord(character)
        return "alone" if any(low <= code <= high for low, high in _ALONE) else "run"
    return "symbol" if category == "So" else ""


def without(caption: str, span: Span) -> str:
    """The caption without one word and without a space that would stand double or before a stop. It may be empty."""
    left, right = caption[: span.start], caption[span.end :]
    return ((left if right[:1].isalnum() else left.rstrip()) + right).strip()
