"""Text -> sentences, by rules over punctuation that hold in several scripts. No model, and no dictionary.

Source: Unicode Standard Annex 29, section 5 (sentence boundaries), whose rules SB6 to SB11 are followed in substance;
abbreviations are added, and blank lines and items of a list, which end a sentence in running text.
"""

# ruff: noqa: RUF001  the marks of other scripts are meant
import re
from collections.abc import Iterator

Span = tuple[int, int]  # start and end in characters

STOPS = ".!?…‼⁇⁈⁉؟۔܀܁܂।॥։።፧፨။។៕᠃᥄᰻"  # white space follows
WIDE = "。！？｡．｡"  # Chinese and Japanese: nothing follows
_CLOSING = "\"'“”‘’«»›)]}」』】）》〉］"
_OPENING = "\"'“‘«‹([{¿¡「『【（《〈［„‚"
_BLANK = r"\n[^\S\n]*\n|[\f\v\u2029]"
_ITEM = r"\n(?=[^\S\n]*(?:[-*•‣◦·–—]|\d{1,3}[.)])[^\S\n])"
_END = re.compile(
    # possessive, and from the first stop of a run: so the time is linear
    rf"(?<![{re.escape(STOPS)}])(?P<stop>[{re.escape(STOPS)}]++)[{re.escape(_CLOSING)}]*+"
    r"(?:[ \xa0\u202f]»(?=\s))?+(?=\s)"
    rf"|[{WIDE}]++[{re.escape(_CLOSING)}]*+|{_BLANK}|{_ITEM}"
)
_LAST_WORD = re.compile(r"[^\W_]+(?:\.[^\W_]+)*$")
_NEXT = re.compile(rf"[\s{re.escape(_OPENING)}]*(.)")
_DOTTED = re.compile(r"[^\W\d_]{1,3}(?:\.[^\W\d_]{1,3})+")  # e.g, U.S, z.B
MOST_WORD = 32  # characters before a stop that are searched for an abbreviation

_TITLES = """
mr mrs ms dr prof st sr jr mt gen col lt sgt capt rev hon gov sen rep pres messrs mme mlle sra srta dra dña exmo
hr fr dipl ing sig sigg dott avv dhr mevr vs cf viz vgl bzw ggf resp ca approx geb bijv np hab ул им г д с
"""
_NUMBERED = """
no nos nr fig figs p pp vol ch sec eq eqs ref refs art abs abb tab bd blz pág págs núm n
jan feb mar apr jun jul aug sep sept oct nov dec стр рис гл
"""
TITLES = frozenset(_TITLES.split())  # before a name; the stop ends no sentence
NUMBERED = frozenset(_NUMBERED.split())  # before a number


def sentences(text: str) -> list[Span]:
    """The sentences of ``text`` in order, without the white space between them; together they hold all else.

    A stop ends no sentence after an abbreviation, an initial or a number of one or two digits, or before a small
    letter. Time grows with the length of the text.
    """
    spans, start = [], 0
    for end in (*_ends(text), len(text)):
        part = text[start:end]
        if kept := part.strip():
            first = start + len(part) - len(part.lstrip())
            spans.append((first, first + len(kept)))
        start = end
    return spans


def _ends(text: str) -> Iterator[int]:
    for match in _END.finditer(text):
        if match["stop"] is None or _ends_here(text, match):
            yield match.end()


def _ends_here(text: str, match: re.Match[str]) -> bool:
    following = _NEXT.match(text, match.end())
    after = following[1] if following else ""
    if after.islower():
        return False
    if match["stop"] != ".":
        return True
    word = _LAST_WORD.search(text[max(0, match.start() - MOST_WORD) : match.start()])
    before = word[0].casefold() if word else ""
    if before.isdecimal():
        return len(before) > 2
    initial = len(before) == 1 and word is not None and word[0].isupper()
    known = before in TITLES or (before in NUMBERED and after.isdecimal())
    return not (initial or known or _DOTTED.fullmatch(before))
