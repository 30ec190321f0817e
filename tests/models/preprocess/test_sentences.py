"""Sentences of several languages, divided by hand; and what holds for any text."""

# ruff: noqa: RUF001  the marks of other scripts are meant
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calmclip.models.preprocess.sentences import STOPS, WIDE, sentences

DIVIDED = {
    "titles, initials, times": (
        "Dr. Smith met J. R. Doe at 3 p.m. on Monday!|Why?|“I don't know.”|"
        "See Fig. 3, e.g. the left part, vs. No. 4 there.|"
        ""
        "No.|It cost 3.50 dollars in 1999.|Then they left…|"
        "Nobody asked."
    ),
    "German": "Das Treffen ist am 3. Mai oder 12. Juni, z.B. um 10 Uhr.|"
    "Es gibt Kaffee usw.|Hr. Müller kommt bzw. ruft an.|„Gut!“|Bis dann.",
    "French": "M. Dupont est là.|Où ça ?|Là-bas, p.ex. près de Mme. Curie !|« C'est vrai. »|Bon.",
    "Spanish": "¿Qué hora es?|Son las tres.|¡Vámonos!|La Sra. García llega.",
    "Russian": "Это рис. 5 в г. Москве.|А. С. Пушкин писал стихи.|Правда?|Да.",
    "small letters after a stop": "He said “Stop!” and left.|Really? yes… but no.|A »word« is quoted.|»So it is.«|So.",
    "Hindi": "यह एक वाक्य है।|यह दूसरा है॥|क्या?",
    "Arabic": "هل هذا جيد؟|نعم.|السلام عليكم۔",
    "Amharic": "ሰላም።|እንዴት ነህ፧",
}


@pytest.mark.parametrize("divided", DIVIDED.values(), ids=DIVIDED)
def test_languages(divided: str):
    """A bar stands for the end of a sentence; the sentences are parted by a space or by the end of a line."""
    want = divided.split("|")
    for gap in (" ", "\n", "  \n "):
        text = gap.join(want)
        assert [text[start:end] for start, end in sentences(text)] == want


def test_scripts_without_spaces():
    text = "我喜欢猫。你呢？！「好的。」他说……然后走了。ねこです｡はい．"
    assert [text[start:end] for start, end in sentences(text)] == [
        "我喜欢猫。", "你呢？！", "「好的。」", "他说……然后走了。", "ねこです｡", "はい．",
    ]  # fmt: skip


def test_paragraphs_and_lists_end_sentences_and_a_wrapped_line_does_not():
    text = (
        "A head\n\nwrapped\ntext here\n  \nlast one\n- item one\n* item two\n 12) third\n3. fourth\f\vnew page\u2029end"
    )
    assert [text[start:end] for start, end in sentences(text)] == [
        "A head", "wrapped\ntext here", "last one", "- item one", "* item two", "12) third", "3. fourth", "new page",
        "end",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "  \n\n\t", "\u2028"])
def test_white_space_has_no_sentence(text: str):
    assert sentences(text) == []


def test_without_marks_a_text_is_one_sentence():
    for text in ("red green blue", "…", "-" * 50, "\0", "a" * 10_000):
        assert sentences(text) == [(0, len(text))]


@given(st.text(st.sampled_from([*"aZ1é \n\t\f\0-*)(\"'”.", *STOPS[:8], *WIDE[:2], "ก", "中", "🐈", "́"]), max_size=60))
def test_sentences_hold_everything_but_white_space_once_and_in_order(text: str):
    spans = sentences(text)
    places = [place for start, end in spans for place in range(start, end)]
    assert places == sorted(set(places))
    assert all(text[place].isspace() for place in {*range(len(text))}.difference(places))
    for start, end in spans:
        assert text[start:end] == text[start:end].strip() != ""


@pytest.mark.parametrize("part", [".", ". ", "\n ", ".)", ". (", "。", "\n1", ".\n", ".’ ", "( "])
def test_a_hundred_thousand_characters_of_marks(part: str):
    """With time that grows with the square this would not end."""
    text = part * (100_000 // len(part)) + "x"
    spans = sentences(text)
    assert spans[-1][1] == len(text)
