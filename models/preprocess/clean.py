"""The text cleaning of OpenAI's CLIP and open_clip before tokenization, with the standard library alone.

They call ftfy (white space, quotes, widths, ligatures, control characters, NFC, HTML), unescape HTML twice and join the
words by single spaces. This module does the same, with one exception: ftfy also repairs text that was decoded with a
wrong encoding ("schÃ¶n"); here such a text stays unchanged.

Source: Radford et al. 2021 (arXiv 2103.00020), its published code; Speer, ftfy 6 (doi 10.5281/zenodo.2591652).
"""

import html
import re
import unicodedata
from collections.abc import Callable, Mapping
from html.entities import html5

ROUNDS = 8  # layers of "&amp;amp;…" that are resolved; ftfy resolves all, in quadratic time
_LIGATURES = "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬅﬆ"
_QUOTES = {**dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"), **dict.fromkeys("\u201c\u201d\u201e\u201f", '"')}
_CONTROLS = (*range(9), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))
_REFERENCE = re.compile(r"&(?:#[0-9A-Za-z]{1,24}|[0-9A-Za-z]{1,24});")
_TERMINAL = re.compile(r"\x1b\[[\d;]*[a-zA-Z]")  # colours of a terminal


def lower(text: str) -> str:
    """In lower case; no white space at the ends, one space between words."""
    return whitespace(text).lower()


def whitespace(text: str) -> str:
    """The same without the change of case."""
    lines, tags = [], False
    for line in text.split("\n"):
        tags = tags or "<" in line
        lines.append(_repair(line, references=not tags))
    text = "\n".join(lines)
    return " ".join(html.unescape(html.unescape(text)).split())


CLEANERS: Mapping[str, Callable[[str], str]] = {"lower": lower, "whitespace": whitespace}


def _repair(line: str, *, references: bool) -> str:
    """``references``: resolve HTML references. False from the first line with "<" on: there they may be text."""
    for _ in range(ROUNDS):
        before = line
        if references:
            line = _REFERENCE.sub(_character, line)
        line = _TERMINAL.sub("", line.translate(_LETTERS)).translate(_GONE)
        line = unicodedata.normalize("NFC", line)
        if line == before:
            break
    return line


def _character(match: re.Match[str]) -> str:
    """The character of a reference with a semicolon; names of letters may be in capitals."""
    name = match[0]
    character = html5.get(name[1:]) or _CAPITALS.get(name[1:])
    if character is None and name[1] == "#":
        character = html.unescape(name)
    return name if character is None or ";" in character else character


def _letters() -> dict[int, str]:
    """Code point -> its replacement: one width, no ligatures, straight quotes, Windows-1252 for C1."""
    table = {ord(letter): _parts(letter) for letter in _LIGATURES}
    table[0x3000] = " "
    for code in range(0xFF01, 0xFFF0):
        if (usual := unicodedata.normalize("NFKC", chr(code))) != chr(code):
            table[code] = usual
    for code in range(0x80, 0xA0):
        table[code] = bytes([code]).decode("cp1252", "ignore") or chr(code)
    return {code: "".join(_QUOTES.get(c, c) for c in text) for code, text in table.items()} | {
        ord(quote): straight for quote, straight in _QUOTES.items()
    }


def _parts(letter: str) -> str:
    """One step of the compatibility decomposition: "ﬅ" becomes "ſt", not "st"."""
    return "".join(chr(int(code, 16)) for code in unicodedata.decomposition(letter).split()[1:])


_LETTERS, _GONE = _letters(), dict.fromkeys(_CONTROLS)
_CAPITALS = {
    name.upper(): character.upper()
    for name, character in html5.items()
    if name.endswith(";") and name == name.lower() and html.unescape(f"&{name.upper()}") == f"&{name.upper()}"
}
