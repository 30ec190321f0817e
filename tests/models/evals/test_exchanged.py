"""Exchanged nouns: what is exchanged for what, articles and capitals, and what would stay true."""

import numpy as np
import pytest

from calmclip.models.evals.exchanged import NOUNS, exchange, plural
from calmclip.models.tasks.words import words

CAPTIONS = [
    ["A dog runs on the beach.", "An animal near the ocean."],
    ["Two women hold an umbrella.", "Women with a parasol"],
    ["A man eats an apple.", "a man and fruit"],
    ["a cat sleeps on a couch", "A kitten on the sofa"],
    ["Men carry bags to a bus.", "Some people and a van"],
    ["People stand around."],
]


def test_one_noun_becomes_another_of_its_kind_and_number_that_no_caption_of_the_picture_means():
    rows = [row for seed in range(200) for row in exchange(CAPTIONS, seed, "narrow")]
    # no other caption has one man or one food, and "people" names most of its kind: it would stay true
    assert {row.picture for row in rows} == {0, 1, 3, 4}
    for row in rows:
        kind, (old, new) = next(
            (kind, (NOUNS[kind, row.old.lower()], NOUNS[kind, row.new]))
            for kind, word in NOUNS
            if word == row.old.lower() and (kind, row.new) in NOUNS
        )
        assert old.plural == new.plural
        held = [words(caption) for caption in CAPTIONS[row.picture]]
        shown = [NOUNS[kind, span.text.lower()] for each in held for span in each if (kind, span.text.lower()) in NOUNS]
        assert not any(new.groups & noun.groups for noun in shown), row
        before, after = row.caption.split(), row.false.split()
        assert len(before) == len(after)
        assert 1 <= sum(a != b for a, b in zip(before, after, strict=True)) <= 2  # the noun, and perhaps its article
    falses = {row.false for row in rows}
    assert {"A cat runs on the beach.", "Two men hold an umbrella.", "Women carry bags to a bus."} <= falses
    assert not any("parasol" in row.false or "sofa" in row.false for row in rows if row.picture in (1, 3))


def test_wide_kinds_are_wordnets_and_any_kind_is_all_nouns():
    captions = [["a shirt"], ["a ball"], ["a horse"]]
    assert exchange(captions, kinds="narrow") == []
    assert {(row.old, row.new) for row in exchange(captions, kinds="wide")} == {("shirt", "ball"), ("ball", "shirt")}
    new = {row.new for seed in range(20) for row in exchange(captions, seed, "any") if row.old == "shirt"}
    assert new == {"ball", "horse"}


def test_the_article_fits_the_new_noun():
    captions = [["A boy with an umbrella"], ["a camera on a table"], ["a girl with a knife"]]
    falses = {row.false for seed in range(50) for row in exchange(captions, seed)}
    assert "A boy with a camera" in falses
    assert "an umbrella on a table" in falses
    assert not any(" an camera" in false or "a umbrella" in false for false in falses)


def test_a_noun_is_drawn_as_often_as_other_captions_hold_it():
    """Of ten captions nine say "cat" and one says "horse"; 10 % of 300 draws have a standard deviation of 1.7 %."""
    captions = [["a dog"], *[["a cat"]] * 9, ["a horse"]]
    drawn = [exchange(captions, seed)[0].new for seed in range(300)]
    assert {*drawn} == {"cat", "horse"}
    assert np.mean([new == "horse" for new in drawn]) == pytest.approx(0.1, abs=0.06)
    assert exchange(captions, 3) == exchange(captions, 3)


def test_plurals():
    nouns = ["dog", "bus", "beach", "baby", "boy", "man", "knife", "box", "dish"]
    assert [*map(plural, nouns)] == ["dogs", "buses", "beaches", "babies", "boys", "men", "knives", "boxes", "dishes"]
