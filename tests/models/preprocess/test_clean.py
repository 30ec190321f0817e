# ruff: noqa: E501, RUF001
"""The oracle is ftfy and then open_clip's steps, on random texts of characters that ftfy changes."""

import html
import random

import ftfy
import pytest

from calmclip.models.preprocess.clean import ROUNDS, lower, whitespace

PIECES = {
    "words": ["abc", "XYZ", "'n", " ", "  ", "İ", "Σ", "ΟΔΟΣ", "ſ", "ı", "e\u0301", "\u0301", "猫", "👩\u200d🚀🏽", ";", "#", "&", "x1f;"],
    "html": ["&amp;", "&lt;", "&#39;", "&#x2019;", "&eacute;", "&EACUTE;", "&NBSP;", "&nbsp;", "&copy", "&amp;lt;", "&notit;",
             "&#146;", "&#0;", "&#xD800;", "&#99999999;", "&bogus;", "&SZLIG;", "&Jscr;", "&#65", "&a" + "b" * 30 + ";"],
    "plain": [*"“”‘’‚„‛‟ʼ", *"ﬁﬃǆŉĳﬅŁ", *"！ＡＢｃ，ｶﾞ￥￨\u3000"],
    "control": [*"\x00\x07\x0b\x0c\x1b\x7f\ufeff\u206a\ufffb\ufffc\ufffd\u00ad\u200b", *"\x80\x81\x85\x92\x9f", "\x1b[31m", "\x1b[0;1m", "\x1b[x"],
    "space": [*"\t\n\r\u2028\u2029\u00a0\u2003", "\r\n"],
    "tag": ["<", "<b>", ">"],
}  # fmt: skip


def reference(text: str) -> str:
    text = ftfy.fix_text(text, fix_encoding=False)
    return " ".join(html.unescape(html.unescape(text)).split())


def drawn(count: int) -> list[str]:
    draw = random.Random(7)
    kinds = list(PIECES)
    weights = [6, 4, 3, 2, 2, 1]
    return [
        "".join(draw.choice(PIECES[draw.choices(kinds, weights)[0]]) for _ in range(draw.randint(1, 14)))
        for _ in range(count)
    ]


def test_equals_ftfy_and_open_clip():
    for text in drawn(5000):
        assert whitespace(text) == reference(text), ascii(text)
        assert lower(text) == reference(text).lower(), ascii(text)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("  Tom &amp;\tJerry’s “Café”  ", 'tom & jerry\'s "café"'),
        ("ＬＯＵＤ　ﬁrst!\n&lt;b>", "loud first! <b>"),
        ("<i>&eacute;&amp;eacute;</i>", "<i>éé</i>"),
        ("schÃ¶n", "schã¶n"),  # a wrong decoding is not repaired
    ],
)
def test_by_hand(text: str, want: str):
    assert lower(text) == want


def test_nested_references_are_resolved_to_a_bounded_depth():
    assert lower("&" + "amp;" * 20) == "&" + "amp;" * (20 - ROUNDS - 2)
