"""Words of captions in many scripts, with their offsets."""

import pytest

from calmclip.models.tasks.words import without, words

ZWJ = "\N{ZERO WIDTH JOINER}"
FAMILY = ZWJ.join("\N{WOMAN}\N{WOMAN}\N{GIRL}")


CAPTIONS = [  # words with a bar between them
    "A|man's|T-shirt|the|dog\u2019s|3.5|toys",
    "rock-and-roll|x",
    "caf\u00e9|nai\u0308ve",  # the second with a combining mark
    "\u0939\u093f\u0928\u094d\u0926\u0940|\u0936\u092c\u094d\u0926",
]


@pytest.mark.parametrize("marked", CAPTIONS)
@pytest.mark.parametrize("between", [" ", ", ", "... ", " - "])
def test_words_and_their_offsets(marked: str, between: str):
    caption = f'"{marked.replace("|", between)}".'
    spans = words(caption)
    assert [span.text for span in spans] == marked.split("|")
    assert [caption[span.start : span.end] for span in spans] == marked.split("|")


def test_scripts_without_spaces_and_symbols_have_words_of_their_own():
    thumb = "\N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}"
    spans = words(f"ok\u4e24\u53ea\u72d7\u30ab\u30bf {FAMILY}{thumb}!")
    assert [span.text for span in spans] == ["ok", "\u4e24", "\u53ea", "\u72d7", "\u30ab\u30bf", FAMILY, thumb]
    assert words("... !") == words("") == ()


def test_function_words_carry_no_content():
    caption = "The dog ISN\u2019T on a red sofa with two cats"
    assert [span.text for span in words(caption) if span.has_content] == ["dog", "red", "sofa", "two", "cats"]


def test_a_word_leaves_no_double_space_and_no_space_before_a_stop():
    caption = "A red dog , a cat."
    texts = [without(caption, span) for span in words(caption)]
    assert texts == ["red dog , a cat.", "A dog , a cat.", "A red , a cat.", "A red dog , cat.", "A red dog , a."]
    assert without("cat", words("cat")[0]) == ""
